#!/usr/bin/env bash
# Starts the training command of the configuration file on GKE, as a JobSet of one pod per TPU host. The set starts all
# pods again when one is lost, and the command goes on from its newest checkpoint. It fails at once when the command
# itself was wrong. A set that has failed or finished must be deleted before another one of its name can start.
#
#   bash launch/gke/jobset.sh [--config=FILE] [--validate | --delete] [--dry_run]
#
#   --validate   has the cluster check the manifest, and starts nothing
#   --delete     ends the run and deletes the set; the workdir stays
#   --dry_run    prints the command with the whole manifest
set -euo pipefail

# shellcheck source=launch/tpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tpu.sh"
read_command_line "--validate --delete" "$@"
require_program kubectl kubectl
if given --delete; then
  run kubectl delete jobset "$name" "--namespace=$gke_namespace"
  exit
fi
require_keys gke_image gke_accelerator gke_topology gke_claim
mount="claim" # Whatever the TPU VMs mount, a pod mounts its claim.
check_train
# Kubernetes gives the pods' host names 63 characters, and the set appends -slice-SLICE-HOST to its name.
[[ "${#name}" -le 40 ]] || fail "$conf: name = $name has ${#name} characters; on GKE at most 40 leave room for the pods'"
[[ "$gke_topology" =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$ ]] ||
  fail "$conf: gke_topology = $gke_topology is not like 4x4 or 2x2x2"
chips=$((${gke_topology//x/*}))
[[ $((chips % gke_chips_per_host)) == 0 ]] ||
  fail "$conf: $gke_topology has $chips chips, which is no multiple of gke_chips_per_host = $gke_chips_per_host"
hosts=$((chips / gke_chips_per_host))
case "$provisioning" in
  on-demand) selector="" ;;
  spot) selector=$'\n                cloud.google.com/gke-spot: "true"' ;;
  *) fail "$conf: provisioning = $provisioning; on GKE the node pool says so, set on-demand or spot here" ;;
esac

# A YAML string: the JSON form is one.
quoted() {
  local text="${1//\\/\\\\}"
  printf '"%s"' "${text//\"/\\\"}"
}

# The same for text in which Kubernetes replaces $(VARIABLE), and $$ by $: it must come out as it stands.
literal() {
  local escaped='$$'
  quoted "${1//\$/$escaped}"
}

arguments() {
  local argument
  for argument in "${train[@]}"; do
    printf '\n                    - %s' "$(literal "$argument")"
  done
}

variables() {
  local variable
  for variable in BALCAP_DISTRIBUTED=1 ${env[@]+"${env[@]}"}; do
    printf '\n                    - name: %s' "$(quoted "${variable%%=*}")"
    printf '\n                      value: %s' "$(literal "${variable#*=}")"
  done
}

# exclusive-topology: one slice is one node pool, so no two slices share one. backoffLimit 0: a lost pod ends its job,
# and the set starts all of them again, since none can go on without the others. Exit status 2 is the trainer's for input
# that is wrong: trying again is no use, so that job fails with a reason of its own, by which the whole set fails.
manifest="$(
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(quoted "$name")
  namespace: $(quoted "$gke_namespace")
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - name: wrongInput
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $gke_slices
      template:
        spec:
          completionMode: Indexed
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [2]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(quoted "$gke_accelerator")
                cloud.google.com/gke-tpu-topology: $(quoted "$gke_topology")$selector
              tolerations:
                - key: google.com/tpu
                  operator: Exists
                  effect: NoSchedule
              containers:
                - name: train
                  image: $(quoted "$gke_image")
                  workingDir: /balcap_jax
                  command: [bash, launch/stoppable.sh, python, -m, balcap_jax.train]
                  args:$(arguments)
                  env:$(variables)
                  ports:
                    - containerPort: 8471
                    - containerPort: 8482
                    - containerPort: 8080
                  resources:
                    requests:
                      google.com/tpu: $gke_chips_per_host
                    limits:
                      google.com/tpu: $gke_chips_per_host
                  volumeMounts:
                    - name: workdir
                      mountPath: $(quoted "$mount_at")
              volumes:
                - name: workdir
                  persistentVolumeClaim:
                    claimName: $(quoted "$gke_claim")
END
)"

command=(kubectl apply -f -)
if given --validate; then
  command=(kubectl apply --dry-run=server --validate=strict -f -)
fi
if [[ "$dry_run" == yes ]]; then
  printf "%s <<'END'\n%s\nEND\n" "$(shown "${command[@]}")" "$manifest"
else
  "${command[@]}" <<<"$manifest"
fi

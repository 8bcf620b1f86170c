"""The launch scripts of clusters: what they print, ask for and refuse. tests/system/test_pods.py trains with them."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fake_cloud import FLAGS, WIDE, Cloud

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
TPU_SCRIPTS = ["tpu_create.sh", "tpu_setup.sh", "tpu_run.sh", "tpu_resume.sh", "tpu_delete.sh"]
ENTRIES = [*TPU_SCRIPTS, "tpu_worker.sh", "stoppable.sh", "gpu_slurm.sh", "gke/jobset.sh"]
EXAMPLE = (LAUNCH / "tpu.conf.example").read_text()


@pytest.fixture
def cloud(tmp_path):
    return Cloud.make(tmp_path / "cloud")


def configured(folder: Path, **changes: str | None) -> Path:
    """The example configuration with other values, None leaving a key out; new keys are appended."""
    text = EXAMPLE + "\nbackoff = 0\npoll_seconds = 1\n"
    for key, value in changes.items():
        line = "" if value is None else f"{key} = {value}"
        text, found = re.subn(rf"^{key} = .*$", lambda _, line=line: line, text, flags=re.MULTILINE)
        text += "" if found else f"\n{line}"
    path = folder / "my tpu.conf"
    path.write_text(text)
    return path


def run(script: str, *arguments: str | Path, environment: dict[str, str] | None = None, **options):
    return subprocess.run(
        ["bash", str(LAUNCH / script), *map(str, arguments)],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def printed(script: str, conf: Path, *flags: str) -> list[list[str]]:
    """The words of each command of a dry run, which must need neither gcloud nor kubectl."""
    done = run(
        script, f"--config={conf}", "--dry_run", *flags, environment={"PATH": without("gcloud", "kubectl", at=conf)}
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def without(*programs: str, at: Path) -> str:
    """A PATH with what the scripts need, but without some programs, wherever this machine has them."""
    folder = at.parent / "only these"
    if not folder.exists():
        folder.mkdir()
        for name in ("bash", "dirname", "sed", "grep", "tar", "rm", "cat", "mktemp", "sleep", "tail", "tee"):
            (folder / name).symlink_to(shutil.which(name))
    assert not any((folder / program).exists() for program in programs)
    return str(folder)


def refused(script: str, *arguments: str | Path, **options) -> str:
    """The one line on stderr that a script ends with on bad input."""
    done = run(script, *arguments, **options)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# ---- the scripts as files -------------------------------------------------------------------------------------------


def test_shellcheck_has_no_findings():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [f"launch/{name}" for name in ["tpu.sh", *ENTRIES]]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""


@pytest.mark.parametrize("script", ENTRIES)
def test_scripts_are_strict_and_executable(script):
    assert os.access(LAUNCH / script, os.X_OK)
    assert "\nset -euo pipefail\n" in (LAUNCH / script).read_text()


@pytest.mark.parametrize("script", [*TPU_SCRIPTS, "gke/jobset.sh"])
def test_help_shows_the_usage_of_the_script(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert f"bash launch/{script} [--config=FILE]" in done.stdout
    assert "set -e" not in done.stdout


def test_the_document_explains_every_key_of_the_example_and_the_scripts_know_them(tmp_path):
    keys = set(re.findall(r"^(?:# )?([a-z_]+) = ", EXAMPLE, re.MULTILINE))
    explained = set(re.findall(r"^\| `([a-z_]+)`", (ROOT / "docs" / "pods.md").read_text(), re.MULTILINE))
    assert explained == keys
    conf = tmp_path / "tpu.conf"
    conf.write_text(re.sub(r"^# ([a-z_]+ = )", r"\1", EXAMPLE, flags=re.MULTILINE))
    assert printed("tpu_delete.sh", conf)


# ---- dry runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue", ["yes", "no"])
@pytest.mark.parametrize("script", TPU_SCRIPTS)
def test_a_dry_run_prints_complete_commands_and_does_nothing(tmp_path, script, queue):
    commands = printed(script, configured(tmp_path, queue=queue))
    assert commands
    for command in commands:
        if command[0] != "gcloud":
            assert command[0] in ("tar", "rm")
            continue
        assert command[1:3] == ["compute", "tpus"]
        allowed = FLAGS[" ".join(command[3:5])] | WIDE
        assert {word.partition("=")[0] for word in command[5:] if word.startswith("--")} <= allowed
        assert {"--zone=us-west4-a", "--project=my-project"} <= set(command)
    assert not list(tmp_path.glob("*.tgz"))


def test_creation_asks_for_what_the_configuration_says(tmp_path):
    (queued,) = printed("tpu_create.sh", configured(tmp_path, create_flag="--network=my net"))
    assert queued[3:6] == ["queued-resources", "create", "balcap"]
    assert set(queued[6:]) == {
        "--node-id=balcap",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--valid-until-duration=360m",
        "--spot",
        "--network=my net",
        "--zone=us-west4-a",
        "--project=my-project",
    }
    (direct,) = printed("tpu_create.sh", configured(tmp_path, queue="no", provisioning="on-demand"))
    assert direct[3:6] == ["tpu-vm", "create", "balcap"]
    assert set(direct[6:]) == {
        "--accelerator-type=v5litepod-16",
        "--version=v2-alpha-tpuv5-lite",
        "--zone=us-west4-a",
        "--project=my-project",
    }
    for provisioning in ("reserved", "preemptible"):
        (command,) = printed("tpu_create.sh", configured(tmp_path, queue="no", provisioning=provisioning))
        assert f"--{provisioning}" in command


def test_all_workers_get_the_same_training_command_word_for_word(tmp_path):
    conf = configured(tmp_path, env="NOTE=it's $HOME", train="--config=a b.py")
    conf.write_text(conf.read_text() + "\ntrain = --workdir=/mnt/balcap/x y\n")
    (command,) = printed("tpu_run.sh", conf)
    assert "--worker=all" in command
    (remote,) = [word.removeprefix("--command=") for word in command if word.startswith("--command=")]
    words = shlex.split(remote)
    assert words[:4] == ["bash", "balcap_jax/launch/tpu_worker.sh", "start", "/mnt/balcap/logs"]
    assert words[4:7] == ["BALCAP_DISTRIBUTED=1", "NOTE=it's $HOME", "--"]
    assert words[7] == "--config=a b.py"
    assert words[-1] == "--workdir=/mnt/balcap/x y"
    attached = printed("tpu_run.sh", conf, "--attach")
    assert attached[0] == command
    assert {"--worker=0", "--command=bash balcap_jax/launch/tpu_worker.sh follow"} <= set(attached[1])


def test_a_tunnel_is_for_all_workers_at_a_time(tmp_path):
    (command,) = printed("tpu_run.sh", configured(tmp_path, ssh="iap"), "--stop")
    assert command[:6] == ["gcloud", "alpha", "compute", "tpus", "tpu-vm", "ssh"]
    assert {"--tunnel-through-iap", "--batch-size=all", "--worker=all"} <= set(command)
    (command,) = printed("tpu_run.sh", configured(tmp_path, ssh="internal"), "--status")
    assert "--internal-ip" in command


def test_resume_creates_sets_up_and_runs_what_the_single_scripts_do(tmp_path):
    conf = configured(tmp_path)
    steps = ("tpu_delete.sh", "tpu_create.sh", "tpu_setup.sh", "tpu_run.sh")
    assert printed("tpu_resume.sh", conf) == [command for script in steps for command in printed(script, conf)]


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_a_missing_configuration_file(tmp_path):
    assert "no configuration file" in refused("tpu_create.sh", f"--config={tmp_path}/none.conf")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"zome": "us-west4-a"}, "unknown key zome"),
        ({"project": None}, "project is not set"),
        ({"zone": ""}, "zone is not set"),
        ({"accelerator": None}, "accelerator is not set"),
        ({"provisioning": "cheap"}, "provisioning = cheap is none of: on-demand spot reserved preemptible"),
        ({"provisioning": "preemptible"}, "queued resources know spot"),
        ({"attempts": "many"}, "attempts = many is not a whole number"),
        ({"attempts": "08"}, "attempts = 08 is not a whole number"),
        ({"wait_minutes": "08"}, "wait_minutes = 08 is not a whole number"),
        ({"restarts": "9" * 20}, "is not a whole number (nine digits at most"),
        ({"attempts": "0"}, "attempts = 0 must be at least 1"),
        ({"poll_seconds": "0"}, "poll_seconds = 0 must be at least 1"),
        ({"name": "a" * 64}, "at most 63"),
        ({"mount": "/mnt/disk"}, "mount = /mnt/disk is none of"),
        ({"name": "My TPU"}, "name = 'My TPU'"),
        ({"env": "A B"}, "not of the form VARIABLE=VALUE"),
    ],
)
def test_a_bad_configuration_is_answered_with_one_line(tmp_path, cloud, changes, said):
    conf = configured(tmp_path, **changes)
    assert said in refused("tpu_create.sh", f"--config={conf}", environment=cloud.environment())
    assert cloud.calls("create") == []


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("--workdir=s3://bucket/run", "must be gs://BUCKET/FOLDER, or an absolute path"),
        ("--workdir=gs://bucket", "must be gs://BUCKET/FOLDER, or an absolute path"),
        ("--workdir=runs/x", "must be gs://BUCKET/FOLDER, or an absolute path"),
        ("--workdir=/home/me/run", "is not under mount_at = /mnt/balcap"),
        ("--workdir=/mnt/balcap/../../tmp/x", "goes up by '..'"),
        ("--workdir=/mnt/balcap/..", "goes up by '..'"),
        ("--config.seed=1", "no line train = --config=RECIPE"),
    ],
)
def test_a_workdir_that_would_not_outlive_the_machines_is_refused(tmp_path, cloud, train, said):
    conf = configured(tmp_path, train=train)
    if "workdir" in train:
        conf.write_text(conf.read_text() + "\ntrain = --config=configs/scenes.py\n")
    for script in ("tpu_run.sh", "tpu_resume.sh"):
        assert said in refused(script, f"--config={conf}", environment=cloud.environment())


def test_a_line_that_is_no_setting_is_named_by_its_number(tmp_path):
    conf = tmp_path / "tpu.conf"
    conf.write_text("# mine\nname balcap\n")
    assert f"{conf}:2: 'name balcap'" in refused("tpu_run.sh", f"--config={conf}")


def test_an_unknown_argument(tmp_path):
    assert "unknown argument --watch" in refused("tpu_run.sh", "--watch")


@pytest.mark.parametrize(("script", "program"), [("tpu_create.sh", "gcloud"), ("gke/jobset.sh", "kubectl")])
def test_a_missing_program_is_named(tmp_path, script, program):
    conf = configured(tmp_path)
    line = refused(script, f"--config={conf}", environment={"PATH": without(program, at=conf)})
    assert f"{program} is not on the PATH" in line


# ---- creation -------------------------------------------------------------------------------------------------------


def create(tmp_path, cloud, **changes: str):
    conf = configured(tmp_path, accelerator="v4-16", **changes)
    return run("tpu_create.sh", f"--config={conf}", environment=cloud.environment())


def test_lack_of_capacity_is_tried_again_with_growing_pauses_up_to_a_bound(tmp_path, cloud):
    (tmp_path / "cloud" / "bin" / "sleep").write_text('#!/bin/bash\necho "$1" >> "$FAKE_CLOUD/pauses"\n')
    (tmp_path / "cloud" / "bin" / "sleep").chmod(0o755)
    cloud.comes_to(*["capacity"] * 9)
    done = create(tmp_path, cloud, queue="no", attempts="8", backoff="30")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: no TPU after 8 attempts")
    assert len(cloud.calls("tpu-vm create")) == 8
    pauses = (tmp_path / "cloud" / "pauses").read_text().split()
    assert pauses[:7] == ["30", "60", "120", "240", "480", "600", "600"]


@pytest.mark.parametrize("outcome", ["quota", "denied"])
def test_what_will_not_pass_is_not_tried_again(tmp_path, cloud, outcome):
    cloud.comes_to(outcome)
    done = create(tmp_path, cloud, queue="no")
    assert done.returncode == 2
    assert "gcloud refused" in done.stderr.splitlines()[-1]
    assert len(cloud.calls("tpu-vm create")) == 1


def test_a_request_waits_in_the_queue_and_one_that_failed_is_made_again(tmp_path, cloud):
    cloud.comes_to("failed", "queued")
    done = create(tmp_path, cloud)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "balcap is ready"
    assert "waiting for balcap" in done.stdout
    assert len(cloud.calls("queued-resources create")) == 2
    assert len(cloud.calls("queued-resources delete")) == 1
    again = create(tmp_path, cloud)
    assert again.stdout == "balcap is ready\n"
    assert len(cloud.calls("queued-resources create")) == 2


def test_waiting_in_the_queue_has_an_end(tmp_path, cloud):
    cloud.comes_to("queued")
    done = create(tmp_path, cloud, wait_minutes="0")
    assert done.returncode == 2
    assert "still not there after 0 minutes" in done.stderr


def test_an_answer_that_got_lost_does_not_end_the_waiting(tmp_path, cloud):
    gcloud = tmp_path / "cloud" / "bin" / "gcloud"
    lost = 'if [[ "$*" == *describe* && ! -e "$0.lost" ]]; then touch "$0.lost"; echo UNAVAILABLE >&2; exit 1; fi\n'
    gcloud.write_text(gcloud.read_text().replace("exec", lost + "exec"))
    assert create(tmp_path, cloud, queue="no").returncode == 0
    gcloud.write_text("#!/bin/bash\necho 'ERROR: PERMISSION_DENIED: log in first' >&2; exit 1\n")
    done = create(tmp_path, cloud, queue="no")
    assert (done.returncode, done.stderr) == (
        2,
        "error: gcloud cannot describe balcap: ERROR: PERMISSION_DENIED: log in first\n",
    )


def test_a_request_whose_machines_were_deleted_is_made_again(tmp_path, cloud):
    create(tmp_path, cloud)
    cloud.save(request="ACTIVE", node=None, workers=2)
    done = create(tmp_path, cloud)
    assert done.returncode == 0, done.stderr
    assert len(cloud.calls("queued-resources create")) == 2


# ---- a worker -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mount", "mounted"),
    [
        (
            "nfs://10.0.0.2/vol/a",
            "sudo mount -t nfs -o vers=3,hard,nolock,actimeo=1,lookupcache=positive 10.0.0.2:/vol/a /mnt/x",
        ),
        (
            "gs://bucket",
            "gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 "
            "--metadata-cache-negative-ttl-secs=0 bucket /mnt/x",
        ),
    ],
)
def test_setup_runs_the_commands_mounts_and_installs_once(tmp_path, cloud, mount, mounted):
    conf = configured(tmp_path, accelerator="v4-8", mount=mount, mount_at="/mnt/x", setup_command="date > 'a b'")
    run("tpu_create.sh", f"--config={conf}", environment=cloud.environment())
    (home,) = cloud.homes()
    for name, status in (("sudo", 0), ("mountpoint", 1), ("mount.nfs", 0), ("gcsfuse", 0)):
        (home / "bin" / name).write_text(f'#!/bin/bash\necho "${{0##*/}} $*" >> "$HOME/did"; exit {status}\n')
        (home / "bin" / name).chmod(0o755)
    for _ in range(2):
        done = run("tpu_setup.sh", f"--config={conf}", environment=cloud.environment())
        assert done.returncode == 0, done.stderr
        assert "t1v-n-fake-w-0 is set up" in done.stdout
        assert (home / "a b").exists()
        assert mounted in (home / "did").read_text().splitlines()
        (home / "balcap_jax" / "balcap_jax" / "gone.py").touch()
    assert (home / "pip.log").read_text().count("install") == 1
    assert (home / "pip.log").read_text().rstrip().endswith("balcap_jax[tpu]")
    run("tpu_setup.sh", f"--config={conf}", environment=cloud.environment())
    assert not (home / "balcap_jax" / "balcap_jax" / "gone.py").exists()
    assert (home / "balcap_jax" / "balcap_jax" / "train.py").exists()


def test_a_failing_setup_command_and_a_worker_that_is_not_set_up(tmp_path, cloud):
    conf = configured(tmp_path, accelerator="v4-16", mount="none", setup_command="false")
    run("tpu_create.sh", f"--config={conf}", environment=cloud.environment())
    done = run("tpu_setup.sh", f"--config={conf}", environment=cloud.environment())
    assert done.returncode == 2
    assert "error: on t1v-n-fake-w-1: 'false' failed" in done.stderr
    done = run("tpu_run.sh", f"--config={conf}", environment=cloud.environment())
    assert done.returncode == 2
    assert "error: t1v-n-fake-w-0 is not set up; run tpu_setup.sh" in done.stderr
    done = run("tpu_run.sh", f"--config={conf}", "--status", environment=cloud.environment())
    assert sorted(done.stdout.splitlines()) == ["t1v-n-fake-w-0: idle", "t1v-n-fake-w-1: idle"]


# ---- one process of a job -------------------------------------------------------------------------------------------


def stoppable(tmp_path, program: str) -> subprocess.Popen:
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "stoppable.sh"), "bash", "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    while "sleep" in program and not (tmp_path / "ready").exists():
        time.sleep(0.02)
    return process


def test_stoppable_wants_a_command():
    assert "usage: bash launch/stoppable.sh COMMAND" in refused("stoppable.sh")


SAVES = "trap 'sleep 0.3; echo saved; exit {}' TERM; touch ready; while true; do sleep 0.05; done"


@pytest.mark.parametrize(("status", "seen"), [(0, 0), (2, 2), (134, 134)])
def test_without_a_signal_the_trainers_status_is_passed_on(tmp_path, status, seen):
    assert stoppable(tmp_path, f"exit {status}").wait(20) == seen


@pytest.mark.parametrize(("status", "seen"), [(0, 75), (2, 2)])
def test_a_trainer_that_was_stopped_is_not_taken_for_a_finished_one(tmp_path, status, seen):
    process = stoppable(tmp_path, SAVES.format(status))
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # To the process and to its group, as systemd and Slurm do it.
    output, _ = process.communicate(timeout=20)
    assert (output, process.returncode) == ("saved\n", seen)


# ---- GKE ------------------------------------------------------------------------------------------------------------


def manifest(conf: Path) -> dict:
    yaml = pytest.importorskip("yaml")
    done = run("gke/jobset.sh", f"--config={conf}", "--dry_run")
    assert (done.returncode, done.stderr) == (0, "")
    command, *lines, end = done.stdout.splitlines()
    assert (command, end) == ("kubectl apply -f - <<'END'", "END")
    return yaml.safe_load("\n".join(lines))


def test_the_jobset_has_a_pod_per_host_and_the_command_word_for_word(tmp_path):
    conf = configured(tmp_path, gke_topology="2x2x4", gke_slices="2", env='NOTE="a\\b": c', restarts="7")
    jobset = manifest(conf)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x4"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    (container,) = pod["containers"]
    assert container["command"] == ["bash", "launch/stoppable.sh", "python", "-m", "balcap_jax.train"]
    assert container["args"] == re.findall(r"^train = (.*)$", conf.read_text(), re.MULTILINE)
    assert container["env"] == [
        {"name": "BALCAP_DISTRIBUTED", "value": "1"},
        {"name": "NOTE", "value": '"a\\b": c'},
    ]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    assert container["volumeMounts"][0]["mountPath"] == "/mnt/balcap"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "balcap-workdir"


def test_a_wrong_command_fails_the_set_instead_of_starting_it_again(tmp_path):
    jobset = manifest(configured(tmp_path))["spec"]
    (rule,) = jobset["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job = jobset["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}


def test_whatever_the_settings_hold_is_a_string_in_the_manifest(tmp_path):
    settings = {
        "name": "true",
        "gke_namespace": "12",
        "gke_image": "a: b # c",
        "gke_claim": "null",
        "gke_accelerator": "[x",
        "env": "y=1",
    }
    jobset = manifest(configured(tmp_path, **settings))
    assert jobset["metadata"]["name"] == "true"
    assert jobset["metadata"]["namespace"] == "12"
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "a: b # c"
    assert pod["containers"][0]["env"][1] == {"name": "y", "value": "1"}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "null"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "[x"


def expanded(text: str) -> str:
    """What Kubernetes makes of an argument: $$ is $, $(NAME) is replaced."""
    return re.sub(r"\$(\$|\(\w+\))", lambda found: "$" if found[1] == "$" else "replaced", text)


@pytest.mark.parametrize("text", ["$(HOME)", "$$(HOME)", "$HOME", "5$", "$$$"])
def test_kubernetes_leaves_arguments_and_variables_as_they_stand(tmp_path, text):
    conf = configured(tmp_path, env=f"NOTE={text}")
    conf.write_text(conf.read_text() + f"\ntrain = --workdir=/mnt/balcap/{text}\n")
    pod = manifest(conf)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert expanded(pod["containers"][0]["args"][-1]) == f"--workdir=/mnt/balcap/{text}"
    assert expanded(pod["containers"][0]["env"][1]["value"]) == text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gke_topology": "4by4"}, "gke_topology = 4by4 is not like"),
        ({"gke_topology": "1x1"}, "has 1 chips"),
        ({"gke_topology": "08x4"}, "gke_topology = 08x4 is not like"),
        ({"gke_topology": "0x4"}, "gke_topology = 0x4 is not like"),
        ({"gke_chips_per_host": "08"}, "gke_chips_per_host = 08 is not a whole number"),
        ({"gke_chips_per_host": "0"}, "gke_chips_per_host = 0 must be at least 1"),
        ({"gke_slices": "0"}, "gke_slices = 0 must be at least 1"),
        ({"name": "a" * 41}, "at most 40"),
        ({"gke_claim": None}, "gke_claim is not set"),
        ({"provisioning": "reserved"}, "on GKE the node pool says so"),
    ],
)
def test_a_jobset_that_cannot_be(tmp_path, changes, said):
    assert said in refused("gke/jobset.sh", f"--config={configured(tmp_path, **changes)}", "--dry_run")


def test_kubectl_gets_the_manifest(tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/bash\necho "$@" > "${0%/*}/call"; cat > "${0%/*}/stdin"\n')
    kubectl.chmod(0o755)
    conf, environment = configured(tmp_path), {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    for flags, call in (
        ([], "apply -f -"),
        (["--validate"], "apply --dry-run=server --validate=strict -f -"),
        (["--delete"], "delete jobset balcap --namespace=default"),
    ):
        assert run("gke/jobset.sh", f"--config={conf}", *flags, environment=environment).returncode == 0
        assert (tmp_path / "call").read_text().strip() == call
        assert ("kind: JobSet" in (tmp_path / "stdin").read_text()) == ("--delete" not in flags)


# ---- Slurm ----------------------------------------------------------------------------------------------------------


def slurm(tmp_path, status: int, **environment: str):
    """The batch script as Slurm runs it: a copy elsewhere, with srun ending as its tasks do."""
    tmp_path.mkdir(exist_ok=True)
    submitted, programs = tmp_path / "repository", tmp_path / "programs"
    (submitted / ".venv" / "bin").mkdir(parents=True)
    (submitted / "launch").mkdir()
    programs.mkdir()
    shutil.copy(LAUNCH / "gpu_slurm.sh", tmp_path / "slurm_script")
    shutil.copy(LAUNCH / "stoppable.sh", submitted / "launch")
    scripts = {
        programs / "srun": f'printf "%s\\n" "$BALCAP_DISTRIBUTED" "$@" > {tmp_path}/step; exit {status}',
        programs / "scontrol": f'echo "$@" > {tmp_path}/scontrol',
        submitted / ".venv" / "bin" / "python": "",
    }
    for path, text in scripts.items():
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    return subprocess.run(
        ["bash", str(tmp_path / "slurm_script"), "--config=a.py", "--workdir=/shared/a b"],
        env={
            "PATH": f"{programs}:/usr/bin:/bin",
            "SLURM_JOB_ID": "17",
            "SLURM_SUBMIT_DIR": str(submitted),
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_NTASKS_PER_NODE": "8",
        }
        | environment,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_slurm_starts_the_command_in_every_task_and_ends_with_it(tmp_path):
    done = slurm(tmp_path, 0)
    assert done.returncode == 0, done.stderr
    distributed, *words = (tmp_path / "step").read_text().splitlines()
    assert distributed == "1"
    command = ["bash", "launch/stoppable.sh", ".venv/bin/python", "-m", "balcap_jax.train"]
    assert words[-7:] == [*command, "--config=a.py", "--workdir=/shared/a b"]
    assert not [word for word in words if word.startswith("--cpus-per-task")]
    assert not (tmp_path / "scontrol").exists()


def test_slurm_gives_every_process_the_cpus_that_the_job_asked_for(tmp_path):
    assert slurm(tmp_path, 0, SLURM_CPUS_PER_TASK="6").returncode == 0
    words = (tmp_path / "step").read_text().splitlines()
    assert "--cpus-per-task=6" in words[: words.index("bash")]


def test_slurm_queues_again_after_a_stop_but_not_for_ever_nor_after_an_error(tmp_path):
    assert slurm(tmp_path / "stopped", 75).returncode == 0
    assert (tmp_path / "stopped" / "scontrol").read_text() == "requeue 17\n"
    for folder, status, more in (("often", 75, {"SLURM_RESTART_COUNT": "100"}), ("failed", 2, {})):
        done = slurm(tmp_path / folder, status, **more)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert not (tmp_path / folder / "scontrol").exists()


def test_slurm_wants_a_task_per_gpu(tmp_path):
    done = slurm(tmp_path, 0, SLURM_NTASKS_PER_NODE="1")
    assert done.returncode == 2
    assert "1 tasks for 8 GPUs" in done.stderr


def test_slurm_is_asked_for_a_signal_before_the_limit_and_may_requeue():
    directives = re.findall(r"^#SBATCH (\S+)$", (LAUNCH / "gpu_slurm.sh").read_text(), re.MULTILINE)
    assert {"--signal=TERM@300", "--requeue", "--open-mode=append"} <= set(directives)


def test_slurm_dry_run_and_bad_input():
    done = run("gpu_slurm.sh", "--dry_run", "--config=a.py", "--workdir=/shared/a b")
    commands = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    assert commands[0] == ["sbatch", "launch/gpu_slurm.sh", "--config=a.py", "--workdir=/shared/a b"]
    assert commands[1][:3] == ["env", "BALCAP_DISTRIBUTED=1", "srun"]
    assert commands[1][-2:] == ["--config=a.py", "--workdir=/shared/a b"]
    last = run("gpu_slurm.sh", "--config=a.py", "--workdir=/shared/a b", "--dry_run")
    assert (last.returncode, last.stdout) == (0, done.stdout)
    assert "--cpus-per-task=8" in commands[1]
    usage = run("gpu_slurm.sh", "--help")
    assert (usage.returncode, usage.stderr) == (0, "")
    assert "bash launch/gpu_slurm.sh --dry_run" in usage.stdout
    assert "absolute path" in refused("gpu_slurm.sh", "--config=a.py", "--workdir=runs/x")
    assert "not in a Slurm job" in refused("gpu_slurm.sh", "--config=a.py", "--workdir=/x")

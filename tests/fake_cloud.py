"""A cloud on this machine: a `gcloud` whose TPU workers are folders and local processes.

It takes the commands that the launch scripts use, refuses flags that the real ones do not have (by the `--help` of each
release track), and does what they do. Its state is a folder:

    tpu.json          {"request": state or null, "node": state or null, "workers": n}
    outcomes          what the next creations come to: lines of capacity, quota, denied, failed, queued; none: success
    workers/<i>/      home directory of worker i
    trainer           if there, the program that runs in the place of `python -m balcap_jax.train`
    log               every call

Worker i sees BALCAP_COORDINATOR, BALCAP_PROCESS_COUNT and BALCAP_PROCESS_ID, as a TPU's metadata would tell it.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

STATE = "FAKE_CLOUD"
WIDE = {"--zone", "--project", "--quiet", "--format", "--verbosity"}
TIER = {"--spot", "--reserved", "--network", "--subnetwork", "--internal-ips", "--service-account", "--tags", "--async"}
FLAGS = {
    "queued-resources create": TIER
    | {"--node-id", "--accelerator-type", "--runtime-version", "--valid-until-duration", "--guaranteed"},
    "queued-resources describe": set(),
    "queued-resources delete": {"--force", "--async"},
    "tpu-vm create": TIER | {"--accelerator-type", "--version", "--preemptible"},
    "tpu-vm describe": set(),
    "tpu-vm delete": {"--async"},
    "tpu-vm scp": {"--worker", "--recurse", "--compress", "--internal-ip"},
    "tpu-vm ssh": {"--worker", "--command", "--output-directory", "--internal-ip"},
}
REQUIRED = {
    "queued-resources create": {"--node-id", "--accelerator-type", "--runtime-version"},
    "tpu-vm create": {"--version"},
}
REFUSALS = {
    "capacity": "ERROR: (gcloud) RESOURCE_EXHAUSTED: There is no more capacity in the zone",
    "quota": "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV4sPodPerProjectPerZoneForTPUAPI' has been exceeded",
    "denied": "ERROR: (gcloud) PERMISSION_DENIED: Permission 'tpu.nodes.create' denied",
}
# The only interpreter of a worker: makes environments that are this test's own, and installs nothing.
PYTHON = """#!/bin/bash
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") echo "$*" >> "$HOME/pip.log" ;;
  "-m balcap_jax.train")
    [[ ! -x "$FAKE_CLOUD/trainer" ]] || exec "$FAKE_CLOUD/trainer" "${@:3}"
    exec {real} "$@" ;;
  *) exec {real} "$@" ;;
esac
"""


class Cloud:
    def __init__(self, state: Path):
        self.state = state
        self.file = state / "tpu.json"

    # ---- what a test does

    @classmethod
    def make(cls, state: Path) -> "Cloud":
        """An empty cloud, and in `state`/bin a gcloud that leads to it."""
        (state / "bin").mkdir(parents=True)
        gcloud = state / "bin" / "gcloud"
        gcloud.write_text(f'#!/bin/bash\nexec {sys.executable} -S {Path(__file__).resolve()} "$@"\n')
        gcloud.chmod(0o755)
        return cls(state)

    def environment(self) -> dict[str, str]:
        return {STATE: str(self.state), "PATH": f"{self.state / 'bin'}:/usr/bin:/bin"}

    def comes_to(self, *outcomes: str) -> None:
        (self.state / "outcomes").write_text("".join(f"{outcome}\n" for outcome in outcomes))

    def calls(self, command: str) -> list[str]:
        """The flags of each call of a command such as "tpu-vm ssh", in order."""
        log = self.state / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.partition(f" {command} ")[2] for line in lines if f" {command} " in line]

    def tpu(self) -> dict:
        return (
            json.loads(self.file.read_text()) if self.file.exists() else {"request": None, "node": None, "workers": 0}
        )

    def homes(self) -> list[Path]:
        return [self.state / "workers" / str(index) for index in range(self.tpu()["workers"])]

    def preempt(self, *, grace: float, signalled: Callable[[], None] = lambda: None) -> None:
        """Takes the TPU away: SIGTERM to every process, SIGKILL after `grace` seconds, and the disks are gone.

        `signalled` is called once SIGTERM is sent.
        """
        gone = (self.state / "workers").rename(self.state / "gone")  # Nobody can log in while they shut down.
        if grace:
            self._signal(gone, signal.SIGTERM)
            signalled()
            deadline = time.monotonic() + grace
            while self._signal(gone, 0) and time.monotonic() < deadline:
                time.sleep(0.05)
        # Not before: whoever watches has the time to see a ready TPU whose workers do not answer.
        tpu = self.tpu()
        self.save(request=tpu["request"] and "SUSPENDED", node="PREEMPTED", workers=tpu["workers"])
        while self._signal(gone, signal.SIGKILL):
            time.sleep(0.02)
        shutil.rmtree(gone, ignore_errors=True)

    @staticmethod
    def _signal(workers: Path, number: int) -> int:
        """Sends it to the runs of the workers; how many there still are."""
        alive = 0
        for path in workers.glob("*/balcap_job/pid"):
            try:
                os.killpg(int(path.read_text()), number)
                alive += 1
            except ProcessLookupError:
                pass
        return alive

    def save(self, **tpu) -> None:
        aside = self.file.with_suffix(".new")
        aside.write_text(json.dumps(tpu))
        aside.replace(self.file)

    # ---- what gcloud does

    def outcome(self) -> str:
        path = self.state / "outcomes"
        lines = path.read_text().splitlines() if path.exists() else []
        if not lines:
            return "ready"
        self.comes_to(*lines[1:])
        return lines[0]

    def create(self, queued: bool, flags: dict[str, str]) -> int:
        if self.tpu()["request" if queued else "node"] is not None:
            return refuse("ALREADY_EXISTS: Resource already exists")
        outcome = self.outcome()
        if outcome in REFUSALS:
            print(REFUSALS[outcome], file=sys.stderr)
            return 1
        # A v4-N slice has N cores on N / 8 hosts.
        workers = int(flags["--accelerator-type"].removeprefix("v4-")) // 8
        if outcome == "failed":
            self.save(request="FAILED", node=None, workers=workers)
        elif outcome == "queued":
            self.save(request="WAITING_FOR_RESOURCES", node=None, workers=workers)
        else:
            self.become_ready(queued, workers)
        return 0

    def become_ready(self, queued: bool, workers: int) -> None:
        for index in range(workers):
            home = self.state / "workers" / str(index)
            (home / "bin").mkdir(parents=True)
            programs = {
                "python3": PYTHON.replace("{real}", shlex.quote(sys.executable)),
                "hostname": f"#!/bin/bash\necho t1v-n-fake-w-{index}\n",
            }
            for name, text in programs.items():
                (home / "bin" / name).write_text(text)
                (home / "bin" / name).chmod(0o755)
        self.save(request="ACTIVE" if queued else None, node="READY", workers=workers)

    def describe(self, queued: bool) -> int:
        tpu = self.tpu()
        state = tpu["request" if queued else "node"]
        if state is None:
            return refuse("NOT_FOUND: Resource was not found")
        print(state)
        if state == "WAITING_FOR_RESOURCES":
            self.become_ready(True, tpu["workers"])  # The next look finds it there.
        return 0

    def delete(self, queued: bool, flags: dict[str, str]) -> int:
        tpu = self.tpu()
        if tpu["request" if queued else "node"] is None:
            return refuse("NOT_FOUND: Resource was not found")
        if queued and tpu["node"] and "--force" not in flags:
            return refuse("FAILED_PRECONDITION: the request is active; delete its nodes first, or use --force")
        if "--quiet" not in flags:
            return refuse("a question with nobody there to answer it")
        shutil.rmtree(self.state / "workers", ignore_errors=True)
        self.file.unlink()
        return 0

    def chosen(self, worker: str) -> list[tuple[int, Path]]:
        homes = [(index, home) for index, home in enumerate(self.homes()) if home.exists()]
        if not homes:
            print("ssh: connect to host 10.0.0.3 port 22: Connection refused", file=sys.stderr)
            sys.exit(255)
        return homes if worker == "all" else [homes[int(worker)]]

    def scp(self, sources: list[str], target: str, flags: dict[str, str]) -> int:
        for _, home in self.chosen(flags.get("--worker", "0")):
            for source in sources:
                shutil.copy(source, home / target.partition(":")[2])
        return 0

    def ssh(self, flags: dict[str, str]) -> int:
        workers = self.chosen(flags.get("--worker", "0"))
        port = self.state / "port"
        if not port.exists():
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port.write_text(str(probe.getsockname()[1]))
        processes = []
        for index, home in workers:
            environment = os.environ | {"HOME": str(home), "PATH": f"{home / 'bin'}:/usr/bin:/bin"}
            environment["BALCAP_COORDINATOR"] = f"localhost:{port.read_text()}"
            environment["BALCAP_PROCESS_COUNT"] = str(self.tpu()["workers"])
            environment["BALCAP_PROCESS_ID"] = str(index)
            print(f"SSH: Attempting to connect to worker {index}...", file=sys.stderr, flush=True)
            # As sshd does it: the command is one string for the login shell.
            processes.append(
                subprocess.Popen(
                    ["bash", "-c", flags["--command"]], cwd=home, env=environment, stdin=subprocess.DEVNULL
                )
            )
        statuses = [process.wait() for process in processes]
        return next((status for status in statuses if status), 0)


def refuse(message: str) -> int:
    print(f"ERROR: (gcloud.compute.tpus) {message}", file=sys.stderr)
    return 1


def main(arguments: list[str]) -> int:
    cloud = Cloud(Path(os.environ[STATE]))
    with (cloud.state / "log").open("a") as log:
        log.write(" ".join(["gcloud", *arguments]) + "\n")
    alpha = arguments[0] == "alpha"
    if arguments[alpha : alpha + 2] != ["compute", "tpus"]:
        return refuse(f"Invalid choice: {arguments[:3]}")
    group, command, *rest = arguments[alpha + 2 :]
    names = [argument for argument in rest if not argument.startswith("--")]
    flags = {flag: value for flag, _, value in (item.partition("=") for item in rest if item.startswith("--"))}
    what = f"{group} {command}"
    allowed = FLAGS[what] | WIDE | ({"--tunnel-through-iap", "--batch-size"} if alpha else set())
    if unknown := flags.keys() - allowed:
        return refuse(f"unrecognized arguments: {' '.join(unknown)}")
    if missing := (REQUIRED.get(what, set()) | {"--zone", "--project"}) - flags.keys():
        return refuse(f"{' '.join(missing)} must be specified")
    queued = group == "queued-resources"
    match command:
        case "create":
            return cloud.create(queued, flags)
        case "describe":
            return cloud.describe(queued)
        case "delete":
            return cloud.delete(queued, flags)
        case "scp":
            return cloud.scp(names[:-1], names[-1], flags)
        case _:
            return cloud.ssh(flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

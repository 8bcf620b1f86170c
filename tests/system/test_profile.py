"""`log.profile`: traces of some steps, read back with the profiler's own API."""

import re
from collections import Counter
from pathlib import Path

import jax
from command_runs import arguments, finish, start_afresh
from jax.profiler import ProfileData

from balcap_jax.training.progress import PhaseClock, ProfileWindow

PHASES = ("rollout", "judge", "update")
# Scopes that operations of a program must have, in the paths of their names.
SCOPES = {
    "rollout": [
        *("encode", "vision_tower", "projector", "prefill", "decode", "sample"),
        *("embed", "attention", "mlp", "logits"),
    ],
    # The tower is frozen: its tokens are those of the rollout.
    "step": [
        *("advantages", "log_probs", "loss", "gradient", "optimizer", "metrics"),
        *("embed", "attention", "mlp", "logits"),
    ],
}


def trace_file(directory: Path) -> Path:
    (file,) = (directory / "plugins" / "profile").glob("*/*.xplane.pb")
    return file


def events_of(file: Path) -> list:
    profile = ProfileData.from_file(str(file))
    return [event for plane in profile.planes for line in plane.lines for event in line.events]


def steps_of(events: list) -> list[int]:
    return sorted(dict(event.stats)["step_num"] for event in events if event.name == "train")


def scopes_of(file: Path, program: str) -> set[str]:
    """Scopes in the names of a program's operations, such as those of "jit(step)/transpose(jvp(loss))/while/mul".

    The programs' HLO, which the plane /host:metadata holds, is no event: its names are read from the bytes.
    """
    paths = re.findall(rb"jit\(%s\)/([\w()/\[\]., -]+)" % program.encode(), file.read_bytes())
    return {scope for path in paths for scope in re.findall(r"(\w+)\)*/", path.decode())}


def test_two_steps_of_rl_are_traced(tmp_path, data_dir, monkeypatch):
    # A program that another run has compiled need not have these names.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    workdir = tmp_path / "run"
    command = arguments(workdir, data_dir, stages__order="rl", log__profile="3:4", log__tensorboard=False)
    done = finish(start_afresh("balcap_jax.train", *command))
    assert f"profile of the steps 3 to 4: {workdir}/profile\n" in done.stdout
    file = trace_file(workdir / "profile")
    events = events_of(file)
    assert steps_of(events) == [3, 4]
    counts = Counter(event.name for event in events)
    assert [counts[phase] for phase in PHASES] == [2, 2, 2]
    for program, scopes in SCOPES.items():
        assert set(scopes) - scopes_of(file, program) == set(), program


def test_a_window_that_the_run_ends_inside_is_closed(tmp_path):
    lines: list[str] = []
    window = ProfileWindow("2:5", tmp_path, PhaseClock(), say=lines.append)
    for step in (1, 2, 3):
        with window.step(step):
            jax.numpy.ones(3).block_until_ready()
    assert lines == []
    window.close()
    window.close()
    assert lines == [f"profile of the steps 2 to 3: {tmp_path}"]
    assert steps_of(events_of(trace_file(tmp_path))) == [2, 3]


def test_a_run_that_resumes_past_its_window_or_has_none_traces_nothing(tmp_path):
    lines: list[str] = []
    for window, enabled in (("2:3", True), ("", True), ("4:5", False)):
        with ProfileWindow(window, tmp_path, PhaseClock(), enabled=enabled, say=lines.append).step(4):
            pass
    assert lines == []
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_is_one_line_and_the_run_goes_on(tmp_path):
    (tmp_path / "profile").symlink_to(tmp_path / "nowhere" / "else")
    lines: list[str] = []
    window = ProfileWindow("1:1", tmp_path / "profile", PhaseClock(), say=lines.append)
    for step in (1, 2):
        with window.step(step):
            pass
    window.close()
    (line,) = lines
    assert line.startswith(f"no profile in {tmp_path}/profile (")
    assert line.endswith("; the run goes on")

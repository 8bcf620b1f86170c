"""The command `balcap`: starts one of the commands below, in this process, and imports no other.

`balcap train ARGUMENTS` and `python -m balcap_jax.train ARGUMENTS` are the same: the same module, exit status and
reaction to signals.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

import balcap_jax
from balcap_jax.cli.process import end, exit_on_user_error, prepare_import

COMMANDS = {
    "train": "trains a captioner by the stages of a recipe; resumes a stopped run",
    "caption": "captions pictures with a model directory, one JSON line each",
    "evaluate": "scores captions, or a model on a folder of benchmarks",
    "compare": "sets evaluations side by side, with intervals and paired tests",
    "convert": "changes a model directory's type, merges an adapter, or checks it",
    "recaption": "writes references, their units or criteria with a judge model",
    "report": "writes one HTML page about one run, or several side by side",
    "config": "lists every config field; prints a recipe's settings or its text",
    "doctor": "checks a run before its chips are rented",
    "aot": "compiles a recipe for a TPU slice that is not here: does it fit?",
    "ablate": "trains variants of a recipe over seeds and compares them",
}
_FOLDERS = ("ablate", "aot", "config", "doctor", "report")  # commands of several files


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names; the others are its own."""
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if command in ("-h", "--help", "--version"):
        _print(help_text() if command != "--version" else f"balcap {balcap_jax.__version__}")
        return
    if command not in COMMANDS:
        end(_unknown(command))
    prepare_import(command)
    # As with `python -m`, a reward of one's own may lie in the current folder. Last, so that it hides no other module.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    # What the command's own messages call it, see `cli.arguments.called`.
    sys.argv = ["balcap", *rest]
    importlib.import_module(f"balcap_jax.{command}{'.__main__' if command in _FOLDERS else ''}").main(rest)


def help_text() -> str:
    """All commands, one line each; at most 80 columns."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name.ljust(width)}  {about}" for name, about in COMMANDS.items())
    return (
        "usage: balcap COMMAND [ARGUMENTS]\n\n"
        f"Reinforcement learning of image captioners (BalCapRL) in JAX.\n\n{listed}\n\n"
        "`balcap COMMAND --help` lists a command's arguments, `balcap --version` prints\n"
        "the version. `python -m balcap_jax.COMMAND` is the same as `balcap COMMAND`."
    )


def _unknown(command: str) -> str:
    if not command:
        return "name a command (see balcap --help)"
    near = difflib.get_close_matches(command, COMMANDS, 1) if len(command) < 100 else []
    hint = f"did you mean {near[0]}?" if near else "balcap --help lists them"
    return f"there is no command {command!r}; {hint}"


@exit_on_user_error
def _print(text: str) -> None:
    print(text)


if __name__ == "__main__":
    main()

"""One HTML page of one or several runs: `python -m balcap_jax.report --help`."""

import sys
from collections.abc import Sequence

from balcap_jax.cli.arguments import CommandParser, called, place
from balcap_jax.cli.bucket import shown
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.report.page import write_page


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog=called("report"),
        description="Writes one self-contained HTML page about one or several runs, side by side: in the directory of "
        "the one, or as report.html in the current directory about several.",
    )
    parser.add_argument("workdirs", type=place, metavar="D", nargs="+", help="the --workdir of a training run")
    parser.add_argument(
        "--out", type=place, metavar="FILE", help="default: D/report.html; for several runs ./report.html"
    )
    arguments = parser.parse_args(argv)
    path, runs = write_page(arguments.workdirs, arguments.out)
    for run in runs:
        for note in run.notes:
            print(shown(f"note: {run.name}: {note}"), file=sys.stderr)
    print(shown(path))


if __name__ == "__main__":
    main()

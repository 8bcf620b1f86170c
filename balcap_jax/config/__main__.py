"""Prints the fields of a configuration, the settings or the text of a recipe, or the keys of what commands write.

python -m balcap_jax.config                                        the table of all fields
python -m balcap_jax.config --config=scenes:tiny                   the settings of a recipe
python -m balcap_jax.config --source=forkme > my_recipe.py         a recipe to change
python -m balcap_jax.config --outputs                              the keys of metrics.jsonl, summary.json, ...
"""

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from balcap_jax.cli.arguments import CommandParser, called
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.config import outputs
from balcap_jax.config.recipes import add_arguments, leaves, own_files, parse_command_line
from balcap_jax.config.schema import FIELDS

_TYPES = {"ints": "int, ..", "floats": "float, .."}


def table(width: int = 160) -> str:
    """All fields as aligned text: name, type, default, range, meaning (wrapped at `width` characters)."""
    fields = FIELDS.values()
    rows = [(f.name, _TYPES.get(f.kind, f.kind), _show(f.default), f.range_text, f.meaning) for f in fields]
    header = ("field", "type", "default", "range", "meaning")
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(4)]
    indent = sum(widths) + 2 * len(widths)
    lines, group = [], None
    for row in [header, *rows]:
        if row is not header and row[0].rpartition(".")[0] != group:
            group = row[0].rpartition(".")[0]
            lines.append("")
        left = "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=False))
        meaning = textwrap.wrap(row[4], max(30, width - indent))
        lines.append(f"{left}  {meaning[0]}")
        lines += [" " * indent + more for more in meaning[1:]]
    return "\n".join(lines)


def _show(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(_show(entry) for entry in value) or "()"
    if isinstance(value, str):
        return value or '""'
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog=called("config"),
        description="Prints every field of a configuration; with --config, the resolved values of a recipe; with "
        "--source, the text of one of the project's own recipes, to copy; with --outputs, the keys of what is written.",
    )
    add_arguments(parser, required=False)
    parser.add_argument("--outputs", action="store_true", help="print the keys of the files that commands write")
    files = own_files()
    source_help = f"print the text of a recipe of the project: {', '.join(files)}"
    parser.add_argument("--source", metavar="NAME", choices=files, help=source_help)
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not any(argument.startswith("--config") for argument in arguments):
        given = parser.parse_args(arguments)
        if given.outputs and given.source:
            raise UserError("give --outputs or --source, not both")
        if given.outputs:
            print(outputs.text())
            return
        if given.source:
            print(files[given.source].read_text(encoding="utf-8"), end="")
            return
        print(table(max(100, shutil.get_terminal_size((160, 24)).columns)))
        return
    if not any(argument == "--config" or argument.startswith("--config=") for argument in arguments):
        raise UserError("overrides need a recipe: --config=RECIPE")
    config, args = parse_command_line(arguments, parser)
    if args.source or args.outputs:
        raise UserError(f"give --config or --{'source' if args.source else 'outputs'}, not both")
    from balcap_jax import rewards  # Here: the table needs no jax.

    rewards.check_settings(config)
    values = dict(leaves(config))
    for name, field in FIELDS.items():
        changed = f"    (default {_show(field.default)})" if values[name] != field.default else ""
        print(f"{name} = {_show(values[name])}{changed}")


if __name__ == "__main__":
    main()

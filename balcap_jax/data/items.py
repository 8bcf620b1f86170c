"""The pictures that a command works on, whatever they lie in."""

import os
from pathlib import Path

from balcap_jax.cli import storage
from balcap_jax.cli.errors import UserError
from balcap_jax.data.addresses import is_parquet
from balcap_jax.data.listing import Item, list_items


def items_of(
    source: str | os.PathLike,
    prompt: str,
    *,
    columns: str = "",
    texts: bool = False,
    root: str | os.PathLike | None = None,
) -> list[Item]:
    """The pictures of a folder, a JSONL file or parquet files; `prompt` is for those without their own.

    Of a JSONL file and parquet files, `columns` is as `data.columns`. `root` is as of `list_items`. Items of parquet
    files have an `entry` where `texts`.

    Raises:
      UserError: as `list_items` and `parquet.list_rows` do.
    """
    source = Path(source)
    if is_parquet(source):
        storage.refuse(source, "a parquet file")
    if source.is_dir():  # A folder of pictures may hold tables about them.
        try:
            items = list_items(source, prompt)
            if columns:
                raise UserError(f"--columns names fields of JSONL and parquet files, and --images={source} is a folder")
        except UserError:
            if not is_parquet(source):
                raise
            items = []
    else:
        items = [] if is_parquet(source) else list_items(source, prompt, columns=columns, root=root)
    if not items:
        from balcap_jax.data import parquet  # pyarrow takes time to import, and few need it.

        return parquet.list_rows(source, columns, prompt, texts=texts)
    return items

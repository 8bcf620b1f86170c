"""Whether pictures in parquet files are those that lines are about: a line names its picture by the number of a row.

`recaption` writes the hash of a picture beside what it says of it. A file that was sorted, filtered or downloaded anew
has other pictures in the same rows, and so has another file of the same name.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from balcap_jax.cli.bucket import shown
from balcap_jax.cli.errors import UserError
from balcap_jax.data import images
from balcap_jax.data.addresses import address

PICTURE, PIXELS = "picture", "picture_pixels"
"""The fields of a line with the hash of its picture, and the pixels to which it was shrunk before, if not the usual."""
JUDGED_PIXELS = 1_048_576  # that judges see of a picture: hosted models shrink larger ones themselves
_HASH = re.compile("[0-9a-f]{40}")  # as `images.picture_hash` gives it: lines of others may call anything a picture
_COMPARED = 16  # pictures, evenly spaced, of which the first and the last are two: rows that moved show at one end


class Hash(NamedTuple):
    """Of a picture's pixels, after it was shrunk to `pixels`."""

    value: str
    pixels: int


def fields_of(picture: np.ndarray, pixels: int = JUDGED_PIXELS) -> dict[str, Any]:
    """The fields of a line about a picture [height, width, 3] that is shrunk to `pixels` already."""
    usual = pixels == JUDGED_PIXELS
    return {PICTURE: images.picture_hash(picture)} | ({} if usual else {PIXELS: pixels})


def hash_in(entry: Mapping[str, Any]) -> Hash | None:
    """What a line says; None where it says nothing."""
    value, pixels = entry.get(PICTURE), entry.get(PIXELS, JUDGED_PIXELS)
    known = isinstance(value, str) and _HASH.fullmatch(value) and isinstance(pixels, int) and pixels > 0
    return Hash(value, pixels) if known else None


def check(hashes: Mapping[str, Hash], file: Path) -> None:
    """Compares a few of the pictures at addresses in parquet files, {path: what a line of `file` says}.

    Other paths are those of files with names of their own: these are taken at their word, and may be encoded anew.

    Raises:
      UserError: a picture is another one.
    """
    rows = sorted((place, path) for path in hashes if (place := address(path)) and not os.path.lexists(path))
    for at in np.unique(np.linspace(0, len(rows) - 1, _COMPARED).astype(int)) if rows else ():
        path = rows[at][1]
        try:
            picture = images.shrunk(images.read(path), hashes[path].pixels)
        except images.ImageError:
            continue  # It is named when its example is asked for.
        if images.picture_hash(picture) != hashes[path].value:
            raise UserError(
                f"{path} is another picture than the one that {shown(file)} is about: the parquet file has other rows "
                "than it had, or is another one of that name; have `recaption` write these lines anew, or take the "
                f"field {PICTURE!r} out of them if the same pictures were only encoded anew"
            )

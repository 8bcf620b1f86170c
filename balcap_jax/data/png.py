"""PNG files for Pillow, which refuses some for chunks beside their pixels, and halves colours of 16 bits."""

import io
import os
import struct
import zlib
from typing import BinaryIO

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXELS = (b"IHDR", b"PLTE", b"IDAT")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_CHUNKS = (*_PIXELS, *_TEXTS, b"tRNS", b"eXIf", b"IEND")
_ORIENTED = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # keywords of texts that may hold an orientation
_TRANSPARENT_BYTES = {b"\0": 2, b"\2": 6}  # of the transparent colour, by the type of colour
_GREYS = {"L;2": 85, "L;4": 17}  # by which Pillow multiplies pixels of 2 and 4 bits, but not the transparent one
_LONGEST_TEXT = 1 << 24  # bytes that remain of such a text


def stripped(file: BinaryIO, *, complete: bool) -> BinaryIO:
    """The PNG in `file` with nothing but the chunks that make its pixels or turn them, at its beginning.

    As in libpng, a chunk beside the pixels is skipped if its checksum is wrong. If not `complete`, the PNG ends where
    the pixels begin.

    Raises:
      ValueError: the checksum of a chunk that makes the pixels is wrong.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(len(SIGNATURE))
    output, seen, shortest = io.BytesIO(), set(), 0
    output.write(SIGNATURE)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT" and not complete:
            output.write(head)
            break
        if kind not in _CHUNKS:
            file.seek(length + 4, os.SEEK_CUR)
            continue
        data, checksum = file.read(min(length, size - file.tell())), file.read(4)
        wrong = len(checksum) == 4 and int.from_bytes(checksum, "big") != _checksum(kind, data)
        if kind in _PIXELS:
            if wrong:
                raise ValueError(f"the checksum of {kind.decode()} is wrong")
            if len(data) < length:  # The file breaks off here: Pillow finds out whether pixels are missing.
                output.write(head + data)
                break
            if kind == b"IHDR":
                shortest = _TRANSPARENT_BYTES.get(data[9:10], 0)
        elif wrong or len(data) < length or (kind == b"tRNS" and length < shortest):
            continue
        elif kind in _TEXTS:
            keyword = data[: len(max(_ORIENTED, key=len)) + 1].partition(b"\0")[0]
            if keyword not in _ORIENTED or keyword in seen:  # One of each: many small ones can unfold to gigabytes.
                continue
            seen.add(keyword)
            kind, data = _plain_text(kind, data)
        output.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", _checksum(kind, data)))
    output.seek(0)
    return output


def _checksum(kind: bytes, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(kind))


def _plain_text(kind: bytes, data: bytes) -> tuple[bytes, bytes]:
    """A text chunk without compression, with at most _LONGEST_TEXT of its text; a damaged text is empty."""
    keyword, _, text = data.partition(b"\0")
    compressed, between = kind == b"zTXt", b""
    if kind == b"iTXt":
        compressed = text[:1] == b"\1"
        language, _, text = text[2:].partition(b"\0")
        translated, _, text = text.partition(b"\0")
        between = b"\0\0" + language + b"\0" + translated + b"\0"
    elif compressed:
        text = text[1:]
    if compressed:
        try:
            text = zlib.decompressobj().decompress(text, _LONGEST_TEXT)
        except zlib.error:
            text = b""
    return b"iTXt" if between else b"tEXt", keyword + b"\0" + between + text[:_LONGEST_TEXT]


def take_transparency(image: Image.Image) -> np.ndarray | None:
    """The pixels [height, width] of the one colour that a PNG of 16 bits calls transparent; None for other pictures.

    `image` is a `stripped` one that is not loaded yet. It loses that colour, which Pillow compares with 8 bits. One
    of 2 or 4 bits is scaled as the pixels are.
    """
    # Of colours Pillow keeps the high bytes; the low ones are those of the other byte order.
    readings = {"I;16B": ("I;16B",), "RGB;16B": ("RGB;16B", "RGB;16L")}
    raw = image.tile[0].args if image.format == "PNG" and image.tile else None
    if "transparency" in image.info and raw in _GREYS:
        image.info["transparency"] *= _GREYS[raw]
    if raw not in readings or "transparency" not in image.info:
        return None
    colour, exact = image.info.pop("transparency"), 0
    for reading in readings[raw]:
        with Image.open(io.BytesIO(image.fp.getvalue()), formats=("PNG",)) as again:
            again.tile = [tile._replace(args=reading) for tile in again.tile]
            again.load()
            exact = exact << 8 | np.asarray(again).astype(np.uint16)
    return exact == colour if exact.ndim == 2 else (exact == np.asarray(colour)).all(-1)

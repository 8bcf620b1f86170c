"""Pictures of every kind that turns up in the wild: each becomes the right pixels or an error that names the reason."""

import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from balcap_jax.data import images

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(height: int = 40, width: int = 60) -> Image.Image:
    """Red at the top left, green at the top right, blue at the bottom left, white at the bottom right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    top, left = slice(0, height // 2), slice(0, width // 2)
    pixels[:] = WHITE
    pixels[top], pixels[:, left] = GREEN, BLUE
    pixels[top, left] = RED
    return Image.fromarray(pixels)


def corner_colours(picture: np.ndarray) -> list[tuple[int, ...]]:
    """Of the four quarters' middles, row by row."""
    height, width = picture.shape[:2]
    return [tuple(picture[y, x].tolist()) for y in (height // 4, -height // 4) for x in (width // 4, -width // 4)]


def reason(path) -> str:
    with pytest.raises(images.ImageError) as caught:
        images.read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    """Stored as a camera of that orientation stores it, a picture comes back upright."""
    # What a viewer must do for each orientation (EXIF 2.3, tag 274), undone.
    store = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_90],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_270],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = corners()
    for step in store.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    picture = images.read(tmp_path / "a.png")
    assert picture.shape == (40, 60, 3)
    assert corner_colours(picture) == [RED, GREEN, BLUE, WHITE]


def test_damaged_exif_leaves_the_picture_as_it_is(tmp_path):
    corners().save(tmp_path / "a.jpg", exif=b"Exif\x00\x00nonsense", quality=95)
    assert images.read(tmp_path / "a.jpg").shape == (40, 60, 3)


def test_cmyk(tmp_path):
    corners().convert("CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.mode == "CMYK"
    got = np.array(corner_colours(images.read(tmp_path / "a.jpg")))
    assert np.abs(got - [RED, GREEN, BLUE, WHITE]).max() <= 4


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    expected = np.rint(ramp / 257).astype(np.uint8)
    np.testing.assert_array_equal(images.read(tmp_path / f"a.{suffix}"), np.repeat(expected[..., None], 3, -1))


@pytest.mark.parametrize(("top", "white"), [(1.0, 1.0), (255.0, 255.0), (4000.0, 4000.0)])
def test_floating_point_greys(tmp_path, top, white):
    ramp = np.linspace(0, top, 16, dtype=np.float32).reshape(2, 8)
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    np.testing.assert_array_equal(images.read(tmp_path / "a.tiff")[..., 0], np.rint(ramp * (255 / white)))


def test_palette_with_and_without_transparency(tmp_path):
    palette = corners().quantize(4)
    palette.save(tmp_path / "plain.png")
    assert corner_colours(images.read(tmp_path / "plain.png")) == [RED, GREEN, BLUE, WHITE]
    blue = palette.getpixel((0, 39))
    palette.save(tmp_path / "clear.png", transparency=blue)
    assert corner_colours(images.read(tmp_path / "clear.png")) == [RED, GREEN, WHITE, WHITE]


def test_alpha_lies_over_white(tmp_path):
    alpha = np.full((40, 60), 255, np.uint8)
    alpha[:, :30] = 102
    picture = corners().convert("RGBA")
    picture.putalpha(Image.fromarray(alpha))
    picture.save(tmp_path / "a.png")
    expected = [(255, 153, 153), GREEN, (153, 153, 255), WHITE]  # 0.4 colour + 0.6 white
    assert corner_colours(images.read(tmp_path / "a.png")) == expected
    Image.new("LA", (3, 2), (0, 0)).save(tmp_path / "grey.png")
    assert (images.read(tmp_path / "grey.png") == 255).all()


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (20, 10), colour) for colour in (RED, GREEN, BLUE)]
    lossless = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **lossless)
    assert (images.read(tmp_path / f"a.{suffix}") == RED).all()


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_one_pixel(tmp_path, mode):
    Image.new(mode, (1, 1)).save(tmp_path / "a.png")
    assert images.read(tmp_path / "a.png").tolist() == [[[0, 0, 0]]]


def test_a_huge_jpeg_is_shrunk_while_it_is_decoded(tmp_path):
    corners(4000, 6400).save(tmp_path / "a.jpg", quality=90)
    picture = images.read(tmp_path / "a.jpg")
    assert picture.shape == (2000, 3200, 3)
    assert np.abs(np.array(corner_colours(picture)) - [RED, GREEN, BLUE, WHITE]).max() <= 4
    corners(2400, 6400).save(tmp_path / "a.jpg", quality=50)  # half of it would be less than is wanted
    assert images.read(tmp_path / "a.jpg").shape == (2400, 6400, 3)


@pytest.mark.parametrize(
    ("sample_format", "values", "expected"),
    [
        (None, [0, 2**31, 2**32 - 1], [0, 128, 255]),
        (1, [0, 2**31, 2**32 - 1], [0, 128, 255]),
        (2, [0, 2**31, 2**31 - 1], [0, 0, 255]),
    ],
)
def test_tiffs_of_32_bits_have_no_sign_unless_they_say_so(sample_format, values, expected):
    """TIFF 6.0, SampleFormat: the default is 1, unsigned integers."""
    tags = {256: 3, 257: 1, 258: 32, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 12}
    tags |= {339: sample_format} if sample_format else {}
    head = struct.pack("<2sHI3I", b"II", 42, 20, *values)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = head + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert images.read(content)[0, :, 0].tolist() == expected


def test_pillow_does_not_warn_of_what_stands_beside_the_pixels():
    """In a process of its own: tests run under other filters."""
    file = io.BytesIO()
    corners().save(file, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0")
    program = """
import sys
from balcap_jax.cli import process
from balcap_jax.data import images
process.install()
images.read(sys.stdin.buffer.read())
"""
    command = [sys.executable, "-c", program]
    # As commands set it: where PyTorch is not installed, transformers says so on stderr.
    environment = os.environ | {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    options = {"capture_output": True, "cwd": Path(__file__).parents[2], "env": environment}
    done = subprocess.run(command, input=file.getvalue(), **options)
    assert (done.returncode, done.stderr) == (0, b"")


# ---- PNG: what stands beside the pixels


def chunk(kind: bytes, data: bytes, damage: int = 0) -> bytes:
    """A chunk of a PNG; its checksum is wrong by `damage`."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ damage)


RAMP = [65535 * x // 7 for x in range(8)]
RAMP_8 = [0, 36, 73, 109, 146, 182, 219, 255]


def png_of_rows(depth: int, colour: int, row: bytes, extra: bytes = b"", after: bytes = b"", damage: int = 0) -> bytes:
    """8 x 8 pixels of equal rows, with chunks before and after them; `damage` is to the checksum of the pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * 8), damage)
    return b"\x89PNG\r\n\x1a\n" + head + extra + pixels + after + chunk(b"IEND", b"")


@pytest.mark.parametrize("colour", [0, 2])
@pytest.mark.parametrize(("clear", "white"), [(1, None), (RAMP[2], 2), (0, 0), (RAMP[2] ^ 1, None)])
def test_16_bits_with_a_transparent_colour(colour, clear, white):
    """Only pixels of exactly that colour are white, as all others are without the chunk."""
    channels = 3 if colour else 1
    row = struct.pack(f">{8 * channels}H", *np.repeat(RAMP, channels))
    content = png_of_rows(16, colour, row, chunk(b"tRNS", struct.pack(f">{channels}H", *[clear] * channels)))
    expected = [255 if x == white else value for x, value in enumerate(RAMP_8)]
    assert images.read(content)[3].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("place", [0, 1, -2, -1])
def test_greys_of_few_bits_with_a_transparent_one(depth, place):
    values = np.linspace(0, 2**depth - 1, 8).astype(np.uint8)
    bits = np.unpackbits(values[:, None], axis=1)[:, 8 - depth :]
    clear = int(values[place])
    content = png_of_rows(depth, 0, np.packbits(bits).tobytes(), chunk(b"tRNS", struct.pack(">H", clear)))
    expected = np.where(values == clear, 255, values * (255 // (2**depth - 1)))
    np.testing.assert_array_equal(images.read(content)[3], np.repeat(expected[:, None], 3, 1))


@pytest.mark.parametrize(
    ("colour", "row", "length"), [(0, 8, 0), (0, 8, 1), (2, 24, 0), (2, 24, 5), (6, 32, 1), (4, 16, 0)]
)
def test_a_transparent_colour_that_is_cut_short_is_none(colour, row, length):
    row = bytes(range(0, 8 * row, 8))
    with_it = png_of_rows(8, colour, row, chunk(b"tRNS", bytes(length)))
    np.testing.assert_array_equal(images.read(with_it), images.read(png_of_rows(8, colour, row)))


SIDEWAYS = b'<x tiff:Orientation="6"/>'  # to be turned by 90 degrees clockwise
XMP = b"XML:com.adobe.xmp\0"
LONG = bytes(3 << 20)


@pytest.mark.parametrize(
    ("extra", "after", "turned"),
    [
        (chunk(b"zTXt", b"Raw\0\0" + zlib.compress(LONG)), b"", False),
        (chunk(b"iCCP", b"icc\0\0" + zlib.compress(LONG)), b"", False),
        (b"", chunk(b"zTXt", b"Raw\0\0" + zlib.compress(LONG)), False),
        (chunk(b"tEXt", b"Raw\0" + LONG) * 25, b"", False),
        (chunk(b"iTXt", XMP + b"\1\0\0\0" + zlib.compress(SIDEWAYS + LONG)), b"", True),
        (b"", chunk(b"iTXt", XMP + b"\0\0\0\0" + SIDEWAYS), True),
        (chunk(b"iTXt", XMP + b"\0\0\0\0" + SIDEWAYS, damage=1), b"", False),
        (chunk(b"tIME", b"no time", damage=3), chunk(b"tEXt", b"a\0b", damage=1), False),
        (chunk(b"gAMA", b"", damage=1) + chunk(b"pHYs", b"x") + chunk(b"bKGD", b"x", 7), b"", False),
        (chunk(b"tRNS", b"x", damage=1) + chunk(b"eXIf", b"x", 7) + chunk(b"acTL", b"x"), b"", False),
    ],
    ids=[
        "long text",
        "long profile",
        "after",
        "many",
        "long XMP",
        "XMP",
        "wrong XMP",
        "wrong texts",
        "wrong",
        "wrong tRNS",
    ],
)
def test_what_stands_beside_the_pixels_of_a_png_hinders_nothing(extra, after, turned):
    row = bytes(np.repeat(np.arange(8), 3).tolist())
    content = png_of_rows(8, 2, row, extra, after)
    images.check(content)
    expected = np.repeat(np.tile(np.arange(8, dtype=np.uint8), (8, 1))[..., None], 3, -1)
    np.testing.assert_array_equal(images.read(content), np.rot90(expected, -1) if turned else expected)


def test_wrong_checksums_of_pixels_and_pixels_that_are_missing_are_named():
    row = bytes(range(24))
    assert reason(png_of_rows(8, 2, row, damage=1)) == "damaged: the checksum of IDAT is wrong"
    palette = chunk(b"PLTE", bytes(6), damage=1)
    assert reason(png_of_rows(8, 3, bytes(8), palette)) == "damaged: the checksum of PLTE is wrong"
    whole = png_of_rows(8, 2, np.random.default_rng(0).bytes(24))
    assert reason(whole[:60]).startswith("damaged: image file is truncated")
    np.testing.assert_array_equal(images.read(whole[:-14]), images.read(whole))  # Its end alone is missing.


def test_many_texts_that_unfold_take_little_memory():
    bomb = chunk(b"iTXt", XMP + b"\1\0\0\0" + zlib.compress(bytes(1 << 24))) * 30
    tracemalloc.start()
    images.read(png_of_rows(8, 2, bytes(24), bomb))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6


def tiff_of(bits: int, photometric: int, sample_format: int, data: bytes) -> bytes:
    """One row of 8 grey pixels."""
    tags = {256: 8, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data)}
    entries = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in (tags | {339: sample_format}).items()]
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries))
    return head + b"".join(entries) + bytes(4)


@pytest.mark.parametrize(
    ("bits", "photometric", "sample_format", "values", "expected"),
    [
        (16, 1, 1, np.array(RAMP, "<u2"), RAMP_8),
        (16, 0, 1, np.array(RAMP, "<u2"), RAMP_8[::-1]),  # from white to black
        (8, 0, 1, np.array(RAMP_8, "u1"), RAMP_8[::-1]),
        (32, 1, 1, np.array(RAMP, "<u4") * 65537, RAMP_8),  # beyond 2**31
        (32, 0, 3, np.array(RAMP, "<f4") / 65535, RAMP_8[::-1]),
        (32, 1, 3, np.array([0, 0.2, 0.4, 1, np.inf, -np.inf, np.nan, -1], "<f4"), [0, 51, 102, 255, 255, 0, 0, 0]),
    ],
)
def test_greys_of_a_tiff(bits, photometric, sample_format, values, expected):
    picture = images.read(tiff_of(bits, photometric, sample_format, values.tobytes()))
    assert picture[0, :, 0].tolist() == expected


# ---- what is refused


def test_a_truncated_jpeg(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as TensorFlow Datasets leaves it
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    assert reason(tmp_path / "a.jpg").startswith("damaged: image file is truncated")


def test_a_damaged_png(tmp_path):
    buffer = io.BytesIO()
    corners().save(buffer, "PNG")
    damaged = bytearray(buffer.getvalue())
    at = damaged.index(b"IDAT") + 4
    damaged[at : at + 2] = b"\xff\xff"  # no zlib stream begins like this
    (tmp_path / "a.png").write_bytes(damaged)
    assert reason(tmp_path / "a.png").startswith("damaged: ")


@pytest.mark.parametrize("content", [b"", b"this is no picture\n", b"\xff\xd8\xff\xe0", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_picture(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    assert reason(tmp_path / "a.jpg").startswith("no picture in a known format (JPEG, PNG")


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims to be of that size, with next to no data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_460, 20_000, 100_000])  # Pillow is silent, warns and refuses
def test_a_decompression_bomb(tmp_path, side):
    (tmp_path / "a.png").write_bytes(png_of(side, side))
    assert reason(tmp_path / "a.png").startswith("too large: ")


def test_what_is_no_file(tmp_path):
    assert reason(tmp_path / "none.jpg") == "no such file"
    assert reason(tmp_path) == "no regular file"
    (tmp_path / "link.jpg").symlink_to("gone.jpg")
    assert reason(tmp_path / "link.jpg") == "a broken link"

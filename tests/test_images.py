"""Pictures of every kind that turns up in the wild: each becomes the right pixels or an error that names the reason."""

import io
import struct
import zlib

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

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

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

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from trainer.data import DataSpec
from trainer.errors import InputError
from trainer.images import Preprocessing, fit_image
from trainer.prediction import Picture, read_pictures

Array = NDArray[Any]
HEIGHT, WIDTH = 6, 5
RANDOM = np.random.RandomState(0)
GREY = RANDOM.randint(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
COLOUR = RANDOM.randint(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
CLEAR = RANDOM.randint(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
CLEAR[:3, :, 3] = [[0], [255], [51]]  # a transparent row, an opaque row, a row with alpha 0.2


def of_shape(channels: int, height: int = HEIGHT, width: int = WIDTH) -> DataSpec:
    return DataSpec(
        name="any",
        version="1",
        image_shape=(height, width, channels),
        class_names=("a", "b"),
        train=1,
        validation=1,
        test=1,
        fingerprint="",
        origin="",
    )


def encoded(pixels: Array | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def stored(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png_that_declares(width: int, height: int) -> bytes:
    """Returns a grey PNG of a few bytes with any size in its header."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(10))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def npy_with_header(header: str, major: int = 1) -> bytes:
    text = header.encode() + b"\n"
    size = struct.pack("<H" if major == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([major, 0]) + size + text + GREY.tobytes()


Read = Callable[..., Picture]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Returns a function that writes a file and reads its only picture."""

    def read(content: bytes, name: str = "a.png", channels: int = 1, **options: Any) -> Picture:
        (tmp_path / name).write_bytes(content)
        (picture,) = read_pictures(tmp_path / name, of_shape(channels), **options)
        assert picture.source == str(tmp_path / name)
        assert picture.pixels.dtype == np.uint8
        assert picture.pixels.shape == (HEIGHT, WIDTH, channels)
        return picture

    return read


@pytest.mark.parametrize("pixels", [GREY[..., np.newaxis], COLOUR, CLEAR], ids=["1", "3", "4"])
def test_what_fits_is_taken_bit_for_bit(read: Read, pixels: Array) -> None:
    channels = pixels.shape[-1]
    picture = read(encoded(pixels.squeeze()), channels=channels)
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert picture.converted == ""
    picture = read(stored(pixels), "a.npy", channels)
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert picture.converted == ""


def test_colour_becomes_grey_and_grey_colour(read: Read) -> None:
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, like Pillow's convert
    picture = read(encoded(COLOUR))
    np.testing.assert_allclose(picture.pixels[..., 0], luma, atol=1)
    assert picture.converted == "6x5 RGB to 6x5 L"
    picture = read(encoded(GREY), channels=3)
    np.testing.assert_array_equal(picture.pixels, np.stack([GREY] * 3, axis=-1))
    assert picture.converted == "6x5 L to 6x5 RGB"
    picture = read(encoded(COLOUR), channels=4)
    np.testing.assert_array_equal(picture.pixels[..., :3], COLOUR)
    assert (picture.pixels[..., 3] == 255).all()
    assert picture.converted == "6x5 RGB to 6x5 RGBA"


def test_what_is_transparent_becomes_white_paper(read: Read) -> None:
    share = CLEAR[..., 3:] / 255
    expected = CLEAR[..., :3] * share + 255 * (1 - share)
    picture = read(encoded(CLEAR), channels=3)
    np.testing.assert_allclose(picture.pixels, expected, atol=1)
    assert (picture.pixels[0] == 255).all()
    np.testing.assert_array_equal(picture.pixels[1], CLEAR[1, :, :3])
    assert picture.converted == "6x5 RGBA with transparency to 6x5 RGB"
    grey_with_alpha = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(CLEAR[..., 3])])
    picture = read(encoded(grey_with_alpha))
    np.testing.assert_allclose(
        picture.pixels, GREY[..., np.newaxis] * share + 255 * (1 - share), atol=1
    )
    assert picture.converted == "6x5 LA with transparency to 6x5 L"


@pytest.mark.parametrize(
    ("pixels", "transparent"),
    [(GREY, int(GREY[0, 0])), (COLOUR, tuple(map(int, COLOUR[0, 0])))],
    ids=["grey", "colour"],
)
def test_one_colour_may_be_the_transparent_one(read: Read, pixels: Array, transparent: Any) -> None:
    channels = 1 if pixels.ndim == 2 else 3
    picture = read(encoded(pixels, transparency=transparent), channels=channels)
    pixels = pixels.reshape(HEIGHT, WIDTH, channels)
    unseen = (pixels == transparent).all(axis=-1)
    assert unseen[0, 0]
    np.testing.assert_array_equal(picture.pixels[~unseen], pixels[~unseen])
    assert (picture.pixels[unseen] == 255).all()


def test_a_transparent_colour_is_a_conversion(read: Read) -> None:
    assert read(encoded(GREY, transparency=int(GREY[0, 0]))).converted != ""


def test_a_palette_is_looked_up(read: Read) -> None:
    indices = GREY % 3
    colours = np.array([[0, 0, 0], [255, 0, 0], [10, 20, 30]], dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    assert image.mode == "P"
    picture = read(encoded(image), channels=3)
    np.testing.assert_array_equal(picture.pixels, colours[indices])
    assert picture.converted == "6x5 P to 6x5 RGB"
    picture = read(encoded(image, transparency=bytes([255, 255, 0])), channels=3)
    colours[2] = 255
    np.testing.assert_array_equal(picture.pixels, colours[indices])


def test_sixteen_bits_become_eight(read: Read) -> None:
    deep = GREY.astype(np.uint16) * 257
    deep[0, :4] = [0, 65535, 32768, 128]
    picture = read(encoded(deep))
    np.testing.assert_array_equal(picture.pixels[1:, :, 0], GREY[1:])
    np.testing.assert_array_equal(picture.pixels[0, :4, 0], [0, 255, 128, 0])
    assert picture.converted.endswith("to 6x5 L")
    assert picture.converted.startswith("6x5 I")
    picture = read(encoded(deep), channels=3)
    np.testing.assert_array_equal(picture.pixels[1:, :, 2], GREY[1:])


def test_one_bit_becomes_eight(read: Read) -> None:
    picture = read(encoded(GREY > 127))
    np.testing.assert_array_equal(picture.pixels[..., 0], np.where(GREY > 127, 255, 0))
    assert picture.converted == "6x5 1 to 6x5 L"


def test_jpeg_is_read(read: Read) -> None:
    slope = np.linspace(0, 200, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
    picture = read(encoded(slope, "JPEG", quality=95), "a.jpg")
    np.testing.assert_allclose(picture.pixels[..., 0], slope, atol=8)
    assert picture.converted == ""
    picture = read(encoded(np.stack([slope] * 3, -1), "JPEG", quality=95), "a.JPEG")
    np.testing.assert_allclose(picture.pixels[..., 0], slope, atol=8)
    assert picture.converted == "6x5 RGB to 6x5 L"
    picture = read(encoded(slope, "JPEG", quality=95), "a.png")  # by content, not by name
    np.testing.assert_allclose(picture.pixels[..., 0], slope, atol=8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_photograph_stands_as_it_was_taken(read: Read, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    pixels = np.zeros((WIDTH, HEIGHT), np.uint8)
    pixels[:, HEIGHT // 2 :] = 255
    picture = read(encoded(pixels, kind, exif=exif), "a." + kind.lower())
    turned = np.rot90(pixels, -1)
    assert abs(picture.pixels[..., 0].astype(int) - turned).max() < 30
    assert picture.converted == ""


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP"])
def test_the_first_frame_of_an_animation_is_read(read: Read, kind: str) -> None:
    frames = [Image.new("L", (WIDTH, HEIGHT), value) for value in (200, 20)]
    options = {"save_all": True, "append_images": frames[1:]}
    picture = read(encoded(frames[0], kind, **options), f"a.{kind}")
    np.testing.assert_allclose(picture.pixels, 200, atol=2)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "WEBP"])
def test_other_formats_are_read(read: Read, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = read(encoded(GREY, kind, **options), f"a.{kind}")
    np.testing.assert_array_equal(picture.pixels[..., 0], GREY)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"))
    assert "whole numbers as pixels, received floating-point" in refusal(tmp_path / "a.tif")


# Top and bottom are red and blue, the middle is green: 12 pixels high, 5 wide.
TALL = np.repeat(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8), 4, axis=0)
TALL = np.repeat(TALL[:, np.newaxis], 5, axis=1)


def test_images_are_stretched_cropped_or_padded() -> None:
    def fitted(resize: Any, pixels: Array, size: tuple[int, int], color: Any = "rgb") -> Array:
        how = Preprocessing(size=size, color=color, resize=resize, background="#102030")
        return fit_image(Image.fromarray(pixels), how)[0]

    assert fitted("stretch", TALL, (3, 5))[:, 0].argmax(axis=1).tolist() == [0, 1, 2]
    np.testing.assert_array_equal(fitted("crop", TALL, (4, 5)), TALL[4:8])
    np.testing.assert_array_equal(fitted("crop", TALL, (5, 5)), TALL[3:8])  # rounded down
    padded = fitted("pad", TALL, (12, 9))
    np.testing.assert_array_equal(padded[:, 2:7], TALL)
    np.testing.assert_array_equal(padded[:, [0, 1, 7, 8]].reshape(-1, 3).T[0], 0x10)
    np.testing.assert_array_equal(fitted("pad", TALL[:4], (6, 5))[[0, 5], 0], [[16, 32, 48]] * 2)
    for resize in ("stretch", "crop", "pad"):  # 3 million pixels on one side
        line = np.zeros((1, 3_000_000), np.uint8)
        assert fitted(resize, line, (6, 5), "grayscale").shape == (6, 5, 1)


def test_keras_crops_and_pads_in_the_same_way() -> None:
    pixels = RANDOM.randint(0, 256, (37, 64, 3), dtype=np.uint8)
    for name, resize in (("crop_to_aspect_ratio", "crop"), ("pad_to_aspect_ratio", "pad")):
        how = Preprocessing(size=(20, 24), color="rgb", resize=resize, background="black")
        ours = fit_image(Image.fromarray(pixels), how)[0]
        options = {name: True, "antialias": True}
        theirs = keras.ops.image.resize(pixels.astype("float32"), (20, 24), **options)
        difference = np.abs(ours - np.asarray(theirs))
        inside = difference[4:-4]  # at the border, Keras mixes pixels of the image with padding
        assert inside.max() <= (1 if resize == "crop" else 3)


def test_the_first_view_of_a_phone_picture_is_read(read: Read) -> None:
    views = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "blue")]
    content = encoded(views[0], "MPO", save_all=True, append_images=views[1:])
    picture = read(content, "IMG_1.JPG", 3)
    assert abs(picture.pixels.astype(int) - [255, 0, 0]).max() < 10
    # With a damaged list of views it is read as an ordinary JPEG, without a warning.
    at = content.index(b"MPF\x00")
    damaged = content[: at + 4] + bytes(8) + content[at + 12 :]
    np.testing.assert_array_equal(read(damaged, "IMG_2.JPG", 3).pixels, picture.pixels)


def test_damaged_exif_is_refused_or_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    content = encoded(COLOUR, "JPEG", exif=exif)
    for at in range(20, 80):
        for byte in (0, 3, 7, 255):
            (tmp_path / "a.jpg").write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
            with contextlib.suppress(InputError):
                read_pictures(tmp_path / "a.jpg", of_shape(3))


def test_other_sizes_are_resized_and_said(read: Read) -> None:
    wide = np.zeros((24, 40), dtype=np.uint8)
    wide[:, :16] = 240
    picture = read(encoded(wide))
    assert picture.converted == "24x40 L to 6x5 L"
    np.testing.assert_array_equal(picture.pixels[:, 0], 240)
    np.testing.assert_array_equal(picture.pixels[:, 3:], 0)
    picture = read(encoded(np.full((2, 3, 3), (10, 20, 30), dtype=np.uint8)), channels=3)
    assert picture.converted == "2x3 RGB to 6x5 RGB"
    np.testing.assert_array_equal(picture.pixels, np.broadcast_to([10, 20, 30], (6, 5, 3)))
    steps = np.repeat(np.arange(0, 250, 50, dtype=np.uint8)[:, np.newaxis], 6, axis=1)
    picture = read(encoded(steps))
    assert picture.converted == "5x6 L to 6x5 L"
    assert (np.diff(picture.pixels[..., 0].astype(int), axis=0) > 0).all()
    assert (picture.pixels == picture.pixels[:, :1]).all()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_an_array_may_hold_one_or_several(read: Read, tmp_path: Path, channels: int) -> None:
    many = RANDOM.randint(0, 256, (3, HEIGHT, WIDTH, channels), dtype=np.uint8)
    for array in [many, *([many[..., 0]] if channels == 1 else [])]:
        path = tmp_path / "many.npy"
        np.save(path, array)
        pictures = read_pictures(path, of_shape(channels))
        assert [p.source for p in pictures] == [f"{path}[{i}]" for i in range(3)]
        np.testing.assert_array_equal([p.pixels for p in pictures], many)
        for one in (array[1], array[1:2], np.asfortranarray(array[1])):
            np.testing.assert_array_equal(read(stored(one), "one.NPY", channels).pixels, many[1])


def test_dark_and_bright_are_exchanged(read: Read, tmp_path: Path) -> None:
    picture = read(encoded(COLOUR), channels=3, invert=True)
    np.testing.assert_array_equal(picture.pixels, 255 - COLOUR)
    assert picture.converted == ""
    assert read(encoded(GREY), channels=3, invert=True).converted == "6x5 L to 6x5 RGB"
    np.save(tmp_path / "many.npy", np.stack([GREY, 255 - GREY]))
    pictures = read_pictures(tmp_path / "many.npy", of_shape(1), invert=True)
    np.testing.assert_array_equal(pictures[0].pixels[..., 0], 255 - GREY)
    np.testing.assert_array_equal(pictures[1].pixels[..., 0], GREY)
    assert pictures[1].source.endswith("many.npy[1]")


def refusal(path: Path, channels: int = 1) -> str:
    """Returns the message of an InputError: one line with the file name."""
    with pytest.raises(InputError) as caught:
        read_pictures(path, of_shape(channels))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.png", b"", "expected PNG, JPEG, WEBP, BMP, GIF, TIFF or .npy, received 0 bytes"),
        ("empty.npy", b"", "is not a .npy array"),
        ("text.png", b"some text", "TIFF or .npy, received 9 bytes"),
        ("text.npy", b"some text", "is not a .npy array"),
        ("picture.npy", encoded(GREY), "is not a .npy array"),
        ("array.png", stored(GREY), "is not an image"),
        ("cut.png", encoded(GREY)[:60], "cannot be read as an image"),
        ("cut.jpg", encoded(COLOUR, "JPEG")[:-80], "cannot be read as an image"),
        ("cut.npy", stored(GREY)[:-1], "is not a .npy array"),
        ("cut in header.npy", stored(GREY)[:40], "is not a .npy array"),
        ("objects.npy", stored(np.array([{}], dtype=object)), "is not a .npy array"),
        ("float.npy", stored(GREY / 255), "received float64 [6, 5]"),
        ("wide.npy", stored(GREY.astype(np.int64)), "received int64 [6, 5]"),
        ("shape.npy", stored(GREY.T), "received uint8 [5, 6]"),
        ("channels.npy", stored(COLOUR), "uint8 (0 to 255) of shape [6, 5, 1]"),
        ("flat.npy", stored(GREY.ravel()), "received uint8 [30]"),
        ("number.npy", stored(np.uint8(3)), "received uint8 []"),
        ("deep.npy", stored(np.zeros((1, 1, 6, 5, 1), np.uint8)), "received uint8 [1, 1, 6, 5, 1]"),
        (
            "none.npy",
            stored(np.zeros((0, 6, 5), np.uint8)),
            "expected one or more images, uint8",
        ),
        ("a.ico", encoded(GREY, "ICO"), "is not an image: expected PNG, JPEG"),
        ("cut.gif", encoded(GREY, "GIF")[:-9], "cannot be read as an image"),
        ("nothing.png", png_that_declares(0, 0), "is not an image"),
        ("short.png", png_that_declares(5, 6), "cannot be read as an image"),
        (
            "large.png",
            png_that_declares(8000, 8000),
            "at most 50000000 pixels, received 8000x8000",
        ),
        ("bomb.png", png_that_declares(2**31 - 1, 2**31 - 1), "at most 50000000 pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[-5:] else "",
)
def test_what_is_no_image_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refusal(tmp_path / name)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for name in ("none.png", "none.npy"):
        assert "there is no such file" in refusal(tmp_path / name)
        (tmp_path / name).mkdir()
        assert f"received {tmp_path / name}: it is a folder" in refusal(tmp_path / name)
    assert "it is not a regular file" in refusal(Path("/dev/null"))
    assert "there is no such file" in refusal(Path("/dev/null/a.png"))
    assert "there is no such file" in refusal(tmp_path / f"{'n' * 999}.png")


def test_two_channels_come_as_an_array_only(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(GREY))
    assert "images with 2 channels must be .npy arrays" in refusal(tmp_path / "a.png", 2)
    np.save(tmp_path / "a.npy", GREY)
    assert "shape [6, 5, 3]" in refusal(tmp_path / "a.npy", 3)


def test_a_large_image_is_refused_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_that_declares(10_000, 10_000))
    assert "received 10000x10000" in refusal(tmp_path / "a.png")


def test_an_image_within_the_limit_is_read(read: Read) -> None:
    lines = np.zeros((1, 3_000_000), dtype=np.uint8)
    assert read(encoded(lines)).converted == "1x3000000 L to 6x5 L"


def test_several_arrays_in_one_file_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.savez(file, a=GREY)
    refusal(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("header", "major"),
    [
        ("{", 1),
        ("{[]: 1}", 1),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (600, -5)}", 1),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (6, 5)}" + " " * 20_000, 2),
    ],
    ids=["open", "unhashable", "negative", "long"],
)
def test_a_damaged_array_is_refused(tmp_path: Path, header: str, major: int) -> None:
    (tmp_path / "a.npy").write_bytes(npy_with_header(header, major))
    refusal(tmp_path / "a.npy")


def test_a_sound_header_is_read(read: Read) -> None:
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (6, 5)}"
    np.testing.assert_array_equal(read(npy_with_header(header), "a.npy").pixels[..., 0], GREY)


def test_pixels_do_not_change_with_the_file(read: Read) -> None:
    picture = read(stored(GREY), "a.npy")
    with Path(picture.source).open("r+b") as file:
        file.seek(-GREY.nbytes, io.SEEK_END)
        file.write(bytes(GREY.nbytes))
    np.testing.assert_array_equal(picture.pixels[..., 0], GREY)

"""Pictures come in as a person sees them: upright, not cut off, on white; and a file that is none is named."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlmprune.errors import InputError
from vlmprune.images import as_rgb, open_clip, open_rgb

RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
"""The 16-bit values that are exactly 0 to 255 in 8 bits."""


def picture(width=5, height=3):
    """Every pixel another colour."""
    values = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3) * 5
    return Image.fromarray(values)


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
def test_turned_as_its_exif_data_say(orientation, ending, tmp_path):
    """All eight orientations, as the camera would have stored the same scene."""
    upright = picture()
    stored = {2: [4], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [0]}.get(orientation, [])
    flips = {0: "ROTATE_270", 1: "FLIP_TOP_BOTTOM", 2: "ROTATE_90", 3: "ROTATE_180", 4: "FLIP_LEFT_RIGHT"}
    flips |= {5: "TRANSPOSE", 6: "TRANSVERSE"}
    held = upright
    for step in stored:
        held = held.transpose(Image.Transpose[flips[step]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"held.{ending}"
    held.save(path, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    assert np.array_equal(pixels(open_rgb(path, "--image")), pixels(upright))


def test_turned_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    held = picture()
    held.info["exif"] = exif.tobytes()
    once = as_rgb(held)
    assert once.size == (3, 5) and np.array_equal(pixels(as_rgb(once)), pixels(once))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled(mode):
    array = RAMP.astype({"I;16": "<u2", "I;16B": ">u2", "I": "int32"}[mode])
    image = Image.frombytes(mode, (16, 16), array.tobytes()) if mode != "I" else Image.fromarray(array)
    assert image.mode == mode
    assert np.array_equal(pixels(as_rgb(image))[..., 0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm"])
def test_sixteen_bit_files_are_the_eight_bit_picture(name, tmp_path):
    Image.fromarray(RAMP).save(tmp_path / name)
    got = pixels(open_rgb(tmp_path / name, "--image"))
    assert np.array_equal(got, pixels(Image.fromarray((RAMP >> 8).astype(np.uint8)).convert("RGB")))


def test_sixteen_bits_and_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(RAMP).save(tmp_path / "grey.png", exif=exif)
    got = pixels(open_rgb(tmp_path / "grey.png", "--image"))
    assert np.array_equal(got[..., 0].flatten(), np.arange(255, -1, -1))


def test_floats_are_from_zero_to_one():
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(pixels(as_rgb(Image.fromarray(values)))[..., 1].flatten(), np.arange(256))


@pytest.mark.parametrize(
    "values, said",
    [
        (np.float32([[0.0, 1.5]]), r"^image of mode F: expected greys from 0 to 1, got 0\.0 to 1\.5$"),
        (np.float32([[np.nan, 0.5]]), r"^image of mode F: expected greys from 0 to 1, got nan to nan$"),
        (np.int32([[-1, 5]]), r"^image of mode I: expected greys from 0 to 65535, got -1 to 5$"),
        (np.int32([[0, 70000]]), r"^image of mode I: expected greys from 0 to 65535, got 0 to 70000$"),
    ],
)
def test_greys_without_a_known_white_are_refused(values, said, tmp_path):
    with pytest.raises(InputError, match=said):
        as_rgb(Image.fromarray(values))
    Image.fromarray(values).save(tmp_path / "grey.tif")
    with pytest.raises(InputError, match=r"^--image: .*grey\.tif', which cannot be read: image of mode"):
        open_rgb(tmp_path / "grey.tif", "--image")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_is_white(mode):
    """Black ink on nothing, as screenshots and logos have it: all black, if the alpha channel were dropped."""
    alpha = Image.fromarray(np.uint8([[0, 255], [128, 255]]))
    ink = Image.new("L", (2, 2), 0)
    image = Image.merge("LA", (ink, alpha)).convert("RGBA").convert(mode)
    assert pixels(as_rgb(image))[..., 0].tolist() == [[255, 0], [127, 0]]


def test_palettes(tmp_path):
    colours = picture().quantize(8)
    assert np.array_equal(pixels(as_rgb(colours)), np.asarray(colours.convert("RGB")))
    colours.save(tmp_path / "p.png", transparency=int(np.asarray(colours)[0, 0]))
    got = pixels(open_rgb(tmp_path / "p.png", "--image"))
    there = np.asarray(colours) == np.asarray(colours)[0, 0]
    assert (got[there] == 255).all() and np.array_equal(
        got[~there], np.asarray(colours.convert("RGB"))[~there]
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_converted_as_ever(mode):
    image = picture().convert(mode)
    assert np.array_equal(pixels(as_rgb(image)), np.asarray(image.convert("RGB")))


def test_an_animation_is_its_first_picture(tmp_path):
    first, second = picture(), ImageOps.invert(picture())
    first.save(tmp_path / "a.png", save_all=True, append_images=[second])
    assert np.array_equal(pixels(open_rgb(tmp_path / "a.png", "--image")), pixels(first))


def huge(side=20_000):
    """The first bytes of a PNG of 400 megapixels, and hardly any of its pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(9)))
    whole = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


@pytest.mark.parametrize(
    "content, reason",
    [
        (
            lambda whole: whole[: len(whole) // 2],
            r"(image file is truncated|unrecognized data stream|broken PNG)",
        ),
        (lambda whole: b"", r"cannot identify image file"),
        (lambda whole: b"not pixels", r"cannot identify image file"),
        (lambda whole: huge(), r"Image size \(400000000 pixels\) exceeds limit"),
        (lambda whole: b"P6 2 2 70000\n", r"maxval must be greater than 0 and less than 65536"),
    ],
    ids=["truncated", "empty", "text", "400 megapixels", "damaged header"],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(content, reason, tmp_path):
    path = tmp_path / "some.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(content(path.read_bytes()))
    said = rf"^--image: expected an image file, got '.*some\.png', which cannot be read: {reason}"
    with pytest.raises(InputError, match=said) as caught:
        open_rgb(path, "--image")
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"^--image: expected an image file, got '.*', which is no file$"):
        open_rgb(tmp_path, "--image")


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_all_pictures_of_an_animation(ending, tmp_path):
    """A codec may blur one a little, and a frame is told apart from the next."""
    frames = [Image.new("RGB", (16, 12), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    frames[0].save(tmp_path / f"clip.{ending}", save_all=True, append_images=frames[1:], duration=100)
    read = open_clip(tmp_path / f"clip.{ending}", "--video")
    assert len(read) == 3
    for got, made in zip(read, frames, strict=True):
        assert got.size == made.size and got.mode == "RGB"
        assert np.abs(pixels(got).astype(int) - pixels(made)).max() <= 8


def test_the_pictures_of_a_folder_by_name(tmp_path):
    for name, level in (("2.png", 20), ("10.png", 100), ("1.png", 10)):  # by name, not by number
        Image.new("RGB", (4, 3), (level,) * 3).save(tmp_path / name)
    (tmp_path / ".hidden").write_text("no picture")
    assert [frame.getpixel((0, 0))[0] for frame in open_clip(tmp_path, "--video")] == [10, 100, 20]


def test_what_is_no_clip(tmp_path):
    one, other = tmp_path / "one.png", tmp_path / "folder"
    picture().save(one)
    with pytest.raises(InputError, match=r"^--video: expected two or more pictures, got 1 in '.*one\.png'$"):
        open_clip(one, "--video")
    with pytest.raises(
        InputError, match=r"^--video: expected an animation or a folder of pictures, got '.*folder', wh"
    ):
        open_clip(other, "--video")
    other.mkdir()
    with pytest.raises(InputError, match=r"^--video: expected two or more pictures, got 0 in '.*folder'$"):
        open_clip(other, "--video")
    picture().save(other / "a.png"), picture(7).save(other / "b.png")
    said = r"^--video: expected pictures of one size in '.*folder', got \[\(5, 3\), \(7, 3\)\]$"
    with pytest.raises(InputError, match=said):
        open_clip(other, "--video")
    (tmp_path / "clip.gif").write_bytes(b"GIF89a and no more")
    with pytest.raises(
        InputError, match=r"^--video: expected an animation \(GIF, WebP, PNG\), got '.*clip\.gif', wh"
    ):
        open_clip(tmp_path / "clip.gif", "--video")

"""Every kind of image becomes upright, opaque RGB, or a reason."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from i2i_dist.data.batch import BadData
from i2i_dist.data.decode import decode_image
from tests.data.builders import encoded, noise


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    pixels = noise(0, 5, 7)
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode_image(encoded(pixels, kind, **options))
    assert decoded.dtype == np.uint8 and decoded.flags.writeable
    np.testing.assert_array_equal(decoded, pixels)


def test_grey_jpeg() -> None:
    decoded = decode_image(encoded(Image.new("L", (9, 4), 77), "JPEG"))
    assert decoded.shape == (4, 9, 3) and (decoded == 77).all()


def test_cmyk_jpeg() -> None:
    decoded = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(decoded.astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    np.testing.assert_array_equal(decode_image(encoded(values, kind))[0, :, 0], [0, 1, 100, 255])


def test_alpha_is_composited_on_white() -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    decoded = decode_image(encoded(rgba))
    np.testing.assert_array_equal(decoded, [[[200, 0, 0], [255, 255, 255], [127, 127, 127]]])


def test_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert decode_image(encoded(image)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert decode_image(encoded(image, transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (6, lambda x: np.rot90(x, -1)),
        (8, lambda x: np.rot90(x, 1)),
    ],
)
def test_exif_orientation_is_carried_out(orientation: int, upright) -> None:  # type: ignore[no-untyped-def]
    pixels = noise(1, 4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(encoded(pixels, "PNG", exif=exif)), upright(pixels))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_truncated_files_are_bad(kind: str) -> None:
    whole = encoded(noise(2, 64, 64), kind)
    with pytest.raises(BadData, match=r"cannot be decoded|not an image"):
        decode_image(whole[: len(whole) // 2])


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", encoded(noise(0), "GIF"), encoded(noise(0), "EPS")])
def test_other_content_is_bad(content: bytes) -> None:
    with pytest.raises(BadData, match="not an image"):
        decode_image(content)


def test_float_pixels_are_bad() -> None:
    with pytest.raises(BadData, match="no known range"):
        decode_image(encoded(np.ones((4, 4), np.float32), "TIFF"))


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_size_is_checked_on_the_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded before the size was checked"))
    with pytest.raises(BadData, match="pixels are more than the allowed"):
        decode_image(bomb)

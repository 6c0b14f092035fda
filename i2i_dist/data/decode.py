"""Encoded image bytes to RGB pixels, with every way to fail reported as `BadData`."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from i2i_dist.data.batch import BadData

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp")
MAX_PIXELS = 2**26  # 8192 x 8192; a header can promise far more than the machine's memory

# The list also keeps out formats whose Pillow plug-ins start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode an image to RGB, upright and opaque.

    The EXIF orientation is carried out, transparency is composited on white, palettes, grey and CMYK become RGB, and
    16-bit values are scaled to 8 bits. Of several frames the first is used. Colour profiles are ignored.

    Args:
        data: The file's content: JPEG, PNG, WebP, TIFF or BMP.

    Returns:
        uint8 `[H, W, 3]`.

    Raises:
        BadData: Not an image of these formats, damaged or cut, larger than `MAX_PIXELS`, or of a pixel type whose
            range is not known (32-bit integers beyond 65535, floating point).
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
            if image.width * image.height > MAX_PIXELS:
                raise BadData(_too_large(f"{image.width} x {image.height}"))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except BadData:
        raise
    except UnidentifiedImageError:
        raise BadData(f"not an image ({len(data)} bytes, none of {', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise BadData(_too_large("its")) from None
    except Exception as error:  # decoders fail in many ways on damaged input: OSError, SyntaxError, struct.error, ...
        raise BadData(f"cannot be decoded: {type(error).__name__}: {error}") from error


def _too_large(what: str) -> str:
    return f"{what} pixels are more than the allowed {MAX_PIXELS} (2**26)"


def _to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    if image.mode == "F":
        raise BadData("floating-point pixels have no known range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)  # [H, W]
        if values.min() < 0 or values.max() > 65535:
            raise BadData("integer pixels beyond 16 bits have no known range")
        grey = ((values + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257; Pillow's own conversion would clip
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))

"""Read images as people see them, however they are stored: upright, RGB, and of a safe size."""

import io
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from datasets import Image as ImageFeature
from PIL import ExifTags, ImageOps, UnidentifiedImageError
from PIL import Image as PillowImage

BOMBS = (PillowImage.DecompressionBombError, PillowImage.DecompressionBombWarning)
SMALLER = "so shrink it, drop the row, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
PNG_METADATA = (b"eXIf", b"Raw profile type exif", b"com.adobe.xmp")
SIDEWAYS = (5, 6, 7, 8)  # the EXIF orientations that exchange width and height


def read_image(stored, name="the image"):
    """Return the image of a row as `upright_rgb` does; of an animation, the first frame.

    `stored` is {"bytes", "path"} or an image that is already decoded. Nothing is downloaded.

    Raises ValueError with `name` for anything that cannot be read, and for an image of more than
    `PIL.Image.MAX_IMAGE_PIXELS` pixels. A small file may unpack to gigabytes, so that is decided
    from the header, before a pixel is decoded.
    """
    path = stored.get("path") if isinstance(stored, dict) and not stored.get("bytes") else None
    if str(path).startswith(("http://", "https://")):
        raise ValueError(f"{name} cannot be read: {path} is a URL; download the image first")
    with naming_errors(name):
        image = ImageFeature().decode_example(stored)
    return upright_rgb(image, name)


def image_size(stored, name="the image"):
    """Return the (width, height) that `read_image` would give, from the header alone.

    Only a TIFF file, or a PNG file with metadata, is decoded: its orientation may follow its
    pixels. Raises ValueError as `read_image` does, except for pixels that turn out to be damaged
    or to be integers of more than 16 bits.
    """
    with naming_errors(name):
        data = file_bytes(stored)
        image = None if data is None else PillowImage.open(io.BytesIO(data))
    if image is None:
        return read_image(stored, name).size
    refuse_header(image, name)
    if image.format == "PNG" and not any(mark in data for mark in PNG_METADATA):
        # Pillow would decode the image to look for an orientation behind the pixels.
        return image.size
    if image.format in ("PNG", "TIFF"):
        return read_image(stored, name).size
    with naming_errors(name):
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    width, height = image.size
    return (height, width) if orientation in SIDEWAYS else (width, height)


def file_bytes(stored):
    """Return the bytes of a stored image's file, not decoded, or None where there are none.

    An image that is stored as a path is read from there.
    """
    if not isinstance(stored, dict):
        return None
    if stored.get("bytes"):
        return stored["bytes"]
    path = Path(stored.get("path") or "")
    return path.read_bytes() if path.is_file() else None


@contextmanager
def naming_errors(name):
    """Turn every error of Pillow within the block into a ValueError that names the image."""
    try:
        with warnings.catch_warnings():
            # Pillow itself only warns up to twice its limit.
            warnings.simplefilter("error", PillowImage.DecompressionBombWarning)
            yield
    except BOMBS as error:
        raise ValueError(f"{name} is too large, {SMALLER}: {error}") from error
    except UnidentifiedImageError as error:
        # Pillow's own message shows an address in memory.
        raise ValueError(
            f"{name} cannot be read: its bytes are not an image file that Pillow knows"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def upright_rgb(image, name="the image"):
    """Return a Pillow image of any mode as people see it.

    It is turned as its EXIF orientation says, laid on white where it is transparent, and converted
    to RGB; 16 bits per channel are scaled to 8. An image that is already so is returned unchanged.

    Raises ValueError with `name` for too many pixels, for floating-point values and for integers
    of more than 16 bits, where nothing says what is white, and for anything but a Pillow image.
    """
    if not isinstance(image, PillowImage.Image):
        raise ValueError(f"{name} is {type(image).__name__}, not an image: give a Pillow image")
    refuse_header(image, name)
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = eight_bits(image, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PillowImage.new("RGBA", image.size, "white")
        image = PillowImage.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def refuse_header(image, name):
    """Raise ValueError for what the header of an image already shows to be unusable."""
    most = PillowImage.MAX_IMAGE_PIXELS
    if most and image.width * image.height > most:
        raise ValueError(
            f"{name} is too large, {SMALLER}: it has {image.width} × {image.height} pixels, more "
            f"than {most}"
        )
    if image.mode == "F":
        raise ValueError(f"{name} has mode F: save it with 8 or 16 bits per channel")


def eight_bits(image, name):
    """Return an image of 16-bit integers, 0 to 65535, scaled to 0 to 255."""
    levels = np.asarray(image)
    darkest, brightest = levels.min(), levels.max()
    if darkest < 0 or brightest > 65535:
        raise ValueError(
            f"{name} has mode {image.mode} and values from {darkest} to {brightest}: "
            "save it with 8 or 16 bits per channel"
        )
    scaled = (levels.astype(np.uint32) + 128) // 257
    return PillowImage.fromarray(scaled.astype(np.uint8))

"""Images as people see them, whatever way they are stored: upright, RGB, and not so large that they fill the memory."""

import warnings

import numpy as np
from datasets import Image as ImageFeature
from PIL import ExifTags, ImageOps, UnidentifiedImageError
from PIL import Image as PillowImage

BOMBS = (PillowImage.DecompressionBombError, PillowImage.DecompressionBombWarning)
SMALLER = "make it smaller, drop the row, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"


def read(stored, name="the image"):
    """The image of a row, stored as {"bytes", "path"} or decoded already, as `upright_rgb` has it; of an animation the first frame.

    Raises ValueError, with `name` in it, for what cannot be read and for more pixels than `PIL.Image.MAX_IMAGE_PIXELS`
    (a small file may unpack to gigabytes): the header says so before a pixel is decoded. Nothing is downloaded.
    """
    path = stored.get("path") if isinstance(stored, dict) and not stored.get("bytes") else None
    if str(path).startswith(("http://", "https://")):
        raise ValueError(f"{name} cannot be read: {path} is an address; download the image first")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PillowImage.DecompressionBombWarning)
            image = ImageFeature().decode_example(stored)
    except BOMBS as error:
        raise ValueError(f"{name} is too large: {error} {SMALLER}") from error
    except UnidentifiedImageError as error:  # its own words name a place in memory
        raise ValueError(
            f"{name} cannot be read: its bytes are not an image file that Pillow knows"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    return upright_rgb(image, name)


def upright_rgb(image, name="the image"):
    """A Pillow `image` of any mode as people see it: turned as its EXIF says, on white where it is transparent, RGB.

    An image that is so already is returned itself. 16 bits a pixel are scaled to 8. Raises ValueError with `name` for too many
    pixels, for floats and integers of more than 16 bits (nothing says what is white), and for what is no image.
    """
    if not isinstance(image, PillowImage.Image):
        raise ValueError(f"{name} is {type(image).__name__}, not an image: give a Pillow image")
    if PillowImage.MAX_IMAGE_PIXELS and image.width * image.height > PillowImage.MAX_IMAGE_PIXELS:
        limit = f"{image.width} × {image.height} pixels, more than {PillowImage.MAX_IMAGE_PIXELS}"
        raise ValueError(f"{name} is too large: {limit}; {SMALLER}")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        levels = np.asarray(image)
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                f"{name} has mode {image.mode}, {levels.min()} to {levels.max()}: save it with 8 or 16 bits a pixel"
            )
        image = PillowImage.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PillowImage.alpha_composite(PillowImage.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")

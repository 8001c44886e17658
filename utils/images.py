"""Read images as people see them, however they are stored: upright, RGB, and of a safe size."""

import base64
import io
import math
import os
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as PillowImage

BOMBS = (PillowImage.DecompressionBombError, PillowImage.DecompressionBombWarning)
SMALLER = "so shrink it, drop the row, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
PNG_METADATA = (b"eXIf", b"Raw profile type exif", b"com.adobe.xmp")
SIDEWAYS = (5, 6, 7, 8)  # the EXIF orientations that exchange width and height
TURNS = {  # what makes an image of an EXIF orientation upright
    2: PillowImage.Transpose.FLIP_LEFT_RIGHT,
    3: PillowImage.Transpose.ROTATE_180,
    4: PillowImage.Transpose.FLIP_TOP_BOTTOM,
    5: PillowImage.Transpose.TRANSPOSE,
    6: PillowImage.Transpose.ROTATE_270,
    7: PillowImage.Transpose.TRANSVERSE,
    8: PillowImage.Transpose.ROTATE_90,
}
ORIENTED = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # may hold an orientation
HEIC_ENDINGS = (".heic", ".heif")
HEIC_BRANDS = (
    *(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"),
    *(b"mif1", b"msf1"),  # of AVIF, too
)
# Pixels. Smaller images are left to the model's processor, which then sees what it sees in TRL.
NO_PHOTOGRAPH = 1_000_000
SHOWN = 80  # characters of a text that an error shows
SHORTEST_BASE64 = 40  # characters; no image file is so small, so a shorter text is a path


def read_image(stored, name="the image", pixel_budget=None):
    """Return a stored image as `upright_rgb` does; of an animation, the first frame.

    `stored` is a Pillow image or what `stored_bytes` takes. With `pixel_budget`, an image of more
    pixels is reduced to the size that `reduced_size` gives. A JPEG is decoded at a reduced scale
    then, which takes less time and much less memory.

    Raises ValueError with `name` for anything that cannot be read, and for an image of more than
    `PIL.Image.MAX_IMAGE_PIXELS` pixels. A small file may unpack to gigabytes, so that is decided
    from the header, before a pixel is decoded.
    """
    if isinstance(stored, PillowImage.Image):
        image = stored
    else:
        image = opened(stored_bytes(stored, name), name)
        if image.format in ("JPEG", "MPO"):
            image = reduced_jpeg(image, name, pixel_budget)
    image = upright_rgb(image, name)
    size = reduced_size(*image.size, pixel_budget)
    return image if size == image.size else resized(image, size)


def image_size(stored, name="the image", pixel_budget=None):
    """Return the (width, height) that `read_image` would give, from the header alone.

    Only a Pillow image, a TIFF file, or a PNG file with metadata, is decoded: an orientation may
    follow the pixels. Raises ValueError as `read_image` does, except for pixels that turn out to be
    damaged or to be integers of more than 16 bits.
    """
    if isinstance(stored, PillowImage.Image):
        width, height = upright_rgb(stored, name).size
    else:
        width, height = size_in_header(stored_bytes(stored, name), name)
    return reduced_size(width, height, pixel_budget)


def size_in_header(data, name):
    """Return the upright (width, height) of an image file's bytes."""
    image = opened(data, name)
    if image.format == "PNG" and not any(mark in data for mark in PNG_METADATA):
        # Pillow would decode the image to look for an orientation behind the pixels.
        return image.size
    if image.format in ("PNG", "TIFF"):
        return upright_rgb(image, name).size
    width, height = image.size
    return (height, width) if orientation(image) in SIDEWAYS else (width, height)


def reduced_size(width, height, pixel_budget):
    """Return the (width, height) in pixels to which an image is reduced.

    That is the largest size of about the same shape with at most `pixel_budget` pixels, a whole
    number from 1, and at least one pixel on each side. An image within the budget keeps its size,
    and so does one of up to NO_PHOTOGRAPH pixels. Every image does if the budget is None.
    """
    if pixel_budget is None or width * height <= max(pixel_budget, NO_PHOTOGRAPH):
        return width, height
    # In whole numbers, so that rounding never exceeds the budget.
    across = max(1, math.isqrt(pixel_budget * width // height))
    down = max(1, math.isqrt(pixel_budget * height // width))
    # A side that was raised to 1 leaves less for the other.
    return min(across, pixel_budget), min(down, pixel_budget)


def resized(image, size, box=None):
    """Return an image, or what is within its `box`, resized to a (width, height)."""
    # With this gap it takes about half the time and looks the same.
    return image.resize(size, PillowImage.Resampling.LANCZOS, box=box, reducing_gap=2.0)


def reduced_jpeg(image, name, pixel_budget):
    """Return a JPEG image that is not decoded yet, decoded at the size that `reduced_size` gives.

    An image within the budget is returned unchanged. Raises ValueError with `name` for damage.
    """
    size = reduced_size(*image.size, pixel_budget)
    if size == image.size:
        return image
    with naming_errors(name):
        drafted = image.draft("RGB", size)
        # The last column and row may reach beyond the photograph.
        return resized(image, size, box=drafted[1] if drafted else None)


def file_bytes(stored):
    """Return the bytes of a stored image's file, not decoded, or None where there are none."""
    try:
        return stored_bytes(stored, "the image")
    except ValueError:
        return None


def stored_bytes(stored, name):
    """Return the bytes of a stored image's file, not decoded.

    `stored` is these bytes, a text as `bytes_of_text` takes it, a path, or {"bytes", "path"}, whose
    path counts only if it has no bytes. Raises ValueError with `name` for anything else.
    """
    found = stored
    if isinstance(stored, dict):
        found = stored.get("bytes") or stored.get("path")
    if isinstance(found, os.PathLike):
        found = os.fspath(found)
    if not isinstance(found, str | bytes | None):
        raise ValueError(f"{name} cannot be read: {type(found).__name__} is not an image")
    if not found:
        raise ValueError(f"{name} cannot be read: there is no image")
    return found if isinstance(found, bytes) else bytes_of_text(found, name)


def bytes_of_text(text, name):
    """Return the bytes of the image file whose path a text is, or which it holds as base64.

    Raises ValueError with `name` and the beginning of the text. Nothing is downloaded.
    """
    shown = text[:SHOWN]
    if text[:8].lower().startswith(("http://", "https://")):
        raise ValueError(f"{name} cannot be read: {shown} is a URL; download the image first")
    if os.path.isfile(text):  # False for a text that is too long for a path; Path raises
        with naming_errors(name):
            return Path(text).read_bytes()
    data = decode_base64(text)
    if not data:
        raise ValueError(
            f"{name} cannot be read: {shown!r} is neither a file nor an image in base64"
        )
    return data


def decode_base64(text):
    """Return the bytes of base64 text or of a `data:` address, None for anything else."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    elif len(text) < SHORTEST_BASE64:
        return None
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None


def opened(data, name):
    """Return the image of a file's bytes, not decoded yet.

    Raises ValueError with `name` for what the header already shows to be unusable, and for a HEIC
    photograph without the package that reads it.
    """
    if is_heic(data):
        add_heic(name)
    with naming_errors(name):
        image = PillowImage.open(io.BytesIO(data))
    refuse_header(image, name)
    return image


def is_heic(data):
    """Return whether the bytes of a file are those of a HEIC photograph, by its brands."""
    length = int.from_bytes(data[:4], "big")
    return (
        data[4:8] == b"ftyp"
        and data[8:12] in HEIC_BRANDS
        and not any(brand in data[16:length] for brand in (b"avif", b"avis"))
    )


def add_heic(name):
    """Let Pillow read HEIC photographs. Raises ValueError with `name` if nothing can."""
    if "HEIF" in PillowImage.OPEN:
        return
    try:
        import pillow_heif  # optional, and needed for such photographs only
    except ImportError as error:
        raise ValueError(
            f"{name} cannot be read: it is a HEIC photograph; `pip install pillow-heif` reads it"
        ) from error
    PillowImage.init()  # Pillow's own readers go first: HEIC and AVIF share brands
    pillow_heif.register_heif_opener()


@contextmanager
def naming_errors(name):
    """Turn every error within the block into a ValueError that names the image."""
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
    except Exception as error:  # Pillow's readers raise whatever damage leads to
        raise ValueError(f"{name} cannot be read: {error}") from error


def upright_rgb(image, name="the image"):
    """Return a Pillow image of any mode as people see it.

    It is turned as its EXIF orientation says, laid on white where it is transparent, and converted
    to RGB; 16 bits per channel are scaled to 8. An image that is already so is returned unchanged.

    Raises ValueError with `name` for too many pixels, for pixels that are damaged, for
    floating-point values and for integers of more than 16 bits, where nothing says what is white,
    and for anything but a Pillow image.
    """
    if not isinstance(image, PillowImage.Image):
        raise ValueError(f"{name} is {type(image).__name__}, not an image: give a Pillow image")
    refuse_header(image, name)
    with naming_errors(name):
        image.load()
        image = turned(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = eight_bits(image, name)
    with naming_errors(name):
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = PillowImage.new("RGBA", image.size, "white")
            image = PillowImage.alpha_composite(white, image)
        return image if image.mode == "RGB" else image.convert("RGB")


def orientation(image):
    """Return the EXIF orientation of an image, 1 to 8: 1 where it has none that can be read."""
    try:
        number = image.getexif().get(ExifTags.Base.Orientation, 1)
        return number if number in TURNS else 1
    except Exception:  # damaged metadata raises almost anything, and the pixels may be intact
        return 1


def turned(image):
    """Return an image turned upright, without its orientation; an upright image itself."""
    number = orientation(image)
    if number == 1:
        return image
    # Pillow's `exif_transpose` writes the other metadata again and fails where it is damaged.
    image = image.transpose(TURNS[number])
    for key in ORIENTED:
        image.info.pop(key, None)
    return image


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

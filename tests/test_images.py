"""Images in every mode and orientation are seen as people see them, and bombs are refused by name.

Training and inference see the same pixels.
"""

import io
import warnings

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage
from PIL import ImageFile, features

from utils import chat, images, preferences

FEATURES = Features(
    {
        "image": Image(),
        "question": Value("string"),
        "chosen": Value("string"),
        "rejected": Value("string"),
    }
)
WIDTH, HEIGHT = 40, 30
# From 0 to 1 in both directions, so that no mirror image looks the same.
ACROSS, DOWN = np.meshgrid(np.arange(WIDTH) / (WIDTH - 1), np.arange(HEIGHT) / (HEIGHT - 1))
PIXELS = np.stack([255 * ACROSS, 255 * DOWN, 255 * (1 - ACROSS)], axis=-1).round().astype(np.uint8)
OPACITY = (255 * DOWN).round().astype(np.uint8)
GRAY = (255 * ACROSS * DOWN).round().astype(np.uint8)
SIXTEEN = (65535 * ACROSS * DOWN).round().astype(np.uint16)


def three(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


def on_white(pixels, opacity):
    """By the definition of opacity."""
    share = opacity[..., None] / 255
    return pixels * share + 255 * (1 - share)


def picture(array, mode=None):
    image = PillowImage.fromarray(array)
    return image.convert(mode) if mode else image


def orientation(number):
    exif = PillowImage.Exif()
    exif[0x0112] = number
    return exif


RGB = picture(PIXELS)
PALETTE = RGB.quantize(16)
TURNED = {  # the tag's number: how the stored pixels come from the upright ones
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.transpose(a, (1, 0, 2)),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(np.transpose(a, (1, 0, 2)), 2),
    8: lambda a: np.rot90(a, -1),
}


def clear_palette():
    """A GIF's palette with one color that stands for nothing, and what it looks like on white."""
    numbers = np.asarray(PALETTE)
    expected = np.asarray(PALETTE.convert("RGB")).copy()
    expected[numbers == numbers[0, 0]] = 255
    return {"transparency": int(numbers[0, 0])}, expected


KEY, KEY_ON_WHITE = clear_palette()
MODES = {  # name: (image, format, how it is saved, what should be seen)
    "RGB": (RGB, "PNG", {}, PIXELS),
    "L": (picture(GRAY), "PNG", {}, three(GRAY)),
    "1": (picture(GRAY > 100), "PNG", {}, three(np.where(GRAY > 100, 255, 0))),
    "LA": (
        PillowImage.merge("LA", [picture(GRAY), picture(OPACITY)]),
        "PNG",
        {},
        on_white(three(GRAY), OPACITY),
    ),
    "RGBA": (picture(np.dstack([PIXELS, OPACITY])), "PNG", {}, on_white(PIXELS, OPACITY)),
    "P": (PALETTE, "PNG", {}, np.asarray(PALETTE.convert("RGB"))),
    "P, one color clear": (PALETTE, "GIF", KEY, KEY_ON_WHITE),
    "RGB, one color clear": (
        RGB,
        "PNG",
        {"transparency": tuple(PIXELS[0, 0].tolist())},
        np.where((PIXELS == PIXELS[0, 0]).all(-1, keepdims=True), 255, PIXELS),
    ),
    "I;16": (picture(SIXTEEN), "PNG", {}, three((SIXTEEN / 257).round())),
    "I;16 TIFF": (picture(SIXTEEN), "TIFF", {}, three((SIXTEEN / 257).round())),
    "CMYK": (
        PillowImage.merge("CMYK", [*picture(255 - PIXELS).split(), picture(0 * GRAY)]),
        "TIFF",
        {},
        PIXELS,
    ),
    "animated GIF": (
        PALETTE,
        "GIF",
        {"save_all": True, "append_images": [picture(255 - PIXELS)]},
        np.asarray(PALETTE.convert("RGB")),
    ),
    "animated WebP": (
        RGB,
        "WEBP",
        {"save_all": True, "append_images": [picture(255 - PIXELS)], "lossless": True},
        PIXELS,
    ),
    **{
        f"turned {n}": (
            picture(np.ascontiguousarray(turn(PIXELS))),
            "PNG",
            {"exif": orientation(n)},
            PIXELS,
        )
        for n, turn in TURNED.items()
    },
}


def stored(name):
    image, kind, settings, _ = MODES[name]
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return {"bytes": file.getvalue(), "path": f"{name}.{kind.lower()}"}


def pairs(*stored_images):
    rows = [
        {"image": image, "question": f"What is in {n}?", "chosen": "a cup.", "rejected": "a book."}
        for n, image in enumerate(stored_images)
    ]
    return Dataset.from_list(rows, features=FEATURES)


@pytest.mark.parametrize("name", MODES)
def test_an_image_of_any_mode_is_read_as_people_see_it(name):
    seen = images.read_image(stored(name))
    assert seen.mode == "RGB"
    assert seen.size == (WIDTH, HEIGHT)
    assert np.abs(np.asarray(seen, float) - MODES[name][3]).max() <= 1


@pytest.mark.parametrize("name", MODES)
def test_training_and_inference_see_the_same_pixels_of_it(name, processor):
    raw = pairs(stored(name))
    reference = PillowImage.fromarray(np.asarray(images.read_image(stored(name))))
    expected = processor(images=[[reference]], text=["<image>"], return_tensors="pt")[
        "pixel_values"
    ]
    asked = chat.inference_batch([raw[0]["image"]], ["What?"], processor)["pixel_values"]
    opened = chat.inference_batch(
        [PillowImage.open(io.BytesIO(stored(name)["bytes"]))], ["What?"], processor
    )["pixel_values"]
    for rows in (chat.format_dataset(raw), list(chat.format_dataset(raw.to_iterable_dataset()))):
        trained = chat.training_batch([rows[0]], processor)["pixel_values"]
        assert trained.shape[0] == 2, "chosen and rejected"
        for one in (trained[:1], trained[1:], asked, opened):
            assert one.equal(expected)


def saved(kind, tag, size=(21, 13), **how):
    """Return a stored image of a format with an EXIF orientation."""
    file = io.BytesIO()
    PillowImage.new("RGB", size, "red").save(file, kind, exif=orientation(tag), **how)
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("name", MODES)
def test_the_size_is_known_without_the_pixels(name, monkeypatch, tmp_path):
    image = stored(name)
    expected = images.read_image(image).size
    if MODES[name][1] == "GIF" or name in ("RGB", "L", "1", "LA", "RGBA", "P", "I;16"):
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    assert images.image_size(image) == expected
    file = tmp_path / "image"
    file.write_bytes(image["bytes"])
    assert images.image_size({"bytes": None, "path": str(file)}) == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_the_size_is_that_of_the_upright_image(kind, tag):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image = saved(kind, tag)
    assert images.image_size(image) == images.read_image(image).size
    assert images.image_size(image) == ((13, 21) if tag >= 5 else (21, 13))


def test_a_photograph_is_not_decoded_for_its_size(monkeypatch):
    image = saved("JPEG", 6)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    assert images.image_size(image) == (13, 21)


def test_an_upright_rgb_image_is_the_image_itself():
    assert images.upright_rgb(RGB) is RGB


def test_what_has_no_scale_of_brightness_is_refused():
    for array in (np.full((2, 2), 0.5, np.float32), np.full((2, 2), 70_000, np.int32)):
        with pytest.raises(ValueError, match=r"row 3 .*mode [FI]"):
            images.upright_rgb(PillowImage.fromarray(array), "row 3")


@pytest.fixture
def bomb(monkeypatch):
    """An image too large for this low limit; Pillow itself raises at twice the limit."""
    monkeypatch.setattr(PillowImage, "MAX_IMAGE_PIXELS", 1000)
    return stored("RGB")


def test_an_image_of_too_many_pixels_is_refused_by_name(bomb, processor, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    for limit in (1000, 500):  # the image has more than this, and more than twice this
        monkeypatch.setattr(PillowImage, "MAX_IMAGE_PIXELS", limit)
        rows = chat.format_dataset(pairs(bomb, bomb))
        with pytest.raises(ValueError, match=r"RGB\.png .*What is in 1\?.*1200 pixels"):
            rows[1]
        with pytest.raises(ValueError, match=r"row 0: .*RGB\.png .*1200 pixels"):
            chat.within_budget(rows, processor, 256)
        with pytest.raises(ValueError, match=r"row 0: .*RGB\.png .*1200 pixels"):
            next(iter(chat.format_dataset(pairs(bomb).to_iterable_dataset())))


def test_so_it_is_when_a_model_is_asked(bomb, processor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PillowImage.DecompressionBombWarning)
        large = PillowImage.open(io.BytesIO(bomb["bytes"]))
    small = PillowImage.new("RGB", (8, 8))
    with pytest.raises(ValueError, match=r"image 1 .*MAX_IMAGE_PIXELS"):
        chat.inference_batch([small, large], ["a", "b"], processor)


def test_the_check_reports_it(bomb):
    small = io.BytesIO()
    PillowImage.new("RGB", (8, 8)).save(small, "PNG")
    broken = {"bytes": bomb["bytes"][:60], "path": None}
    rows = pairs({"bytes": small.getvalue(), "path": None}, bomb, bomb)
    assert preferences.check(rows) == {"image too large": [1, 2]}
    PillowImage.MAX_IMAGE_PIXELS = None  # no limit; the fixture restores it
    assert preferences.check(pairs(bomb, broken)) == {"unreadable image": [1]}


def test_a_row_without_a_readable_image_says_which():
    for image in ({"bytes": b"not an image", "path": None}, None):
        with pytest.raises(ValueError, match=r"What is in 0\?"):
            chat.format_dataset(pairs(image))[0]

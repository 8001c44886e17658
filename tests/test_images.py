"""Images in every mode and orientation: as people see them, the same in training and in inference, and bombs refused by name."""

import io
import warnings

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage

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
ACROSS, DOWN = np.meshgrid(
    np.arange(WIDTH) / (WIDTH - 1), np.arange(HEIGHT) / (HEIGHT - 1)
)  # 0 to 1: no mirror image looks the same
COLOURS = np.stack([255 * ACROSS, 255 * DOWN, 255 * (1 - ACROSS)], axis=-1).round().astype(np.uint8)
OPACITY = (255 * DOWN).round().astype(np.uint8)
GREY = (255 * ACROSS * DOWN).round().astype(np.uint8)
SIXTEEN = (65535 * ACROSS * DOWN).round().astype(np.uint16)


def three(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


def on_white(colours, opacity):
    """By the definition of opacity."""
    share = opacity[..., None] / 255
    return colours * share + 255 * (1 - share)


def picture(array, mode=None):
    image = PillowImage.fromarray(array)
    return image.convert(mode) if mode else image


def orientation(number):
    exif = PillowImage.Exif()
    exif[0x0112] = number
    return exif


RGB = picture(COLOURS)
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
    """A GIF's palette with one colour that stands for nothing, and what it looks like on white."""
    numbers = np.asarray(PALETTE)
    expected = np.asarray(PALETTE.convert("RGB")).copy()
    expected[numbers == numbers[0, 0]] = 255
    return {"transparency": int(numbers[0, 0])}, expected


KEY, KEY_ON_WHITE = clear_palette()
MODES = {  # name: (image, format, how it is saved, what should be seen)
    "RGB": (RGB, "PNG", {}, COLOURS),
    "L": (picture(GREY), "PNG", {}, three(GREY)),
    "1": (picture(GREY > 100), "PNG", {}, three(np.where(GREY > 100, 255, 0))),
    "LA": (
        PillowImage.merge("LA", [picture(GREY), picture(OPACITY)]),
        "PNG",
        {},
        on_white(three(GREY), OPACITY),
    ),
    "RGBA": (picture(np.dstack([COLOURS, OPACITY])), "PNG", {}, on_white(COLOURS, OPACITY)),
    "P": (PALETTE, "PNG", {}, np.asarray(PALETTE.convert("RGB"))),
    "P, one colour clear": (PALETTE, "GIF", KEY, KEY_ON_WHITE),
    "RGB, one colour clear": (
        RGB,
        "PNG",
        {"transparency": tuple(COLOURS[0, 0].tolist())},
        np.where((COLOURS == COLOURS[0, 0]).all(-1, keepdims=True), 255, COLOURS),
    ),
    "I;16": (picture(SIXTEEN), "PNG", {}, three((SIXTEEN / 257).round())),
    "I;16 TIFF": (picture(SIXTEEN), "TIFF", {}, three((SIXTEEN / 257).round())),
    "CMYK": (
        PillowImage.merge("CMYK", [*picture(255 - COLOURS).split(), picture(0 * GREY)]),
        "TIFF",
        {},
        COLOURS,
    ),
    "animated GIF": (
        PALETTE,
        "GIF",
        {"save_all": True, "append_images": [picture(255 - COLOURS)]},
        np.asarray(PALETTE.convert("RGB")),
    ),
    "animated WebP": (
        RGB,
        "WEBP",
        {"save_all": True, "append_images": [picture(255 - COLOURS)], "lossless": True},
        COLOURS,
    ),
    **{
        f"turned {n}": (
            picture(np.ascontiguousarray(turn(COLOURS))),
            "PNG",
            {"exif": orientation(n)},
            COLOURS,
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
    seen = images.read(stored(name))
    assert seen.mode == "RGB" and seen.size == (WIDTH, HEIGHT)
    assert np.abs(np.asarray(seen, float) - MODES[name][3]).max() <= 1


@pytest.mark.parametrize("name", MODES)
def test_training_and_inference_see_the_same_pixels_of_it(name, processor):
    raw = pairs(stored(name))
    reference = PillowImage.fromarray(np.asarray(images.read(stored(name))))
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


def test_an_upright_rgb_image_is_the_image_itself():
    assert images.upright_rgb(RGB) is RGB


def test_what_has_no_scale_of_brightness_is_refused():
    for array in (np.full((2, 2), 0.5, np.float32), np.full((2, 2), 70_000, np.int32)):
        with pytest.raises(ValueError, match=r"row 3 has mode [FI], .*save it with 8 or 16 bits"):
            images.upright_rgb(PillowImage.fromarray(array), "row 3")


@pytest.fixture
def bomb(monkeypatch):
    """A row that is too large while the limit is this low; Pillow itself would raise only at twice the limit."""
    monkeypatch.setattr(PillowImage, "MAX_IMAGE_PIXELS", 1000)
    return stored("RGB")


def test_an_image_of_too_many_pixels_is_refused_by_name(bomb, processor, monkeypatch):
    monkeypatch.setattr(PillowImage.Image, "load", lambda *_: pytest.fail("it was decoded"))
    for limit in (1000, 500):  # more than it, and more than twice of it
        monkeypatch.setattr(PillowImage, "MAX_IMAGE_PIXELS", limit)
        rows = chat.format_dataset(pairs(bomb, bomb))
        size = r"is too large: .*1200 pixels.* .*drop the row"
        with pytest.raises(
            ValueError, match=rf"^the image RGB\.png of the question 'What is in 1\?' {size}"
        ):
            rows[1]
        with pytest.raises(
            ValueError, match=rf"^row 0: the image RGB\.png of the question 'What is in 0\?' {size}"
        ):
            chat.within_budget(rows, processor, 256)
        with pytest.raises(
            ValueError, match=rf"^row 0: the image RGB\.png of the question .* {size}"
        ):
            next(iter(chat.format_dataset(pairs(bomb).to_iterable_dataset())))


def test_so_it_is_when_a_model_is_asked(bomb, processor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PillowImage.DecompressionBombWarning)
        large = PillowImage.open(io.BytesIO(bomb["bytes"]))
    with pytest.raises(
        ValueError,
        match=r"^image 1 is too large: 40 × 30 pixels, more than 1000; .*MAX_IMAGE_PIXELS",
    ):
        chat.inference_batch([PillowImage.new("RGB", (8, 8)), large], ["a", "b"], processor)


def test_the_check_reports_it(bomb):
    small = io.BytesIO()
    PillowImage.new("RGB", (8, 8)).save(small, "PNG")
    broken = {"bytes": bomb["bytes"][:60], "path": None}
    rows = pairs({"bytes": small.getvalue(), "path": None}, bomb, bomb)
    assert preferences.check(rows) == {"image too large": [1, 2]}
    PillowImage.MAX_IMAGE_PIXELS = None  # no limit
    assert preferences.check(pairs(bomb, broken)) == {"unreadable image": [1]}


def test_a_row_without_a_readable_image_says_which():
    with pytest.raises(
        ValueError, match=r"the image of the question 'What is in 0\?' cannot be read"
    ):
        chat.format_dataset(pairs({"bytes": b"not an image", "path": None}))[0]
    with pytest.raises(
        ValueError, match=r"the image of the question 'What is in 0\?' is NoneType, not an image"
    ):
        chat.format_dataset(pairs(None))[0]

"""Images in every mode and orientation are seen as people see them, and bombs are refused by name.

So they are however they are stored, with damaged metadata, and reduced to a budget of pixels.
Training and inference see the same pixels.
"""

import base64
import io
import math
import struct
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage
from PIL import ImageFile, PngImagePlugin, features

from utils import chat, images, layouts, preferences

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
    return layouts.as_rows(Dataset.from_list(rows, features=FEATURES))


def streamed(rows):
    return rows.with_format(None).to_iterable_dataset()


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
    decoded = Image().decode_example(stored(name))
    asked = chat.inference_batch([decoded], ["What?"], processor)["pixel_values"]
    opened = chat.inference_batch(
        [PillowImage.open(io.BytesIO(stored(name)["bytes"]))], ["What?"], processor
    )["pixel_values"]
    for rows in (chat.format_dataset(raw), list(chat.format_dataset(streamed(raw)))):
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
    file = io.BytesIO()
    PillowImage.new("F", (2, 2)).save(file, "PPM")
    for read in (images.read_image, images.image_size):
        with pytest.raises(ValueError, match=r"row 3 .*mode F"):
            read(file.getvalue(), "row 3")


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
            next(iter(chat.format_dataset(streamed(pairs(bomb)))))


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
    for data in (b"not an image", b""):
        image = {"bytes": data, "path": None}
        with pytest.raises(ValueError, match=r"What is in 0\?"):
            chat.format_dataset(pairs(image))[0]


RED = saved("PNG", 1)["bytes"]
RED_TEXT = base64.b64encode(RED).decode()
FORMS = {  # name: how an image is stored whose file lies at a path
    "a Pillow image": lambda path: PillowImage.open(path),
    "bytes": lambda path: RED,
    "bytes without a path": lambda path: {"bytes": RED},
    "a path": str,
    "a path beside no bytes": lambda path: {"bytes": None, "path": str(path)},
    "a path beside empty bytes": lambda path: {"bytes": b"", "path": str(path)},
    "a path object": lambda path: {"path": path},
    "base64": lambda path: RED_TEXT,
    "base64 in lines": lambda path: base64.encodebytes(RED).decode(),
    "base64 in place of a path": lambda path: {"bytes": None, "path": RED_TEXT},
    "a data address": lambda path: f"data:image/png;base64,{RED_TEXT}",
}


@pytest.fixture(scope="module")
def red(tmp_path_factory):
    """Return the path of an image file."""
    path = tmp_path_factory.mktemp("red") / "photo.png"
    path.write_bytes(RED)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_an_image_is_read_in_every_form(form, red):
    image = FORMS[form](red)
    expected = PillowImage.open(red).convert("RGB")
    assert images.read_image(image).tobytes() == expected.tobytes()
    assert images.image_size(image) == expected.size
    assert images.file_bytes(image) == (None if form == "a Pillow image" else RED)


def test_bytes_win_over_a_file_of_that_name(red, monkeypatch):
    monkeypatch.chdir(red.parent)
    blue = stored("RGB")["bytes"]
    image = {"bytes": blue, "path": red.name}
    assert images.read_image(image).size == images.image_size(image) == (WIDTH, HEIGHT)
    assert images.file_bytes(image) == blue


@pytest.mark.parametrize("image", [None, {}, {"bytes": None, "path": None}, b"", "", {"path": ""}])
def test_where_there_is_no_image_the_error_says_so(image):
    for read in (images.read_image, images.image_size):
        with pytest.raises(ValueError, match=r"row 3 .*there is no image"):
            read(image, "row 3")
    assert images.file_bytes(image) is None


NO_IMAGES = {
    "a number": (7, "int"),
    "the path of a missing file": ("photos/lost.png", "photos/lost.png"),
    "a missing file without an ending": ("photos/lost1", "photos/lost1"),
    "a folder": (str(Path(__file__).parent), "neither a file"),
    "base64 that is cut off": (RED_TEXT[:-3], "neither a file"),
    "base64 with a stray sign": ("!" + RED_TEXT, "neither a file"),
    "a text with NUL": ("a\0b", "neither a file"),
    "a data address without data": ("data:image/png;base64,", "neither a file"),
    "a page": ("HTTPS://host/a.png", "is a URL"),
    "a page behind another name": ("ftp://host/a.png", "neither a file"),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_leads_to_no_image_is_refused_by_name(kind):
    image, reason = NO_IMAGES[kind]
    for read in (images.read_image, images.image_size):
        with pytest.raises(ValueError, match=f"row 3 .*{reason}"):
            read(image, "row 3")
    assert images.file_bytes(image) is None


@pytest.mark.parametrize("start", ["", "data:image/png;base64,", "https://"])
@pytest.mark.parametrize("letter", ["A", "?"])  # base64 of nonsense, and no base64
def test_an_error_shows_only_the_beginning_of_a_long_text(start, letter):
    with pytest.raises(ValueError, match="row 3") as caught:
        images.read_image(start + letter * 100_000, "row 3")
    assert str(caught.value).count(letter) <= 80


def test_whatever_a_damaged_file_raises_the_error_names_the_image(monkeypatch):
    def fail(image):
        raise RuntimeError("no color planes")

    opened = PillowImage.open(io.BytesIO(RED))
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    for read in (images.read_image, images.upright_rgb):
        with pytest.raises(ValueError, match=r"row 3 .*no color planes"):
            read(opened, "row 3")
    with pytest.raises(ValueError, match=r"row 3 .*no color planes"):
        images.read_image(RED, "row 3")


def exif_block(*entries):
    """Return a block of EXIF as a camera writes it. An entry is (tag, type, count, 4 bytes)."""
    data = b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries))
    for entry in entries:
        data += struct.pack("<HHL4s", *entry)
    return data + bytes(4)


SIX = (0x0112, 3, 1, b"\6\0\0\0")
NEGATIVE_WIDTH = exif_block((0x0100, 9, 1, struct.pack("<l", -5)), SIX)
UNREADABLE = {
    "no TIFF header": b"Exif\0\0nonsense",
    "half a header": b"Exif\0\0II*\0\x08",
    "no entries": b"Exif\0\0II*\0\x08\0\0\0",
    "an orientation in letters": exif_block((0x0112, 2, 4, b"six\0")),
    "an orientation of zero parts": exif_block((0x0112, 5, 1, b"\x08\0\0\0")),
    "an orientation of 9": exif_block((0x0112, 3, 1, b"\x09\0\0\0")),
}


def with_exif(kind, block):
    file = io.BytesIO()
    RGB.save(file, kind, exif=block, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:.*[Cc]orrupt EXIF")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damage", UNREADABLE)
def test_with_damaged_metadata_the_image_is_seen_as_it_is_stored(kind, damage):
    data = with_exif(kind, UNREADABLE[damage])
    seen = images.read_image(data)
    assert seen.tobytes() == images.read_image(with_exif(kind, b"")).tobytes()
    assert images.image_size(data) == seen.size
    assert images.upright_rgb(PillowImage.open(io.BytesIO(data))).tobytes() == seen.tobytes()
    assert images.upright_rgb(seen) is seen


def test_so_it_is_with_a_profile_that_is_no_hexadecimal_number():
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n 4\nnot hexadecimal")
    file = io.BytesIO()
    RGB.save(file, "PNG", pnginfo=text)
    assert images.read_image(file.getvalue()).tobytes() == RGB.tobytes()
    assert images.image_size(file.getvalue()) == RGB.size


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damage_beside_the_orientation_does_not_matter(kind):
    data = with_exif(kind, NEGATIVE_WIDTH)
    seen = images.read_image(data)
    expected = images.read_image(with_exif(kind, b"")).transpose(PillowImage.Transpose.ROTATE_270)
    assert seen.tobytes() == expected.tobytes()
    assert images.image_size(data) == seen.size == (HEIGHT, WIDTH)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("how", [{"exif": orientation(n)} for n in range(1, 9)] + [{"xmp": XMP}])
def test_an_upright_image_is_not_turned_again(how):
    file = io.BytesIO()
    RGB.save(file, "WEBP", **how)
    image = PillowImage.open(file)
    assert images.upright_rgb(image).size == images.image_size(file.getvalue())
    seen = images.upright_rgb(image)
    assert images.upright_rgb(seen) is seen
    assert images.upright_rgb(seen.copy()).size == seen.size


def container(major, *others):
    """Return the beginning of a file of these brands."""
    brands = major + bytes(4) + b"".join(others)
    return struct.pack(">L", 8 + len(brands)) + b"ftyp" + brands + bytes(64)


@pytest.fixture
def no_heic(monkeypatch):
    """Let Pillow forget a reader of HEIC photographs; the real one, if any, comes back."""
    PillowImage.init()
    monkeypatch.setattr(PillowImage, "ID", [name for name in PillowImage.ID if name != "HEIF"])
    monkeypatch.setattr(PillowImage, "OPEN", dict(PillowImage.OPEN))
    PillowImage.OPEN.pop("HEIF", None)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"])
def test_a_photograph_that_needs_a_package_says_which(brand, no_heic):
    photograph = {"bytes": container(brand, b"mif1", b"heic"), "path": None}
    for read in (images.read_image, images.image_size):
        with pytest.raises(ValueError, match=r"a\.heic .*HEIC photograph.*pip install pillow-heif"):
            read(photograph, "a.heic")


def test_only_such_a_photograph_needs_it(no_heic):
    assert images.read_image(RED).size == (21, 13)
    damaged = container(b"mif1", b"avif")
    with pytest.raises(ValueError) as caught:
        images.read_image(damaged, "a.avif")
    assert "HEIC" not in str(caught.value)


def test_the_package_is_loaded_once_when_it_is_needed(no_heic, monkeypatch):
    loaded = []

    def register():
        loaded.append("HEIF")
        PillowImage.register_open("HEIF", lambda *_: RGB.copy(), lambda start: b"heic" in start)

    package = SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    # They come first, because the package also takes an AVIF file for its own.
    monkeypatch.setattr(PillowImage, "init", lambda: loaded.append("Pillow's own"))
    images.read_image(RED)
    assert loaded == []
    for _ in range(2):
        assert images.read_image(container(b"heic", b"heic")).tobytes() == RGB.tobytes()
        assert images.image_size(container(b"heic", b"heic")) == RGB.size
    assert loaded == ["Pillow's own", "HEIF"]


@pytest.fixture
def pillow_heif(no_heic, monkeypatch):
    """Return the real package, not registered yet."""
    monkeypatch.delitem(sys.modules, "pillow_heif")
    return pytest.importorskip("pillow_heif")


@pytest.mark.parametrize("tag", [1, 3, 6, 8])
def test_a_heic_photograph_is_seen_upright(tag, pillow_heif):
    upright = RGB.resize((96, 64))
    held = upright
    if tag in TURNED:
        held = picture(np.ascontiguousarray(TURNED[tag](np.asarray(upright))))
    file = io.BytesIO()
    heic = pillow_heif.from_pillow(held)
    heic.save(file, quality=95, exif=orientation(tag).tobytes())
    seen = images.read_image(file.getvalue())
    assert images.image_size(file.getvalue()) == seen.size == upright.size
    assert np.abs(np.asarray(seen, float) - np.asarray(upright)).mean() < 5


def test_pillow_still_reads_avif_then(pillow_heif):
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    images.add_heic("a.heic")
    file = io.BytesIO()
    RGB.save(file, "AVIF")
    shared = file.getvalue()[:8] + b"mif1" + file.getvalue()[12:]  # a brand of both formats
    assert images.read_image(shared).size == RGB.size


@pytest.fixture(scope="module", autouse=True)
def small_images_count_as_photographs():
    """Images here are small, so that they are read quickly."""
    kept = images.NO_PHOTOGRAPH
    images.NO_PHOTOGRAPH = 0
    yield
    images.NO_PHOTOGRAPH = kept


SIDES = st.integers(1, 60)
BUDGETS = st.integers(1, 4000)


@given(SIDES, SIDES, BUDGETS, st.integers(1, 8), st.sampled_from(["JPEG", "PNG", "TIFF"]))
def test_the_reduced_size_is_known_beforehand(width, height, budget, tag, kind):
    image = saved(kind, tag, (width, height))
    seen = images.read_image(image, pixel_budget=budget)
    assert images.image_size(image, pixel_budget=budget) == seen.size
    assert seen.width * seen.height <= budget
    whole = images.read_image(image)
    assert images.image_size(whole, pixel_budget=budget) == seen.size
    if whole.width * whole.height <= budget:
        assert seen.size == whole.size
        assert seen.tobytes() == whole.tobytes()


@given(st.integers(1, 10**5), st.integers(1, 10**5), st.integers(1, 10**7))
def test_a_reduced_size_keeps_shape_and_budget(width, height, budget):
    across, down = images.reduced_size(width, height, budget)
    assert images.reduced_size(height, width, budget) == (down, across)
    assert across * down <= budget
    if width * height <= budget:
        assert (across, down) == (width, height)
        return
    scale = math.sqrt(budget / (width * height))
    if min(width, height) * scale >= 1:
        assert width * scale - 1.001 < across <= width * scale + 0.001
        assert height * scale - 1.001 < down <= height * scale + 0.001
    else:
        assert 1 == min(across, down)
        assert max(across, down) == min(math.floor(max(width, height) * scale), budget)


def test_what_is_no_photograph_is_left_to_the_processor(monkeypatch):
    monkeypatch.setattr(images, "NO_PHOTOGRAPH", 1_000_000)
    assert images.reduced_size(1000, 1000, 5000) == (1000, 1000)
    across, down = images.reduced_size(1000, 1001, 5000)
    assert across * down <= 5000


def test_without_a_budget_every_size_is_kept():
    assert images.reduced_size(10**6, 10**6, None) == (10**6, 10**6)


def photograph(tag=1, mode="RGB"):
    """Return (a JPEG file's bytes, stored with an orientation, the image that people see)."""
    upright = RGB.resize((403, 302), PillowImage.Resampling.BICUBIC).convert(mode)
    held = upright
    if tag in TURNED:
        held = picture(np.ascontiguousarray(TURNED[tag](np.asarray(upright))))
    file = io.BytesIO()
    held.save(file, "JPEG", quality=95, exif=orientation(tag))
    return file.getvalue(), upright


@pytest.mark.parametrize("budget", [1000, 7000, 60_000])
@pytest.mark.parametrize("tag", range(1, 9))
def test_a_reduced_photograph_shows_the_same(tag, budget):
    data, upright = photograph(tag)
    seen = images.read_image(data, pixel_budget=budget)
    expected = upright.resize(seen.size, PillowImage.Resampling.LANCZOS)
    assert np.abs(np.asarray(seen, float) - np.asarray(expected)).mean() < 1
    assert images.upright_rgb(seen) is seen


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_so_does_one_of_another_mode(mode):
    data, upright = photograph(mode=mode)
    seen = images.read_image(data, pixel_budget=7000)
    expected = upright.convert("RGB").resize(seen.size, PillowImage.Resampling.LANCZOS)
    assert seen.mode == "RGB"
    assert np.abs(np.asarray(seen, float) - np.asarray(expected)).mean() < 2


def test_a_photograph_is_decoded_at_the_reduced_scale(monkeypatch):
    load = ImageFile.ImageFile.load
    decoded = []
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda image: (decoded.append(image.size), load(image))[1]
    )
    data, _ = photograph(6)
    seen = images.read_image(data, pixel_budget=7000)
    assert seen.size == (96, 72)
    assert decoded[0] == (76, 101)  # a quarter of 302 × 403, rounded up
    decoded.clear()
    assert images.image_size(data, pixel_budget=7000) == seen.size
    assert decoded == []


def test_a_photograph_that_is_cut_off_is_refused_at_a_reduced_scale_too():
    data, _ = photograph()
    start = data.index(b"\xff\xda")
    for length in (*range(start - 9, len(data) - 20, 500), len(data) - 20):
        for budget in (None, 1000, 7000, 60_000):
            with pytest.raises(ValueError, match="row 3 cannot be read"):
                images.read_image(data[:length], "row 3", budget)


def test_the_image_of_the_caller_is_left_as_it_is():
    data, _ = photograph(6)
    image = PillowImage.open(io.BytesIO(data))
    seen = images.read_image(image, pixel_budget=7000)
    assert image.size == (302, 403)
    assert seen.size == images.image_size(image, pixel_budget=7000) == (96, 72)


def test_a_bomb_is_refused_whatever_the_budget(bomb, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    for read in (images.read_image, images.image_size):
        with pytest.raises(ValueError, match=r"row 3 .*1200 pixels"):
            read(bomb, "row 3", 10)

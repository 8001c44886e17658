"""The memory chart and its sliders: what moves redraws, and what remains without a kernel says the same."""

import html
import re

import pytest

from utils import sliders
from utils.memory import estimate
from utils.settings import PROFILES
from utils.sliders import memory_figure, memory_html, memory_sliders, readable

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def shown(monkeypatch):
    """The bundles that were displayed, and the widgets that were made, by description."""
    bundles, controls = [], {}
    monkeypatch.setattr(sliders, "display", lambda bundle, raw: bundles.append(bundle))
    for kind in ("Dropdown", "IntSlider", "HTML"):
        original = getattr(sliders.ipywidgets, kind)

        def made(original=original, **options):
            widget = original(**options)
            controls[options.get("description", "page")] = widget
            return widget

        monkeypatch.setattr(sliders.ipywidgets, kind, made)
    return bundles, controls


def without_script(page):
    assert page.count(f' onload="{sliders.KEYBOARD}"') == 1
    return page.replace(f' onload="{sliders.KEYBOARD}"', "")


def alt(page):
    return html.unescape(re.search(r'alt="([^"]*)"', page)[1])


def test_without_a_kernel_the_profiles_chart_remains(shown):
    bundles, controls = shown
    memory_sliders(PROFILES["idefics2"])
    bundle = bundles[0]
    assert bundle[WIDGET_VIEW]["model_id"]
    assert bundle["text/html"] == memory_html(PROFILES["idefics2"], "nf4", 640), (
        "what is saved holds no script"
    )
    assert without_script(controls["page"].value) == bundle["text/html"]
    assert bundle["text/plain"].strip()
    assert alt(bundle["text/html"]).startswith("idefics2-8b, weights in nf4, LoRA rank 16")


@pytest.mark.parametrize(
    ("control", "value"), [("Weights", "bf16"), ("LoRA rank", 64), ("Pixels", 1500), ("Pairs", 8)]
)
def test_a_moved_slider_redraws_the_chart(shown, control, value):
    _, controls = shown
    memory_sliders(PROFILES["smolvlm"])
    before = controls["page"].value
    controls[control].value = value
    after = controls["page"].value
    picture = re.compile(r"base64,([^\"]+)")
    assert picture.search(before)[1] != picture.search(after)[1]
    assert alt(before).rpartition("total")[2] != alt(after).rpartition("total")[2]


def test_another_profile_brings_its_own_values(shown):
    _, controls = shown
    memory_sliders(PROFILES["embedded"])
    controls["Profile"].value = "qwen"
    qwen = PROFILES["qwen"]
    assert (controls["LoRA rank"].value, controls["Pairs"].value) == (
        qwen.lora_rank,
        qwen.batch_size,
    )
    assert without_script(controls["page"].value) == memory_html(
        qwen, "nf4", controls["Pixels"].value
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_the_bars_are_the_estimate_and_end_at_its_total(profile):
    components = estimate(PROFILES[profile])
    axes = memory_figure(components).axes[0]
    total = sum(components.values())
    unit = 1e9 if total >= 1e9 else 1e6
    *bars, last = axes.patches
    assert [bar.get_width() * unit for bar in bars] == pytest.approx(list(components.values()))
    assert last.get_width() * unit == pytest.approx(total) and bars[-1].get_x() + bars[
        -1
    ].get_width() == pytest.approx(last.get_width())
    assert ("GB" if unit == 1e9 else "MB") in axes.get_xlabel()


def test_the_chart_reaches_to_the_gpu_that_it_fits_into():
    lines = [line.get_xdata()[0] for line in memory_figure({"weights": 16.8e9}).axes[0].lines]
    assert lines == [15, 24]
    assert len(memory_figure({"weights": 160e9}).axes[0].lines) == 3
    assert not memory_figure({"weights": 2e6}).axes[0].lines


def test_bytes_are_readable():
    assert [readable(count) for count in (0, 26_112, 115_600_000, 6.447e9)] == [
        "0",
        "26.1 kB",
        "115.6 MB",
        "6.4 GB",
    ]


def test_negative_bytes_are_refused():
    with pytest.raises(ValueError, match="cannot be negative"):
        memory_figure({"weights": -1})

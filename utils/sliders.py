"""A bar chart of what a training step needs in memory, and a widget whose sliders redraw it."""

import dataclasses

import ipywidgets
from IPython.display import display

from utils.memory import PRECISIONS, estimate, image_side, image_tokens
from utils.plots import BLUE, GREY, VERMILION, figure_html, new_figure
from utils.settings import PROFILES

DEVICES = {"T4": 15e9, "24 GB": 24e9, "80 GB": 80e9}  # bytes; a Colab T4 has about 15 GB to give
# What ipywidgets leaves out: the handles of its sliders have no name that a screen reader could say, and JupyterLab takes arrow
# keys and letters in its menus for its own commands. Done once the chart is there, and again for a page that was still being built.
KEYBOARD = """[0, 1000].forEach(wait => setTimeout(() => {
const all = selector => this.closest('.widget-vbox')?.querySelectorAll(selector) ?? [];
for (const handle of all('[role=slider]')) handle.ariaLabel = handle.closest('.widget-slider').querySelector('label').textContent;
for (const menu of all('select')) menu.dataset.lmSuppressShortcuts = 'true';
}, wait))"""
TEXT_TOKENS = 256  # question and answer of the rows that the chart is for


def readable(count):
    """`count` bytes as text in units of 1000: "6.4 GB", "115.6 MB", "26.1 kB" or "0"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1, "kB")):
        if count >= unit:
            return f"{count / max(unit, 1e3):.1f} {name}"
    return "0"


def memory_figure(components, title=""):
    """`components` ({name: bytes}) as bars that begin where the one before ends, so that the last one ends at the total.

    Dotted lines are what common GPUs hold, where the chart reaches that far. Raises ValueError for a negative number of bytes.
    """
    if any(count < 0 for count in components.values()):
        raise ValueError(f"bytes cannot be negative: {components}")
    total = sum(components.values())
    unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    beyond = [
        size for size in DEVICES.values() if size >= total >= 1e9
    ]  # the chart reaches as far as what it fits into
    right = max(1.3 * total, 1.1 * min(beyond, default=0)) / unit
    figure, axes = new_figure(height=1.1 + 0.32 * (len(components) + 1))
    end = 0.0
    for component, count in components.items():
        axes.barh(component, count / unit, left=end, color=BLUE)
        end += count / unit
        axes.text(end, component, f" {readable(count)}", va="center")
    axes.barh("total", end, color=GREY)
    axes.text(end, "total", f" {readable(total)}", va="center", weight="bold")
    for device, size in DEVICES.items():
        if size / unit < right:
            axes.axvline(size / unit, color=VERMILION, linestyle=":")
            side = (
                "right" if device == "T4" else "left"
            )  # two that are close to each other stay legible
            axes.text(size / unit, -0.7, device, color=VERMILION, ha=side, va="bottom", fontsize=8)
    axes.set(
        xlabel=f"{name} at the peak of a step", xlim=(0, right), ylim=(len(components) + 0.6, -0.6)
    )
    axes.set_title(title, pad=16, fontsize=9)
    axes.grid(axis="y", visible=False)
    return figure


def memory_html(settings, precision, side):
    """The chart of `estimate` as an <img> whose alternative text holds the same numbers."""
    components = estimate(settings, TEXT_TOKENS, precision, side)
    what = (
        f"{settings.model.split('/')[-1]}, weights in {precision}, LoRA rank {settings.lora_rank}"
    )
    batch = f"pairs a step: {settings.batch_size}; tokens a row: {image_tokens(settings, side)} of the image, {TEXT_TOKENS} of text"
    numbers = ", ".join(f"{name} {readable(count)}" for name, count in components.items())
    alt = f"{what}, {batch}: {numbers}; total {readable(sum(components.values()))}"
    return figure_html(memory_figure(components, f"{what}\n{batch}"), alt)


def memory_sliders(settings):
    """Display sliders that redraw the chart; without a kernel, the chart for the values of the profile `settings` remains.

    Choosing another profile moves the sliders to its values.
    """
    profiles = PROFILES | {settings.profile: settings}
    model = ipywidgets.Dropdown(
        options=list(profiles), value=settings.profile, description="Profile"
    )
    precision = ipywidgets.Dropdown(
        options=PRECISIONS, value="nf4" if settings.four_bit else "bf16", description="Weights"
    )
    rank = ipywidgets.IntSlider(
        value=settings.lora_rank, min=1, max=256, description="LoRA rank", continuous_update=False
    )
    longest = max(1960, *map(image_side, profiles.values()))
    side = ipywidgets.IntSlider(
        value=image_side(settings),
        min=28,
        max=longest,
        description="Pixels",
        continuous_update=False,
    )
    pairs = ipywidgets.IntSlider(
        value=settings.batch_size, min=1, max=32, description="Pairs", continuous_update=False
    )

    def render():
        changed = dataclasses.replace(
            profiles[model.value], lora_rank=rank.value, batch_size=pairs.value
        )
        return memory_html(changed, precision.value, side.value)

    def take_values(change):
        chosen = profiles[change["new"]]
        rank.value, side.value, pairs.value = (
            chosen.lora_rank,
            image_side(chosen),
            chosen.batch_size,
        )

    def show_chart(picture):
        page.value = picture.replace("<img ", f'<img onload="{KEYBOARD}" ', 1)

    first = render()
    page = ipywidgets.HTML()
    controls = [model, precision, rank, side, pairs]
    model.observe(take_values, "value")
    show_chart(first)
    for control in controls:
        control.observe(lambda change: show_chart(render()), "value")
    box = ipywidgets.VBox([*controls, page])
    # display(box) offers no HTML to those who see the notebook without a kernel, hence a bundle of our own.
    view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    text = "An estimate of memory by component; run this cell to move the sliders."
    display(
        {"application/vnd.jupyter.widget-view+json": view, "text/html": first, "text/plain": text},
        raw=True,
    )

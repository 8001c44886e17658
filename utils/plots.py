"""Draw the figures, in one style.

The colors are Okabe and Ito's, which color-blind readers can tell apart. Figures have a white card,
so that they can be read on light and dark pages. Every function returns its figure; as the last
line of a cell it is shown there, once.
"""

import base64
import functools
import io
import math
import re
from html import escape

import matplotlib.pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from utils.paired_statistics import holm

BLUE = "#0072B2"
GREEN = "#009E73"
VERMILION = "#D55E00"
GRAY = "#6B6B6B"
STYLE = {
    "figure.dpi": 100,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "text.parse_math": False,  # a $ in a model's name begins no formula
    "axes.prop_cycle": plt.cycler(color=[BLUE, VERMILION, GREEN, GRAY]),
}
# What is better, as evaluation.METRICS says it → the heading of the metric's group.
HEADINGS = {
    "lower": "← lower is better",
    "higher": "→ higher is better",
    "": "nearer to the truth is better",
}
DEVICES = {"T4": 15e9, "24 GB": 24e9, "80 GB": 80e9}  # bytes; a Colab T4 has about 15 GB to give


class SmallPNG(FigureCanvasAgg):
    """Write PNG in the 64 colors that cover the figure best, at a third of the usual size."""

    def print_png(self, filename_or_obj, **options):
        self.draw()
        image = Image.frombuffer("RGBA", self.get_width_height(), self.buffer_rgba())
        small = image.convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE)
        small.save(filename_or_obj, "png")


def new_figure(columns=1, height=3.0, rows=1):
    """Return a figure of `height` inches in the common style, and its Axes.

    The Axes are an array if there are several.
    """
    width = 6 if columns == 1 else 9.6
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained")
    # pyplot forgets the figure, or the notebook would show it a second time below the cell.
    plt.close(figure)
    SmallPNG(figure)
    # Jupyter's own <img> of a figure has no alternative text.
    figure._repr_html_ = functools.partial(figure_html, figure)
    return figure, axes


def figure_html(figure, alt=None):
    """Return `figure` as an <img> with the alternative text `alt`, by default its own words."""
    if alt is None:
        words = ["Figure"]
        for text in figure.findobj(Text):
            line = " ".join(text.get_text().split())
            has_letter = re.search(r"[^\W\d]", line)
            if has_letter and line not in words:
                words.append(line)
        alt = "; ".join(words)
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<img alt="{escape(alt, quote=True)}" style="max-width:100%" '
        f'src="data:image/png;base64,{data}">'
    )


# The data set


def length_histogram(chosen, rejected):
    """Draw how many words the answers have, and their mean.

    `chosen`, `rejected`: sequences of strings. Raises ValueError if one is empty.
    """
    if len(chosen) == 0 or len(rejected) == 0:
        raise ValueError(
            f"there are {len(chosen)} chosen and {len(rejected)} rejected answers: "
            "a histogram needs some of both"
        )
    chosen_lengths = [len(text.split()) for text in chosen]
    rejected_lengths = [len(text.split()) for text in rejected]
    longest = max(chosen_lengths + rejected_lengths)
    # Whole words: bins 1.3 words wide would hold one length or two, and look jagged.
    width = math.ceil((longest + 1) / 30)
    edges = [edge - 0.5 for edge in range(0, longest + 1 + width, width)]

    figure, axes = new_figure()
    for name, lengths, color, line in (
        ("chosen", chosen_lengths, GREEN, "-"),
        ("rejected", rejected_lengths, VERMILION, "--"),
    ):
        axes.hist(
            lengths,
            edges,
            histtype="stepfilled",
            facecolor=(color, 0.35),
            edgecolor=color,
            linestyle=line,
        )
        mean = sum(lengths) / len(lengths)
        axes.axvline(mean, color=color, linestyle=line, label=f"{name}, mean {mean:.1f}")
    axes.set(xlabel="words per answer", ylabel="answers")
    axes.legend(frameon=False)
    return figure


# Training


def training_curves(log):
    """Draw loss, reward accuracy, reward margin and rewards by optimizer step.

    `log`: trainer.state.log_history. Lines are training, dots are held-out pairs. A panel without
    values says so. Rewards and not log-probabilities: every point is about other pairs, which only
    the difference from the reference makes comparable.
    """
    figure, panels = new_figure(columns=2, height=5.2, rows=2)
    loss, accuracy, margin, rewards = panels.flat
    draw_panel(loss, log, ["loss"])
    loss.set(title="Loss", ylabel="DPO loss")
    draw_level(loss, math.log(2), "ln 2: no preference yet")
    draw_panel(accuracy, log, ["rewards/accuracies"])
    accuracy.set(title="Reward accuracy", ylabel="share of pairs", ylim=(-0.03, 1.03))
    draw_level(accuracy, 0.5, "chance, if none tie")
    draw_panel(margin, log, ["rewards/margins"])
    margin.set(title="Reward margin", ylabel="chosen − rejected (β × nats)")
    draw_panel(rewards, log, ["rewards/chosen", "rewards/rejected"])
    rewards.set(title="Rewards", ylabel="policy − reference (β × nats)")
    draw_level(rewards, 0)

    # The legend shows the first line of each kind.
    kinds = {}
    for axes in panels.flat:
        for line in axes.lines:
            label = line.get_label()
            if label.startswith("eval_"):
                kinds.setdefault("held out", line)
            elif not label.startswith("_"):  # matplotlib's own names begin so
                kinds.setdefault("training", line)
    if len(kinds) == 2:
        figure.legend(kinds.values(), kinds, loc="outside upper center", ncols=2, frameon=False)
    return figure


def draw_panel(axes, log, keys):
    """Draw the values of each of `keys` in `log` by step, or say that there are none."""
    axes.set_xlabel("optimizer step")
    for key in keys:
        draw_series(axes, log, key)
    if not axes.lines:
        axes.text(
            0.5,
            0.5,
            "\n".join(["nothing in the log for", *keys]),
            transform=axes.transAxes,
            ha="center",
            va="center",
            color=GRAY,
        )
        axes.set(xticks=[], yticks=[])


def draw_series(axes, log, key):
    """Draw the training values of `key` in `log` as a line, the held-out ones as dots."""
    color = BLUE
    line = "-"
    if key == "rewards/chosen":
        color = GREEN
    if key == "rewards/rejected":
        color = VERMILION
        line = "--"
    steps = [entry["step"] for entry in log if key in entry]
    values = [entry[key] for entry in log if key in entry]
    if steps:
        axes.plot(
            steps,
            values,
            color=color,
            label=key,
            linestyle=line,
            linewidth=1.3,
            marker=".",
            markersize=2,
        )
        if key in ("rewards/chosen", "rewards/rejected"):
            axes.annotate(
                key.removeprefix("rewards/"),
                (steps[-1], values[-1]),
                (0, 6),
                textcoords="offset points",
                color=color,
                ha="right",
            )
    held_out_key = f"eval_{key}"
    steps = [entry["step"] for entry in log if held_out_key in entry]
    values = [entry[held_out_key] for entry in log if held_out_key in entry]
    if steps:
        axes.plot(
            steps,
            values,
            color=color,
            label=held_out_key,
            linestyle="",
            marker="o",
            markeredgecolor="white",
        )


def draw_level(axes, value, meaning=""):
    """Draw a dotted line at `value` and say its `meaning`, in a panel that shows something."""
    if not axes.lines:
        return
    axes.axhline(value, color=GRAY, linestyle=":", zorder=1)
    axes.text(
        1,
        value,
        meaning,
        transform=axes.get_yaxis_transform(),
        ha="right",
        va="bottom",
        fontsize=8,
        color=GRAY,
    )


# Evaluation


def before_after(evaluated):
    """Draw each metric of the base and the tuned model in percent, grouped by what is better.

    Beside it are the difference in points, its 95% interval and a verdict, which takes into account
    how many metrics are looked at. `evaluated`: what `evaluation.compare` returns. Only fractions
    are drawn, so not the number of words. Raises ValueError if there is no known metric, or one of
    only one model.
    """
    # Evaluation loads torch and transformers, which no other figure needs.
    from utils.evaluation import METRICS

    names = [name for name in METRICS if name in evaluated["base"] and METRICS[name].unit == "%"]
    if not names:
        raise ValueError("base has no known metric: evaluate both models again")
    for name in names:
        for key in ("tuned", "difference"):
            if name not in evaluated[key]:
                raise ValueError(f"{key} has no {name}, but base has: evaluate both models again")

    # A metric in which nothing could be counted has no p-value.
    known = {}
    for name, difference in evaluated["difference"].items():
        if not math.isnan(difference["p"]):
            known[name] = difference["p"]
    adjusted = holm(known)

    figure, axes = new_figure(height=1.5 + 0.5 * len(names))
    figure.set_figwidth(11)
    write = functools.partial(write_beside, axes)
    y = 0.0
    for better, heading in HEADINGS.items():
        group = [name for name in names if METRICS[name].better == better]
        if group:
            write(-0.02, y + 0.1, heading, ha="right", style="italic", color=GRAY)
            y += 0.8
        for name in group:
            metric = METRICS[name]
            write(-0.02, y - 0.17, metric.title, ha="right", weight="bold")
            write(-0.02, y + 0.22, metric.meaning, ha="right", fontsize=8, color=GRAY)
            difference = evaluated["difference"][name]
            low = 100 * difference["low"]
            high = 100 * difference["high"]
            word, color = verdict(better, low, high, adjusted.get(name, 1.0))
            text = f"{100 * difference['mean']:+.1f}  [{low:+.1f}, {high:+.1f}]  {word}"
            write(1.02, y, text.replace("-", "−"), color=color)
            base = 100 * evaluated["base"][name]
            tuned = 100 * evaluated["tuned"][name]
            draw_change(axes, y, base, tuned, color)
            y += 1
    heading = "difference in points, 95% interval;\nverdict after Holm's correction"
    write(1.02, -0.3, heading, fontsize=8.5, color=GRAY)

    # Two markers outside the range, for the legend.
    draw_base(axes, [], [], label="base model")
    axes.plot([], [], "o", color=GRAY, markersize=9, label="tuned model")
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    axes.set(xlabel="percent", xlim=(-9, 109), ylim=(y - 0.4, -0.6))
    axes.set(xticks=range(0, 101, 20), yticks=[])
    axes.spines["left"].set_visible(False)
    return figure


def write_beside(axes, x, y, text, **style):
    """Write `text` in row `y`; `x` counts in widths of the panel, so it may be beside it."""
    axes.text(x, y, text, transform=axes.get_yaxis_transform(), va="center", **style)


def draw_base(axes, x, y, **options):
    """Draw the hollow dot of the base model."""
    axes.plot(
        x,
        y,
        "o",
        color="white",
        markeredgecolor=GRAY,
        markeredgewidth=1.6,
        markersize=8,
        **options,
    )


def draw_change(axes, y, base, tuned, color):
    """Draw a line from `base` to `tuned` (percent) in row `y`, with both values at its ends."""
    axes.plot([base, tuned], [y, y], color=color, linewidth=3, alpha=0.45)
    draw_base(axes, base, y, zorder=3)
    axes.plot(tuned, y, "o", color=color, markersize=9, zorder=3)
    label = functools.partial(axes.annotate, textcoords="offset points", va="center")
    left = min(base, tuned)
    right = max(base, tuned)
    label(f"{left:.1f}", (left, y), (-8, 0), ha="right")
    label(f"{right:.1f}", (right, y), (8, 0), ha="left")


def verdict(better, low, high, adjusted_p):
    """Return the word and the color for a difference with the 95% interval `low` to `high`.

    `better`: "lower", "higher" or "", as in evaluation.METRICS. `adjusted_p`: after Holm.
    """
    if better == "":
        return "", BLUE
    if adjusted_p >= 0.05:
        return "unclear", GRAY
    if high < 0:
        is_better = better == "lower"
    elif low > 0:
        is_better = better == "higher"
    else:  # also where the interval is not a number
        return "unclear", GRAY
    if is_better:
        return "better", GREEN
    return "worse", VERMILION


# Memory


def memory_figure(components, title=""):
    """Draw `components` ({name: bytes}) as bars, each from where the one before ends.

    So the last one ends at the total. Dotted lines are what common GPUs hold, where the chart
    reaches that far. The alternative text holds the same numbers.
    Raises ValueError for a negative number of bytes.
    """
    # Memory loads torch and transformers, which no other figure needs.
    from utils.memory import readable

    for component, count in components.items():
        if count < 0:
            raise ValueError(f"{component} has {count} bytes: bytes cannot be negative")
    total = sum(components.values())
    unit = 1e6
    unit_name = "MB"
    right = 1.3 * total
    if total >= 1e9:
        unit = 1e9
        unit_name = "GB"
        # The chart reaches as far as the smallest GPU that the total fits into.
        large_enough = [size for size in DEVICES.values() if size >= total]
        if large_enough:
            right = max(right, 1.1 * min(large_enough))

    figure, axes = new_figure(height=1.1 + 0.32 * (len(components) + 1))
    end = 0.0
    for component, count in components.items():
        axes.barh(component, count / unit, left=end, color=BLUE)
        end += count / unit
        axes.text(end, component, f" {readable(count)}", va="center")
    axes.barh("total", end, color=GRAY)
    axes.text(end, "total", f" {readable(total)}", va="center", weight="bold")
    for device, size in DEVICES.items():
        if size < right:
            axes.axvline(size / unit, color=VERMILION, linestyle=":")
            # The labels of T4 and 24 GB are close: one goes to the left, so both can be read.
            side = "right" if device == "T4" else "left"
            axes.text(size / unit, -0.7, device, color=VERMILION, ha=side, va="bottom", fontsize=8)
    axes.set(xlabel=f"{unit_name} at the peak of a step", xlim=(0, right / unit))
    axes.set_ylim(len(components) + 0.6, -0.6)
    axes.set_title(title, pad=16, fontsize=9)
    axes.grid(axis="y", visible=False)

    numbers = [f"{component} {readable(count)}" for component, count in components.items()]
    alt = f"{', '.join(numbers)}; total {readable(total)}"
    if title:
        alt = f"{', '.join(title.splitlines())}: {alt}"
    figure._repr_html_ = functools.partial(figure_html, figure, alt)
    return figure

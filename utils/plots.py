"""The figures, in one style: Okabe–Ito colours, which colour-blind readers can tell apart, on a white card for light and dark pages.

Every function returns its figure; as the last line of a cell it is shown there, once.
"""

import base64
import collections
import functools
import io
import math
import re
from html import escape

import matplotlib.pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

BLUE, GREEN, VERMILION, GREY = "#0072B2", "#009E73", "#D55E00", "#6B6B6B"
STYLE = {
    "figure.dpi": 100,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "text.parse_math": False,  # a $ in a model's name begins no formula
    "axes.prop_cycle": plt.cycler(color=[BLUE, VERMILION, GREEN, GREY]),
}
LOWER, HIGHER, NEITHER = "← lower is better", "→ higher is better", "neither direction is better"
SIDES = ["logps/chosen", "logps/rejected"]
METRICS = {  # metric of evaluation.json → its name, of what it is a share, and which direction is better
    "chair_i": ("CHAIR-i", "named objects that are not there", LOWER),
    "chair_s": ("CHAIR-s", "answers with such an object", LOWER),
    "cog": ("Cog", "habitual objects named though absent", LOWER),
    "claim_precision": ("Claim precision", "claims that are right", HIGHER),
    "recall": ("Recall", "objects there that are named", HIGHER),
    "pope_accuracy": ("POPE accuracy", "yes/no questions answered right", HIGHER),
    "pope_f1": ("POPE F1", "precision and recall of “yes”", HIGHER),
    "pope_yes_ratio": ("POPE yes ratio", "questions answered “yes”", NEITHER),
}


class SmallPictures(FigureCanvasAgg):
    """Writes PNG in the 64 colours that cover the picture best: a third of the size, and no difference to see."""

    def print_png(self, filename_or_obj, **options):
        self.draw()
        picture = Image.frombuffer("RGBA", self.get_width_height(), self.buffer_rgba()).convert(
            "RGB"
        )
        picture.quantize(64, Image.Quantize.MAXCOVERAGE).save(filename_or_obj, "png")


def new_figure(columns=1, height=3.0, rows=1):
    """A figure of `height` inches in the common style, and its Axes (an array of them if there are several)."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(6 if columns == 1 else 9.6, height), layout="constrained"
        )
    plt.close(
        figure
    )  # pyplot forgets it, or the notebook would show it a second time at the end of the cell
    SmallPictures(figure)
    figure._repr_html_ = functools.partial(
        figure_html, figure
    )  # Jupyter's own <img> of a figure has no alternative text
    return figure, axes


def figure_html(figure, alt=None):
    """`figure` as an <img>. Its alternative text, where none is given, is what stands in the figure in words."""
    if alt is None:
        texts = dict.fromkeys(" ".join(text.get_text().split()) for text in figure.findobj(Text))
        alt = "; ".join(["Figure", *(text for text in texts if re.search(r"[^\W\d]", text))])
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt, quote=True)}" style="max-width:100%" src="data:image/png;base64,{data}">'


def length_histogram(chosen, rejected):
    """Words per answer and their mean, for two sequences of strings, `chosen` and `rejected`. ValueError if one is empty."""
    if not len(chosen) or not len(rejected):
        raise ValueError(
            f"{len(chosen)} chosen and {len(rejected)} rejected answers: a histogram needs some of both"
        )
    figure, axes = new_figure()
    lengths = [[len(text.split()) for text in answers] for answers in (chosen, rejected)]
    longest = max(map(max, lengths))
    width = math.ceil(
        (longest + 1) / 30
    )  # whole words: bins of 1.3 words would hold one length or two, and look jagged
    edges = [edge - 0.5 for edge in range(0, longest + 1 + width, width)]
    for values, name, colour, line in zip(
        lengths, ("chosen", "rejected"), (GREEN, VERMILION), ("-", "--"), strict=True
    ):
        mean = sum(values) / len(values)
        axes.hist(
            values,
            edges,
            histtype="stepfilled",
            facecolor=(colour, 0.35),
            edgecolor=colour,
            linestyle=line,
        )
        axes.axvline(mean, color=colour, linestyle=line, label=f"{name}, mean {mean:.1f}")
    axes.set(xlabel="words per answer", ylabel="answers")
    axes.legend(frameon=False)
    return figure


def scatter_sizes(sizes):
    """`sizes` of images, [(width, height), …] in pixels; a dot's area grows with its number of images. ValueError if empty."""
    counts = collections.Counter(tuple(size) for size in sizes)
    if not counts:
        raise ValueError("no image size to plot: sizes is empty")
    figure, axes = new_figure(height=3.6)
    widths, heights = zip(*counts, strict=True)
    areas = [15 + 250 * count / counts.total() for count in counts.values()]
    axes.scatter(widths, heights, areas, color=(BLUE, 0.4), edgecolor=BLUE)
    axes.set(
        xlabel="width (pixels)",
        ylabel="height (pixels)",
        xlim=(0, 1.1 * max(widths)),
        ylim=(0, 1.1 * max(heights)),
    )
    axes.set(title=f"number of images: {counts.total():,}, of different sizes: {len(counts):,}")
    return figure


def training_curves(log):
    """Loss, reward accuracy, reward margin and log-probabilities by step, from `log` = trainer.state.log_history.

    Lines are training, dots are evaluation; a panel without values says so.
    """
    figure, panels = new_figure(columns=2, height=5.2, rows=2)
    contents = [
        ("Loss", "DPO loss (nats)", ["loss"], (math.log(2), "ln 2: no preference yet")),
        ("Reward accuracy", "share of pairs", ["rewards/accuracies"], (0.5, "chance, if none tie")),
        ("Reward margin", "chosen − rejected (nats)", ["rewards/margins"], None),
        ("Log-probability", "sum over an answer (nats)", SIDES, None),
    ]
    dot = {"linestyle": "", "marker": "o", "markeredgecolor": "white"}
    drawn = {}
    for axes, (title, unit, keys, level) in zip(panels.flat, contents, strict=True):
        axes.set(title=title, xlabel="step", ylabel=unit)
        for key in keys:
            colour = {"logps/chosen": GREEN, "logps/rejected": VERMILION}.get(key, BLUE)
            line = {
                "linestyle": "--" if key == "logps/rejected" else "-",
                "linewidth": 1.3,
                "marker": ".",
                "markersize": 2,
            }
            for what, name, style in (("training", key, line), ("held out", f"eval_{key}", dot)):
                if points := [(entry["step"], entry[name]) for entry in log if name in entry]:
                    drawn.setdefault(
                        what,
                        *axes.plot(*zip(*points, strict=True), color=colour, label=name, **style),
                    )
                    if keys is SIDES and what == "training":
                        axes.annotate(
                            key.removeprefix("logps/"),
                            points[-1],
                            (0, 6),
                            textcoords="offset points",
                            color=colour,
                            ha="right",
                        )
        if not axes.lines:
            axes.text(
                0.5,
                0.5,
                "\n".join(["nothing in the log for", *keys]),
                transform=axes.transAxes,
                ha="center",
                va="center",
                color=GREY,
            )
            axes.set(xticks=[], yticks=[])
            continue
        if level:
            value, meaning = level
            axes.axhline(value, color=GREY, linestyle=":", zorder=1)
            axes.text(
                1,
                value,
                meaning,
                transform=axes.get_yaxis_transform(),
                ha="right",
                va="bottom",
                fontsize=8,
                color=GREY,
            )
    panels[0, 1].set_ylim(-0.03, 1.03)
    if len(drawn) > 1:
        figure.legend(drawn.values(), drawn, loc="outside upper center", ncols=2, frameon=False)
    return figure


def verdict(direction, low, high):
    """The word and the colour for a difference whose 95 % interval reaches from `low` to `high`."""
    if direction == NEITHER:
        return "", BLUE
    if not (high < 0 or low > 0):
        return "unclear", GREY
    return ("better", GREEN) if (high < 0) == (direction == LOWER) else ("worse", VERMILION)


def before_after(evaluation):
    """Each metric before and after DPO in percent; beside it the difference in points, its 95 % interval and a verdict.

    `evaluation`: {"base": {metric: fraction}, "dpo": {…}, "difference": {metric: {"mean", "low", "high"}}}; only METRICS are drawn.
    Raises ValueError if none of them is there, or one only in part.
    """
    base, dpo, difference = (evaluation[key] for key in ("base", "dpo", "difference"))
    metrics = [metric for metric in METRICS if metric in base]
    partly = [metric for metric in metrics if metric not in dpo or metric not in difference]
    if partly or not metrics:
        raise ValueError(
            f"no {', '.join(partly) or 'known metric'} in base, dpo and difference alike: evaluate both models again"
        )
    figure, axes = new_figure(height=1.5 + 0.5 * len(metrics))
    figure.set_figwidth(9.6)
    beside = {
        "transform": axes.get_yaxis_transform(),
        "va": "center",
    }  # x in widths of the panel, y in rows
    y, heading = 0.0, None
    for metric in metrics:
        name, meaning, direction = METRICS[metric]
        if direction != heading:
            axes.text(-0.02, y + 0.1, direction, ha="right", style="italic", color=GREY, **beside)
            y, heading = y + 0.8, direction
        before, after = 100 * base[metric], 100 * dpo[metric]
        mean, low, high = (100 * difference[metric][key] for key in ("mean", "low", "high"))
        word, colour = verdict(direction, low, high)
        axes.plot([before, after], [y, y], color=colour, linewidth=3, alpha=0.45)
        axes.plot(
            before,
            y,
            "o",
            color="white",
            markeredgecolor=GREY,
            markeredgewidth=1.6,
            markersize=8,
            zorder=3,
        )
        axes.plot(after, y, "o", color=colour, markersize=9, zorder=3)
        for value, side, shift in (
            (min(before, after), "right", -8),
            (max(before, after), "left", 8),
        ):
            axes.annotate(
                f"{value:.1f}",
                (value, y),
                (shift, 0),
                textcoords="offset points",
                ha=side,
                va="center",
            )
        axes.text(-0.02, y - 0.17, name, ha="right", weight="bold", **beside)
        axes.text(-0.02, y + 0.22, meaning, ha="right", fontsize=8, color=GREY, **beside)
        axes.text(
            1.02,
            y,
            f"{mean:+.1f}  [{low:+.1f}, {high:+.1f}]  {word}".replace("-", "−"),
            color=colour,
            **beside,
        )
        y += 1
    axes.text(
        1.02, -0.3, "difference in points,\n95 % interval", fontsize=8.5, color=GREY, **beside
    )
    axes.plot(
        [],
        [],
        "o",
        color="white",
        markeredgecolor=GREY,
        markeredgewidth=1.6,
        markersize=8,
        label="base model",
    )
    axes.plot([], [], "o", color=GREY, markersize=9, label="after DPO")
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    axes.set(
        xlim=(-7, 107), ylim=(y - 0.4, -0.6), xlabel="percent", xticks=range(0, 101, 20), yticks=[]
    )
    axes.spines["left"].set_visible(False)
    return figure

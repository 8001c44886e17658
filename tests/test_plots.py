"""The figures: what they draw, that their axes say it, and that they stay small."""

import io
import math
from types import SimpleNamespace

import matplotlib
import pytest
from PIL import Image

from utils import callbacks, plots
from utils.evaluation import METRICS
from utils.memory import estimate, readable
from utils.plots import (
    HEADINGS,
    before_after,
    figure_html,
    length_histogram,
    memory_figure,
    new_figure,
    training_curves,
)
from utils.settings import PROFILES

matplotlib.use("Agg")

LOG = [
    {
        "step": step,
        "loss": 0.7 - step / 100,
        "rewards/accuracies": 0.6,
        "rewards/margins": 0.1,
        "rewards/chosen": -0.1,
        "rewards/rejected": -0.9,
    }
    for step in range(1, 21)
]
EVALUATED = {
    "step": 20,
    "eval_loss": 0.6,
    "eval_rewards/accuracies": 0.7,
    "eval_rewards/chosen": -0.2,
}
FINISHED = {"step": 20, "train_runtime": 3.0, "train_loss": 0.6}
FRACTIONS = [name for name, metric in METRICS.items() if metric.unit == "%"]


def evaluation(**differences):
    """Values of both models, and a difference (mean, low, high) for every metric."""
    evaluated = {"base": {}, "tuned": {}, "difference": {}, "n": 500}
    for metric in METRICS:
        mean, low, high = differences.get(metric, (0.1, 0.05, 0.15))
        evaluated["base"][metric] = 0.4
        evaluated["tuned"][metric] = 0.4 + mean
        evaluated["difference"][metric] = {"mean": mean, "low": low, "high": high, "p": 0.0002}
    return evaluated


def texts(axes):
    return [text.get_text() for text in axes.texts]


def lines(axes):
    """Label → list of (x, y) of the lines that are drawn from data."""
    drawn = {}
    for line in axes.lines:
        if line.get_linestyle() != ":":
            drawn[line.get_label()] = list(zip(*line.get_data(), strict=True))
    return drawn


def image_of(figure):
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file)


def make_figure(name):
    if name == "length_histogram":
        return length_histogram(["a b c"] * 40, ["a b c d"] * 40)
    if name == "training_curves":
        return training_curves([*LOG, EVALUATED])
    if name == "memory_figure":
        return memory_figure({"weights": 6.4e9, "activations": 2e9}, "a model\n4 pairs")
    return before_after(evaluation())


@pytest.mark.parametrize(
    "name",
    ["length_histogram", "training_curves", "before_after", "memory_figure"],
)
def test_figures_are_returned_labelled_and_small(name):
    figure = make_figure(name)
    # Nothing is left that a notebook would show a second time.
    assert matplotlib.pyplot.get_fignums() == []
    assert all(axes.get_xlabel() for axes in figure.axes)
    if name not in ("before_after", "memory_figure"):
        assert all(axes.get_ylabel() for axes in figure.axes)
    file = io.BytesIO()
    figure.savefig(file)
    assert len(file.getvalue()) < 40_000
    image = Image.open(file)
    assert image.size == tuple(figure.get_size_inches() * 100)
    white = (255, 255, 255)  # a white card, also on a dark page
    assert image.convert("RGB").getpixel((0, 0)) == white


def test_small_files_keep_rare_colors():
    """A palette made of the frequent colors would turn one dot of each verdict brown."""
    figure = before_after(
        evaluation(chair_i=(-0.1, -0.2, -0.05), chair_s=(0.1, 0.05, 0.2), cog=(0.1, -0.1, 0.3))
    )
    found = [color for _, color in image_of(figure).convert("RGB").getcolors(64)]
    for color in (plots.BLUE, plots.GREEN, plots.VERMILION, plots.GRAY):
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        distances = []
        for other in found:
            distances.append(max(abs(a - b) for a, b in zip(wanted, other, strict=True)))
        assert min(distances) <= 16


def test_new_figure_gives_one_axes_or_several():
    figure, axes = new_figure(height=2)
    assert figure.axes == [axes]
    assert figure.get_figheight() == 2
    _, several = new_figure(columns=3)
    assert len(several) == 3


def test_a_figure_is_shown_with_its_own_words_as_its_alternative_text():
    figure, axes = new_figure()
    axes.set(title='"<b>cups</b>"', xlabel="step", ylabel="7")
    page = figure._repr_html_()
    alt = "Figure; step; &quot;&lt;b&gt;cups&lt;/b&gt;&quot;"
    assert page.startswith(f'<img alt="{alt}" ')
    assert ' src="data:image/png;base64,' in page
    assert figure_html(figure, "other words").startswith('<img alt="other words" ')


def test_a_dollar_in_a_title_begins_no_formula():
    figure, axes = new_figure()
    axes.set_title(r"$\frac$")  # as a formula it could not be drawn
    figure.canvas.draw()


# The data set


def test_the_histogram_counts_words_and_marks_the_means():
    axes = length_histogram(["one two", "one two three four"], ["one two three four five"]).axes[0]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["chosen, mean 3.0", "rejected, mean 5.0"]
    assert [line.get_xdata()[0] for line in axes.lines] == [3, 5]
    assert len(axes.patches) == 2


@pytest.mark.parametrize("longest", [0, 1, 29, 30, 31, 300])
def test_no_answer_falls_out_of_the_histogram(longest, monkeypatch):
    counts = []
    draw = matplotlib.axes.Axes.hist

    def counting(*args, **kwargs):
        heights, _, _ = draw(*args, **kwargs)
        counts.append(heights.sum())

    monkeypatch.setattr(matplotlib.axes.Axes, "hist", counting)
    length_histogram(["word " * longest, ""], ["word " * longest])
    assert counts == [2, 1]


def test_the_histogram_needs_answers():
    with pytest.raises(ValueError, match=r"2 chosen .* 0 rejected"):
        length_histogram(["a", "b"], [])


# Training


def test_training_curves_draw_each_series_at_its_steps():
    figure = training_curves([*LOG, EVALUATED, FINISHED])
    loss, accuracy, margin, rewards = figure.axes
    assert lines(loss) == {
        "loss": [(entry["step"], entry["loss"]) for entry in LOG],
        "eval_loss": [(20, 0.6)],
    }
    assert lines(accuracy)["eval_rewards/accuracies"] == [(20, 0.7)]
    assert set(lines(margin)) == {"rewards/margins"}
    drawn = {"rewards/chosen", "rewards/rejected", "eval_rewards/chosen"}
    assert set(lines(rewards)) == drawn
    levels = [line.get_ydata()[0] for line in loss.lines if line.get_linestyle() == ":"]
    assert levels == [math.log(2)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["training", "held out"]


@pytest.mark.parametrize("log", [[], [{"step": 1, "grad_norm": 1.0}]])
def test_panels_without_values_say_so(log):
    figure = training_curves(log)
    keys = ["loss", "rewards/accuracies", "rewards/margins", "rewards/rejected"]
    for axes, key in zip(figure.axes, keys, strict=True):
        assert len(axes.lines) == 0
        (message,) = texts(axes)
        assert key in message
    assert figure.legends == []


@pytest.fixture
def live(monkeypatch):
    """The callback, what it displays as (identity, update, figure), and a clock to set."""
    displayed = []
    clock = SimpleNamespace(now=100.0)

    def show(figure, display_id, update):
        displayed.append((display_id, update, figure))

    monkeypatch.setattr(callbacks, "get_ipython", lambda: object())
    monkeypatch.setattr(callbacks, "display", show)
    for wrapper in ("HTML", "figure_html"):
        monkeypatch.setattr(callbacks, wrapper, lambda figure: figure)
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return callbacks.LiveCurves(), displayed, clock


def test_live_curves_redraw_one_figure_at_most_every_second(live):
    callback, displayed, clock = live
    state = SimpleNamespace(log_history=LOG[:1])
    callback.on_train_begin(None, state, None)
    for seconds in (0, 0.4, 0.4, 0.4):
        clock.now += seconds
        callback.on_log(None, state, None)
    state.log_history = LOG
    callback.on_train_end(None, state, None)
    assert [update for _, update, _ in displayed] == [False, True, True]
    assert len({identity for identity, _, _ in displayed}) == 1
    assert len(lines(displayed[-1][2].axes[0])["loss"]) == len(LOG)
    callback.on_train_begin(None, state, None)  # a second training gets a figure of its own
    callback.on_log(None, state, None)
    assert displayed[-1][1] is False
    assert displayed[-1][0] != displayed[0][0]


def test_live_curves_are_silent_outside_of_ipython(live, monkeypatch):
    callback, displayed, _ = live
    monkeypatch.setattr(callbacks, "get_ipython", lambda: None)
    callback.on_train_begin(None, None, None)
    callback.on_log(None, SimpleNamespace(log_history=LOG), None)
    callback.on_train_end(None, SimpleNamespace(log_history=LOG), None)
    assert displayed == []


def test_live_curves_are_a_trainer_callback(live):
    from transformers import TrainerCallback

    assert isinstance(live[0], TrainerCallback)


# Evaluation


def test_before_after_writes_every_fraction_with_interval_and_verdict():
    figure = before_after(
        evaluation(
            chair_i=(-0.153, -0.173, -0.133),
            recall=(-0.02, -0.03, -0.01),
            pope_f1=(0.01, -0.01, 0.03),
        )
    )
    (axes,) = figure.axes
    written = texts(axes)
    for name in FRACTIONS:
        assert METRICS[name].title in written
        assert METRICS[name].meaning in written
    assert METRICS["words"].title not in written
    assert "−15.3  [−17.3, −13.3]  better" in written  # lower is better
    assert "+10.0  [+5.0, +15.0]  worse" in written  # chair_s went up
    assert "−2.0  [−3.0, −1.0]  worse" in written
    assert "+1.0  [−1.0, +3.0]  unclear" in written
    assert "+10.0  [+5.0, +15.0]  better" in written
    assert "+10.0  [+5.0, +15.0]  " in written  # the yes ratio has no better direction
    assert set(HEADINGS.values()) <= set(written)
    assert {"40.0", "24.7"} <= set(written)
    # A line and two dots for each metric, and the two dots of the legend.
    assert len(axes.lines) == 3 * len(FRACTIONS) + 2


def test_before_after_draws_the_metrics_that_are_there():
    evaluated = evaluation()
    some = {key: {"chair_i": evaluated[key]["chair_i"]} for key in ("base", "tuned", "difference")}
    written = texts(before_after(some).axes[0])
    assert METRICS["chair_i"].title in written
    assert METRICS["recall"].title not in written
    assert HEADINGS["higher"] not in written


def test_an_undefined_metric_is_called_unclear():
    undefined = (math.nan, math.nan, math.nan)
    written = texts(before_after(evaluation(cog=undefined)).axes[0])
    assert any(text.endswith("unclear") for text in written)


def test_a_difference_that_holm_doubts_is_called_unclear():
    evaluated = evaluation(recall=(0.01, 0.002, 0.018))
    evaluated["difference"]["recall"]["p"] = 0.026  # twice that is above 0.05
    evaluated["difference"]["pope_f1"]["p"] = 0.04
    written = texts(before_after(evaluated).axes[0])
    assert next(text for text in written if text.startswith("+1.0")).endswith("unclear")


@pytest.mark.parametrize("side", ["tuned", "difference"])
def test_before_after_needs_both_models(side):
    half = evaluation()
    del half[side]["recall"]
    with pytest.raises(ValueError, match=f"{side}.*recall"):
        before_after(half)


def test_before_after_needs_a_metric():
    words = {"base": {"words": 1}, "tuned": {"words": 1}, "difference": {}}
    with pytest.raises(ValueError, match="metric"):
        before_after(words)


# Memory


@pytest.mark.parametrize("profile", ["embedded", "qwen"])
def test_the_bars_are_the_estimate_and_end_at_its_total(profile):
    components = estimate(PROFILES[profile])
    total = sum(components.values())
    axes = memory_figure(components).axes[0]
    unit = 1e9 if total >= 1e9 else 1e6
    *bars, last = axes.patches
    widths = [bar.get_width() * unit for bar in bars]
    assert widths == pytest.approx(list(components.values()))
    assert last.get_width() * unit == pytest.approx(total)
    assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(last.get_width())
    assert ("GB" if unit == 1e9 else "MB") in axes.get_xlabel()


def test_the_chart_reaches_to_the_gpu_that_it_fits_into():
    axes = memory_figure({"weights": 16.8e9}).axes[0]
    assert [line.get_xdata()[0] for line in axes.lines] == [15, 24]
    assert len(memory_figure({"weights": 160e9}).axes[0].lines) == 3
    assert len(memory_figure({"weights": 2e6}).axes[0].lines) == 0


def test_the_charts_alternative_text_holds_its_numbers():
    components = {"weights": 6.4e9, "reference": 0, "gradients": 3e6}
    page = memory_figure(components, "a model\n4 pairs")._repr_html_()
    alt = page.split('"')[1]
    assert alt.startswith("a model, 4 pairs")
    for name, count in components.items():
        assert f"{name} {readable(count)}" in alt
    assert alt.endswith(f"total {readable(sum(components.values()))}")


def test_negative_bytes_are_refused():
    with pytest.raises(ValueError, match="weights"):
        memory_figure({"weights": -1})

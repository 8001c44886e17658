"""The figures: what they draw, that their axes say it, and that they stay small."""

import io
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
from PIL import Image

from utils import callbacks, plots
from utils.plots import (
    METRICS,
    before_after,
    length_histogram,
    new_figure,
    scatter_sizes,
    training_curves,
)

matplotlib.use("Agg")

LOG = [
    {
        "step": step,
        "loss": 0.7 - step / 100,
        "rewards/accuracies": 0.6,
        "rewards/margins": 0.1,
        "logps/chosen": -20.0,
        "logps/rejected": -30.0,
    }
    for step in range(1, 21)
]
EVALUATED = {
    "step": 20,
    "eval_loss": 0.6,
    "eval_rewards/accuracies": 0.7,
    "eval_logps/chosen": -21.0,
}
FINISHED = {"step": 20, "train_runtime": 3.0, "train_loss": 0.6}


def evaluation(**differences):
    """Base and DPO values and a difference for every metric; `differences`: metric → (mean, low, high)."""
    change = {metric: differences.get(metric, (0.1, 0.05, 0.15)) for metric in [*METRICS, "words"]}
    return {
        "base": {metric: 0.4 for metric in change},
        "dpo": {metric: 0.4 + mean for metric, (mean, _, _) in change.items()},
        "difference": {
            metric: {"mean": mean, "low": low, "high": high, "p": 0.01}
            for metric, (mean, low, high) in change.items()
        },
        "n": 500,
    }


def texts(axes):
    return [text.get_text() for text in axes.texts]


def lines(axes):
    """Label → list of (x, y) of the lines that are drawn from data."""
    return {
        line.get_label(): list(zip(*line.get_data(), strict=True))
        for line in axes.lines
        if line.get_linestyle() != ":"
    }


FIGURES = {
    "length_histogram": lambda: length_histogram(["a b c"] * 40, ["a b c d"] * 40),
    "scatter_sizes": lambda: scatter_sizes([(width, 900 - width) for width in range(200, 600)]),
    "training_curves": lambda: training_curves([*LOG, EVALUATED]),
    "before_after": lambda: before_after(evaluation()),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_returned_labelled_and_small(name):
    figure = FIGURES[name]()
    assert (
        matplotlib.pyplot.get_fignums() == []
    )  # nothing left that a notebook would show a second time
    assert all(axes.get_xlabel() for axes in figure.axes)
    assert all(axes.get_ylabel() or name == "before_after" for axes in figure.axes)
    file = io.BytesIO()
    figure.savefig(file)
    assert len(file.getvalue()) < 40_000
    picture = Image.open(file)
    assert picture.size == tuple(figure.get_size_inches() * 100)
    assert picture.convert("RGB").getpixel((0, 0)) == (
        255,
        255,
        255,
    )  # a white card, also on a dark page


def test_small_pictures_keep_rare_colours():
    """One dot of each verdict in a large picture: a palette made of what is frequent would turn them all brown."""
    file = io.BytesIO()
    before_after(
        evaluation(chair_i=(-0.1, -0.2, -0.05), chair_s=(0.1, 0.05, 0.2), cog=(0.1, -0.1, 0.3))
    ).savefig(file)
    found = [colour for _, colour in Image.open(file).convert("RGB").getcolors(64)]
    for colour in (plots.BLUE, plots.GREEN, plots.VERMILION, plots.GREY):
        wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert (
            min(max(abs(a - b) for a, b in zip(wanted, other, strict=True)) for other in found)
            <= 16
        )


def test_new_figure_gives_one_axes_or_several():
    figure, axes = new_figure(height=2)
    assert figure.axes == [axes] and figure.get_figheight() == 2
    assert len(new_figure(columns=3)[1]) == 3


def test_the_histogram_counts_words_and_marks_the_means():
    axes = length_histogram(["one two", "one two three four"], ["one two three four five"]).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "chosen, mean 3.0",
        "rejected, mean 5.0",
    ]
    assert [line.get_xdata()[0] for line in axes.lines] == [3, 5]
    assert len(axes.patches) == 2


@pytest.mark.parametrize("longest", [0, 1, 29, 30, 31, 300])
def test_no_answer_falls_out_of_the_histogram(longest, monkeypatch):
    counts = []
    hist = matplotlib.axes.Axes.hist
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "hist",
        lambda *args, **kwargs: counts.append(hist(*args, **kwargs)[0].sum()),
    )
    length_histogram(["word " * longest, ""], ["word " * longest])
    assert counts == [2, 1]


def test_the_histogram_needs_answers():
    with pytest.raises(ValueError, match="2 chosen and 0 rejected"):
        length_histogram(["a", "b"], [])


def test_sizes_are_counted():
    axes = scatter_sizes([[640, 480], (640, 480), (100, 900)]).axes[0]
    (dots,) = axes.collections
    assert sorted(map(tuple, dots.get_offsets().tolist())) == [(100, 900), (640, 480)]
    assert max(dots.get_sizes()) == dots.get_sizes()[dots.get_offsets()[:, 0].tolist().index(640)]
    assert axes.get_title() == "number of images: 3, of different sizes: 2"
    with pytest.raises(ValueError, match="sizes is empty"):
        scatter_sizes([])


def test_training_curves_draw_each_series_at_its_steps():
    figure = training_curves([*LOG, EVALUATED, FINISHED])
    loss, accuracy, margin, logps = figure.axes
    assert lines(loss) == {
        "loss": [(entry["step"], entry["loss"]) for entry in LOG],
        "eval_loss": [(20, 0.6)],
    }
    assert lines(accuracy)["eval_rewards/accuracies"] == [(20, 0.7)]
    assert set(lines(margin)) == {"rewards/margins"}
    assert set(lines(logps)) == {"logps/chosen", "logps/rejected", "eval_logps/chosen"}
    assert [line.get_ydata()[0] for line in loss.lines if line.get_linestyle() == ":"] == [
        math.log(2)
    ]


@pytest.mark.parametrize("log", [[], [{"step": 1, "grad_norm": 1.0}]])
def test_panels_without_values_say_so(log):
    messages = [texts(axes) for axes in training_curves(log).axes]
    keys = ["loss", "rewards/accuracies", "rewards/margins", "logps/chosen\nlogps/rejected"]
    assert messages == [[f"nothing in the log for\n{key}"] for key in keys]


@pytest.fixture
def live(monkeypatch):
    """The callback, what it displays as (identity, update, figure), and a clock that can be set."""
    displayed, clock = [], SimpleNamespace(now=100.0)
    monkeypatch.setattr(callbacks, "get_ipython", lambda: object())
    monkeypatch.setattr(
        callbacks,
        "display",
        lambda figure, display_id, update: displayed.append((display_id, update, figure)),
    )
    for wrapper in ("HTML", "figure_html"):
        monkeypatch.setattr(callbacks, wrapper, lambda figure: figure)
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return callbacks.LiveCurves(), displayed, clock


def test_live_curves_redraw_one_picture_at_most_every_second(live):
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
    callback.on_train_begin(None, state, None)  # a second training gets a picture of its own
    callback.on_log(None, state, None)
    assert displayed[-1][1] is False and displayed[-1][0] != displayed[0][0]


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


def test_drawing_does_not_load_transformers():
    code = "import sys, utils.plots; print('transformers' in sys.modules)"
    root = Path(__file__).parents[1]
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
        ).stdout
        == "False\n"
    )


def test_before_after_writes_every_metric_with_interval_and_verdict():
    figure = before_after(
        evaluation(
            chair_i=(-0.153, -0.173, -0.133),
            recall=(-0.02, -0.03, -0.01),
            pope_f1=(0.01, -0.01, 0.03),
        )
    )
    (axes,) = figure.axes
    written = texts(axes)
    assert [name for name, _, _ in METRICS.values() if name not in written] == []
    assert "words" not in " ".join(written).lower()
    assert "−15.3  [−17.3, −13.3]  better" in written  # lower is better
    assert "+10.0  [+5.0, +15.0]  worse" in written  # chair_s went up
    assert "−2.0  [−3.0, −1.0]  worse" in written
    assert "+1.0  [−1.0, +3.0]  unclear" in written
    assert "+10.0  [+5.0, +15.0]  better" in written
    assert "+10.0  [+5.0, +15.0]  " in written  # the yes ratio has no better direction
    assert {plots.LOWER, plots.HIGHER, plots.NEITHER} <= set(written)
    assert {"40.0", "24.7"} <= set(written)
    assert len(axes.lines) == 3 * len(METRICS) + 2  # a line and two dots each, and the legend


def test_before_after_draws_the_metrics_that_are_there():
    some = {key: {"chair_i": value["chair_i"]} for key, value in evaluation().items() if key != "n"}
    written = texts(before_after(some).axes[0])
    assert "CHAIR-i" in written and "Recall" not in written and plots.HIGHER not in written


def test_an_undefined_metric_is_called_unclear():
    undefined = (math.nan, math.nan, math.nan)
    assert any(
        text.endswith("unclear") for text in texts(before_after(evaluation(cog=undefined)).axes[0])
    )


def test_before_after_needs_both_models():
    half = evaluation()
    del half["dpo"]["recall"], half["difference"]["cog"]
    with pytest.raises(ValueError, match="no cog, recall in base, dpo and difference alike"):
        before_after(half)
    with pytest.raises(ValueError, match="known metric"):
        before_after({"base": {"words": 1}, "dpo": {"words": 1}, "difference": {}})


def test_a_figure_is_shown_with_what_stands_in_it_as_its_alternative_text():
    figure, axes = plots.new_figure()
    axes.set(title='"<b>cups</b>"', xlabel="step", ylabel="7")
    page = figure._repr_html_()
    assert (
        page.startswith('<img alt="Figure; step; &quot;&lt;b&gt;cups&lt;/b&gt;&quot;" ')
        and ' src="data:image/png;base64,' in page
    )
    assert plots.figure_html(figure, "other words").startswith('<img alt="other words" ')


def test_a_dollar_in_a_title_begins_no_formula():
    figure, axes = plots.new_figure()
    axes.set_title(r"$\frac$")  # as a formula it could not be drawn
    figure.canvas.draw()

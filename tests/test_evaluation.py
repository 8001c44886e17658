import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from embedded import claims, exam, judge
from embedded.scenes import true_description
from utils import evaluation
from utils.generation import DESCRIBE
from utils.paired_statistics import rate
from utils.settings import ROOT

TRUTHS = [
    [
        {"category": "chair", "colour": "red", "place": "top"},
        {"category": "cup", "colour": "blue", "place": "left"},
    ],
    [
        {"category": "chair", "colour": "pink", "place": "top"},
        {"category": "book", "colour": "blue", "place": "right"},
    ],
    [
        {"category": "chair", "colour": "green", "place": "top"},
        {"category": "book", "colour": "red", "place": "right"},
    ],
]


def perfect(truths):
    """The answers of a model without a mistake."""
    pope = {kind: ["No, there is no."] * len(truths) for kind in evaluation.POPE_KINDS}
    pope["present"] = ["Yes."] * len(truths)
    return {"descriptions": [true_description(objects) for objects in truths], "pope": pope}


def counts_of(answers, truths=TRUTHS):
    counts = evaluation.count(answers, judge.present(truths), claims.mentions)
    return counts | judge.claim_counts(answers["descriptions"], truths)


def scores_of(answers):
    return {name: rate(counts) for name, counts in counts_of(answers).items()}


def test_a_perfect_model_scores_perfectly():
    scores = scores_of(perfect(TRUTHS))
    assert scores.pop("words") == judge.true_words(TRUTHS)
    assert scores == {
        "chair_i": 0,
        "chair_s": 0,
        "cog": 0,
        "recall": 1,
        "claim_precision": 1,
        "pope_accuracy": 1,
        "pope_recall": 1,
        "pope_f1": 1,
        "pope_yes_ratio": 0.5,
    }


def test_cog_counts_planted_companions_only():
    answers = perfect(TRUTHS)
    answers["descriptions"][0] += (
        " On the right there is a blue book. At the bottom there is a red kite."
    )
    counts = counts_of(answers)
    assert counts["cog"].tolist() == [[1, 2], [0, 0], [0, 0]]
    assert counts["chair_i"].tolist() == [[2, 4], [0, 2], [0, 2]]


def test_constant_answers_are_the_known_lines():
    answers = exam.constant_answers(TRUTHS)
    scores = {name: scores_of(constant) for name, constant in answers.items()}
    assert scores["always yes"]["pope_accuracy"] == 0.5
    assert scores["always no"]["pope_accuracy"] == 0.5
    assert scores["always yes"]["pope_f1"] == pytest.approx(2 / 3)
    assert scores["always no"]["pope_f1"] == 0
    assert scores["lists everything"]["recall"] == 1
    assert scores["lists everything"]["chair_i"] == pytest.approx(10 / 12)
    assert np.isnan(scores["the empty answer"]["chair_i"])
    assert scores["the empty answer"]["words"] == 0


def test_compare_has_the_keys_and_the_order_of_the_metrics():
    worse = perfect(TRUTHS)
    worse["descriptions"] = [
        text + " In the center there is a red clock." for text in worse["descriptions"]
    ]
    result = evaluation.compare(counts_of(worse), counts_of(perfect(TRUTHS)))
    assert list(result) == ["base", "tuned", "difference", "n"]
    assert result["n"] == 3
    for part in ("base", "tuned", "difference"):
        assert list(result[part]) == list(evaluation.METRICS)
    assert result["difference"]["chair_i"]["mean"] == pytest.approx(-1 / 3)
    assert set(result["difference"]["chair_i"]) == {"mean", "low", "high", "p"}


def test_compare_takes_the_metrics_that_were_counted():
    """Without an exact truth there are no claims to judge, and so two metrics less."""
    answers = perfect(TRUTHS)
    counts = evaluation.count(answers, judge.present(TRUTHS), claims.mentions)
    result = evaluation.compare(counts, counts)
    missing = set(evaluation.METRICS) - set(result["difference"])
    assert missing == {"cog", "claim_precision"}


def test_committed_results_hold_the_metrics_in_their_order():
    files = sorted((ROOT / "results" / "embedded").glob("evaluation-seed*.json"))
    assert len(files) == 5
    for path in files:
        result = json.loads(path.read_text())
        for part in ("base", "tuned", "difference"):
            assert list(result[part]) == list(evaluation.METRICS), path.name


def test_every_metric_can_be_explained():
    for name, metric in evaluation.METRICS.items():
        assert metric.title and metric.meaning, name
        assert metric.better in ("lower", "higher", ""), name
        assert metric.unit in ("%", "words"), name


@pytest.mark.parametrize(
    ("metric", "value", "sign", "text"),
    [
        ("chair_i", 0.1234, "", "12.3%"),
        ("recall", 0.01, "+", "+1.0%"),
        ("words", 21.25, "", "21.2"),
        ("words", -4.2, "+", "-4.2"),
        ("chair_i", float("nan"), "+", "–"),
    ],
)
def test_values_are_written_in_the_unit_of_their_metric(metric, value, sign, text):
    assert evaluation.format_value(metric, value, sign) == text


def test_base_and_tuned_are_asked_for_descriptions_and_pope_s_questions(monkeypatch):
    asked = []

    def answer(settings, model, processor, images, questions, adapter, max_new_tokens=None):
        asked.append((images, questions, adapter, max_new_tokens))
        return [f"{image} {question}" for image, question in zip(images, questions, strict=True)]

    monkeypatch.setattr(evaluation, "answer", answer)
    monkeypatch.setattr(evaluation, "images_encoded_once", lambda model: nullcontext())
    questions = {"present": ["a?", "b?"]}
    for kind in evaluation.POPE_KINDS:
        questions[kind] = [f"{kind} 1?", f"{kind} 2?"]
    settings = SimpleNamespace(generation_batch_size=1)
    both = evaluation.ask_both(settings, None, None, ["one", "two"], questions)
    for answers in both:
        assert answers["descriptions"] == [f"one {DESCRIBE}", f"two {DESCRIBE}"]
        assert answers["pope"]["popular"] == ["one popular 1?", "two popular 2?"]
        assert list(answers["pope"]) == ["present", *evaluation.POPE_KINDS]
    # All questions about an image before the next image.
    assert [images for images, *_ in asked] == [["one"]] * 10 + [["two"]] * 10
    assert [adapter for *_, adapter, _ in asked] == ([False] * 5 + [True] * 5) * 2
    # A description may be as long as the settings say, a yes or no may not.
    assert [length for *_, length in asked[:5]] == [None, 16, 16, 16, 16]
    assert evaluation.ask(settings, None, None, ["one", "two"], questions) == both[1]


def test_a_word_that_follows_itself_is_a_stammer():
    assert evaluation.stammers("There is a Pink pink cup.")
    assert not evaluation.stammers("There is a pink cup and a cupboard. A book.")


def test_the_base_model_sees_and_hallucinates_as_planted():
    base = json.loads((ROOT / "results" / "embedded" / "base.json").read_text())
    assert base["n"] >= 500
    assert min(base["recall"], base["colour"], base["place"]) >= 0.9
    assert 0.12 <= base["chair_i"] <= 0.35
    assert base["cog"] > 0.5
    assert base["pope_accuracy"] >= 0.75
    per_kind = [base[f"pope_accuracy_{kind}"] for kind in evaluation.POPE_KINDS]
    assert base["pope_accuracy_adversarial"] == min(per_kind)

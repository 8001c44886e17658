import numpy as np
import pytest

from embedded.drawing import CATEGORIES
from embedded.scenes import describe
from utils import evaluation, models, preferences
from utils.generation import answer
from utils.paired_statistics import rate
from utils.settings import PROFILES

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
    pope = {kind: ["No, there is no."] * len(truths) for kind in evaluation.POPE_KINDS}
    return {
        "descriptions": [describe(objects) for objects in truths],
        "pope": {"present": ["Yes."] * len(truths)} | pope,
    }


def test_pope_asks_about_present_random_popular_and_companion():
    for questions, objects in zip(evaluation.pope_questions(TRUTHS), TRUTHS, strict=True):
        there = {o["category"] for o in objects}
        assert questions["present"] in there
        assert all(
            questions[kind] in CATEGORIES and questions[kind] not in there
            for kind in evaluation.POPE_KINDS
        )
    first = evaluation.pope_questions(TRUTHS)[0]
    assert first["popular"] == "book" and first["adversarial"] == "book"


def test_a_perfect_model_scores_perfectly():
    scores = {
        name: rate(counts) for name, counts in evaluation.count(perfect(TRUTHS), TRUTHS).items()
    }
    words = scores.pop("words")
    low, high = (
        dict.fromkeys(("chair_i", "chair_s", "cog"), 0),
        dict.fromkeys(("recall", "claim_precision", "pope_accuracy", "pope_f1"), 1),
    )
    assert scores == low | high | {"pope_yes_ratio": 0.5}
    assert words == evaluation.true_words(TRUTHS)


def test_cog_counts_planted_companions_only():
    answers = perfect(TRUTHS)
    answers["descriptions"][0] += (
        " On the right there is a blue book. At the bottom there is a red kite."
    )
    counts = evaluation.count(answers, TRUTHS)
    assert counts["cog"].tolist() == [[1, 2], [0, 0], [0, 0]]
    assert counts["chair_i"].tolist() == [[2, 4], [0, 2], [0, 2]]


def test_compare_has_the_contract_s_keys():
    worse = perfect(TRUTHS)
    worse["descriptions"] = [
        text + " In the center there is a red clock." for text in worse["descriptions"]
    ]
    result = evaluation.compare(worse, perfect(TRUTHS), TRUTHS)
    metrics = [
        "chair_i",
        "chair_s",
        "recall",
        "cog",
        "claim_precision",
        "pope_accuracy",
        "pope_f1",
        "pope_yes_ratio",
        "words",
    ]
    assert list(result) == ["base", "dpo", "difference", "n"] and result["n"] == 3
    assert list(result["base"]) == list(result["dpo"]) == list(result["difference"]) == metrics
    assert result["difference"]["chair_i"]["mean"] == pytest.approx(-1 / 3)
    assert set(result["difference"]["chair_i"]) == {"mean", "low", "high", "p"}


def test_constant_answers_are_the_known_lines():
    scores = {
        name: {m: rate(c) for m, c in evaluation.count(a, TRUTHS).items()}
        for name, a in evaluation.constant_answers(TRUTHS).items()
    }
    assert scores["always yes"]["pope_accuracy"] == scores["always no"]["pope_accuracy"] == 0.5
    assert (
        scores["always yes"]["pope_f1"] == pytest.approx(2 / 3)
        and scores["always no"]["pope_f1"] == 0
    )
    assert scores["lists everything"]["recall"] == 1 and scores["lists everything"][
        "chair_i"
    ] == pytest.approx(10 / 12)
    assert (
        np.isnan(scores["the empty answer"]["chair_i"]) and scores["the empty answer"]["words"] == 0
    )


def test_attributes_right_looks_only_at_true_objects():
    texts = [
        "At the top there is a green chair. On the left there is a blue cup. In the center there is a red kite."
    ]
    assert evaluation.attributes_right(texts, TRUTHS[:1], "colour") == 0.5
    assert evaluation.attributes_right(texts, TRUTHS[:1], "place") == 1.0


def test_answers_do_not_depend_on_the_batch():
    settings = PROFILES["embedded"]
    model, processor = models.load_model(settings), models.load_processor(settings)
    scenes = preferences.load(settings.dataset, "test[:6]")
    together = answer(model, processor, scenes["image"], scenes["question"], settings)
    alone = [
        answer(model, processor, [row["image"]], [row["question"]], settings)[0] for row in scenes
    ]
    assert together == alone and all(together)
    sampled = answer(model, processor, scenes["image"], scenes["question"], settings, samples=3)
    assert [len(texts) for texts in sampled] == [3] * 6
    with pytest.raises(ValueError, match="2 images but 1 questions"):
        answer(model, processor, list(scenes["image"])[:2], ["What?"], settings)


def test_the_base_model_sees_and_hallucinates_as_planted():
    import json

    from utils.settings import ROOT

    base = json.loads((ROOT / "results" / "embedded" / "base.json").read_text())
    assert base["n"] >= 500 and min(base["recall"], base["colour"], base["place"]) >= 0.9
    assert 0.12 <= base["chair_i"] <= 0.35 and base["cog"] > 0.5 and base["pope_accuracy"] >= 0.75
    assert base["pope_accuracy_adversarial"] == min(
        base[f"pope_accuracy_{kind}"] for kind in evaluation.POPE_KINDS
    )

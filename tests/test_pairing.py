import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from embedded.claims import claims, is_right
from embedded.drawing import COLOURS
from embedded.scenes import CATEGORIES, DESCRIBE, PLACES, describe, existence_question
from utils import models, pairing, preferences
from utils.settings import PROFILES

SETTINGS = PROFILES["embedded"]
SCENE = [
    {"category": "cup", "colour": "red", "place": "top"},
    {"category": "car", "colour": "blue", "place": "left"},
]
FULL, SHORT = describe(SCENE), describe(SCENE[:1])
LONG = FULL + " On the right there is a red book."


@pytest.fixture(scope="module")
def model():
    return models.load_model(SETTINGS)


def object_claim(category, there=True):
    return {"kind": "object", "category": category, "value": there}


# claims and judges


def test_splitter_and_judge_agree_with_a_strict_reading_of_a_thousand_sampled_answers():
    """The answers of the test split were sampled from the base model. Each sentence of the usual form is read a second way."""
    phrases = {phrase: place for place, phrase in PLACES.items()}
    answers, compared = 0, 0
    for row in preferences.load(SETTINGS.dataset, "test").remove_columns("image"):
        for text in (row["chosen"], row["rejected"]):
            answers += 1
            told = [{k: v for k, v in c.items() if k not in ("start", "end")} for c in claims(text)]
            by_sentence = [c for sentence in pairing.sentences(text) for c in claims(sentence)]
            assert told == [
                {k: v for k, v in c.items() if k not in ("start", "end")} for c in by_sentence
            ]
            for sentence in pairing.sentences(text):
                place, _, thing = sentence.removesuffix(".").partition(" there is a ")
                words = thing.split(" ")
                if (
                    place not in phrases
                    or len(words) != 2
                    or words[0] not in COLOURS
                    or words[1] not in CATEGORIES
                ):
                    continue  # one sentence in 27 is broken; the next test is about those
                same = [o for o in row["objects"] if o["category"] == words[1]]
                expected = {
                    ("object", True): bool(same),
                    ("colour", words[0]): words[0] in [o["colour"] for o in same],
                    ("place", phrases[place]): phrases[place] in [o["place"] for o in same],
                }
                made = claims(sentence)
                verdicts = pairing.truth_judge(made, [row] * len(made))
                assert [c["category"] for c in made] == [words[1]] * 3
                assert {
                    (c["kind"], c["value"]): v for c, v in zip(made, verdicts, strict=True)
                } == expected, sentence
                compared += 3
    assert answers >= 1000 and compared > 7500


def test_a_broken_sentence_is_judged_by_what_can_be_read_in_it():
    made = claims("At the top there is a red a red cup. On the left there is a")
    assert [(c["kind"], c["value"]) for c in made] == [
        ("place", "top"),
        ("colour", "red"),
        ("colour", "red"),
        ("object", True),
    ]
    assert pairing.truth_judge(made, [{"objects": SCENE}] * 4) == [True] * 4


def test_a_tie_is_a_rejection_whatever_the_expected_answer():
    assert pairing.accepts(0.6, 0.4) and not pairing.accepts(0.4, 0.6)
    assert pairing.accepts(0.4, 0.6, "no") and not pairing.accepts(0.6, 0.4, "no")
    assert not pairing.accepts(0.5, 0.5) and not pairing.accepts(0.5, 0.5, "no")


def test_every_kind_of_claim_becomes_a_question_for_yes_or_no():
    said = (
        FULL
        + " There are three objects. There is one object. No, there is no kite. At the top left there is nothing. It is an orange apple."
    )
    asked = [pairing.as_question(c) for c in claims(said)]
    assert asked == [
        ("Is there a cup at the top of the image?", "yes"),
        ("Is there a red cup in the image?", "yes"),
        ("Is there a cup in the image?", "yes"),
        ("Is there a car on the left of the image?", "yes"),
        ("Is there a blue car in the image?", "yes"),
        ("Is there a car in the image?", "yes"),
        ("Are there three objects in the image?", "yes"),
        ("Is there one object in the image?", "yes"),
        ("Is there a kite in the image?", "no"),
        ("Is there nothing at the top left of the image?", "yes"),
        ("Is there an apple in the image?", "yes"),
    ]
    assert pairing.as_question("A dog sleeps.") == (
        "Is this true of the image? A dog sleeps.",
        "yes",
    )


def test_sentences_are_claims_of_texts_that_nothing_better_splits():
    assert pairing.sentences("A dog sleeps. Is it old?\n\nIt is!  And") == [
        "A dog sleeps.",
        "Is it old?",
        "It is!",
        "And",
    ]


# the model as a judge


def test_yes_and_no_are_read_where_the_embedded_model_says_them(processor):
    lead, yes, no = pairing.answer_tokens(processor)
    decode = processor.tokenizer.decode
    assert (decode(lead), [decode(i) for i in yes], [decode(i) for i in no]) == (
        " ",
        ["Yes"],
        ["No"],
    )


def fake_processor(words, before="Assistant:"):
    """A chat template that ends with `before`, and a tokenizer that knows the prompt and `words` as one token each."""

    def template(messages, add_generation_prompt=False, tokenize=False):
        answers = "".join(
            " " + m["content"][0]["text"] for m in messages if m["role"] == "assistant"
        )
        return "Assistant:" + answers if answers else before

    def tokenizer(text, add_special_tokens):
        rest = text.removeprefix("Assistant:")
        return {
            "input_ids": [99] if rest == text else [0, *([words.index(rest) + 1] if rest else [])]
        }

    return SimpleNamespace(apply_chat_template=template, tokenizer=tokenizer)


def test_all_spellings_of_yes_and_no_count_that_are_one_token():
    assert pairing.answer_tokens(fake_processor([" Yes", " yes", " No", " no"])) == (
        [],
        [1, 2],
        [3, 4],
    )


def test_a_template_that_changes_the_prompt_is_refused():
    with pytest.raises(ValueError, match="changes the prompt"):
        pairing.answer_tokens(
            fake_processor([" Yes", " yes", " No", " no"], before="Assistant thinks:")
        )


def test_probabilities_do_not_depend_on_the_batch(model, processor):
    scenes = preferences.load(SETTINGS.dataset, "test[:6]")
    questions = [
        existence_question(category)
        for category in ("cup", "umbrella", "car", "kite", "bowl", "apple")
    ]
    together = pairing.yes_and_no(model, processor, list(scenes["image"]), questions, SETTINGS)
    alone = [
        pairing.yes_and_no(model, processor, [row["image"]], [q], SETTINGS)[0]
        for row, q in zip(scenes, questions, strict=True)
    ]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert (
        ((together > 0) & (together < 1)).all()
        and (together.sum(1) > 0.9).all()
        and not model.training
    )


def test_the_model_judges_what_is_there_and_is_asked_each_question_once(
    model, processor, monkeypatch
):
    rows = [dict(row) for row in preferences.load(SETTINGS.dataset, "test[:24]")]
    there = [(object_claim(row["objects"][0]["category"]), row) for row in rows]
    denied = [(object_claim(claim["category"], False), row) for claim, row in there]
    asked, original = [], pairing.yes_and_no
    monkeypatch.setattr(
        pairing, "yes_and_no", lambda *arguments: asked.append(arguments[3]) or original(*arguments)
    )
    judge = partial(pairing.model_judge, model=model, processor=processor, settings=SETTINGS)
    verdicts = judge(*map(list, zip(*there, *denied, strict=True)))
    assert len(asked) == 1 and len(asked[0]) == len(rows)
    assert np.mean(verdicts[: len(rows)]) > 0.8 and np.mean(verdicts[len(rows) :]) < 0.2
    assert judge([], []) == []


# scores and pairs


def test_scores_and_pairs_are_rlaif_v_s():
    """Three claims of which two are accepted and one is a tie; one of one; one of three (shared/metrics.md, section 6)."""
    probabilities = {
        "a1": (0.9, 0.1),
        "a2": (0.8, 0.2),
        "a3": (0.5, 0.5),
        "b1": (0.7, 0.3),
        "c1": (0.6, 0.4),
        "c2": (0.1, 0.9),
        "c3": (0, 1),
    }
    judge = lambda claims, rows: [pairing.accepts(*probabilities[claim]) for claim in claims]  # noqa: E731
    texts = ["a1 a2 a3", "b1", "c1 c2 c3"]
    counts = pairing.rejections([texts], [{}], judge, split=str.split)
    assert counts == [[1, 0, 2]]
    assert set(pairing.candidates(texts, counts[0])) == {
        (texts[0], texts[2]),
        (texts[1], texts[2]),
        (texts[1], texts[0]),
    }


def test_a_judge_that_forgets_a_claim_is_refused():
    with pytest.raises(ValueError, match="1 verdicts on 3 claims"):
        pairing.rejections([[SHORT]], [{"objects": SCENE}], lambda claims, rows: [True])


def test_mistakes_count_omissions_in_descriptions_only():
    rows = [
        {"objects": SCENE, "question": DESCRIBE[0]},
        {"objects": SCENE, "question": existence_question("cup")},
    ]
    answers = [[FULL, SHORT, LONG], ["Yes, there is a cup.", "No, there is no cup."]]
    assert pairing.mistakes(answers, rows) == [[0, 1, 3], [0, 1]]
    assert pairing.rejections(answers, rows, pairing.truth_judge) == [[0, 0, 3], [0, 1]]


def test_equal_answers_are_one_and_empty_ones_none():
    assert pairing.candidates(["x", "x", "", " ", "y"], [0, 0, 0, 0, 1]) == [("x", "y")]


def test_at_most_two_pairs_come_from_one_question():
    texts, counts = [f"text {i}" for i in range(8)], list(range(8))
    pairs = pairing.pair_up(texts, counts, random.Random(0))
    assert len(pairs) == len(set(pairs)) == 2 and all(
        texts.index(c) < texts.index(r) for c, r in pairs
    )
    assert pairing.pair_up(texts[:2], [3, 3], random.Random(0)) == []


def test_the_best_answer_meets_a_longer_and_a_shorter_worse_one():
    answers = [FULL, SHORT, LONG, FULL, "Hm."]
    counts = [0, 1, 3, 0, 0]
    pairs = pairing.pair_with_best(answers, counts, random.Random(0))
    assert sorted(pairs) == sorted([(FULL, LONG), (FULL, SHORT)])
    assert pairing.pair_with_best(["Hm."], [0], random.Random(0)) == []


def words(number):
    return "a " * number


def test_the_threshold_is_the_one_with_the_smallest_gap():
    lengths = [(10, 10), (10, 8), (9, 12), (2, 20)]  # shares 0, -0.25, 0.25, 0.9
    pairs = [{"chosen": words(c), "rejected": words(r)} for c, r in lengths]
    kept, threshold = pairing.balance_by_threshold(pairs)
    assert kept == pairs[:3] and threshold == 0.26
    with pytest.raises(ValueError, match="no pair to balance"):
        pairing.balance_by_threshold([])


def test_balance_at_random_makes_the_mean_lengths_equal_and_loses_nothing_else():
    rng = random.Random(0)
    rows = [
        {"chosen": words(rng.randint(5, 9)), "rejected": words(rng.randint(7, 14))}
        for _ in range(400)
    ]
    kept = pairing.balance_at_random(rows, rng)
    assert (
        abs(sum(map(pairing.gap, kept))) <= 9
        and all(row in rows for row in kept)
        and len(kept) > 50
    )


def test_pairs_become_a_data_set_that_check_accepts_with_the_images_as_stored():
    scenes = preferences.load(SETTINGS.dataset, "test[:4]")
    rows = [{"objects": row["objects"], "question": DESCRIBE[0]} for row in scenes]
    answers = [
        [describe(row["objects"]), "At the top there is nothing at all, and nothing."]
        for row in rows
    ]
    pairs = pairing.pair_all(rows, answers, pairing.mistakes(answers, rows), random.Random(0))
    dataset = pairing.to_dataset(scenes, pairs)
    assert preferences.check(dataset) == {} and len(dataset) == len(pairs) == 4
    stored = list(preferences.image_bytes(scenes))
    assert list(preferences.image_bytes(dataset)) == [stored[pair["row"]] for pair in pairs]
    assert all(
        is_right(claim, rows[pair["row"]]["objects"])
        for pair in pairs
        for claim in claims(pair["chosen"])
    )

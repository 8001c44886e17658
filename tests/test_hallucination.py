"""CHAIR, POPE and AMBER against cases by hand, published label counts and recomputations."""

import random
from collections import Counter
from itertools import product

import numpy as np
import pytest

from utils.hallucination import (
    amber_counts,
    amber_discriminative,
    amber_generative,
    caption_mentions,
    chair,
    chair_counts,
    pope,
    pope_counts,
    says_no,
)
from utils.paired_statistics import rate

# CHAIR


def test_chair_by_hand():
    said = [["cup", "clock", "clock"], ["book"], []]
    truths = [["cup", "book"], ["book"], ["car"]]
    assert chair(said, truths) == {"chair_i": 2 / 4, "chair_s": 1 / 3, "recall": 2 / 4}
    assert chair_counts(said, truths)["chair_i"].tolist() == [[2, 3], [0, 1], [0, 0]]


@pytest.mark.parametrize("said", [[[]], []])
def test_chair_without_any_mention_says_so(said):
    with pytest.raises(ZeroDivisionError, match="CHAIR_i"):
        chair(said, [["cup"]] * len(said))


def test_chair_takes_an_image_without_truth_as_entirely_hallucinated():
    assert chair([["cup", "cup"], ["book"]], [[], ["book"]]) == {
        "chair_i": 2 / 3,
        "chair_s": 1 / 2,
        "recall": 1.0,
    }


def test_chair_counts_true_objects_once_and_mentions_every_time():
    assert chair([["cup", "cup", "cup"]], [["cup", "cup", "book"]]) == {
        "chair_i": 0.0,
        "chair_s": 0.0,
        "recall": 1 / 2,
    }


SYNONYMS = {
    "person": "person",
    "baby": "person",
    "passenger": "person",
    "adult": "person",
    "bird": "bird",
    "duck": "bird",
    "dog": "dog",
    "puppy": "dog",
    "hot dog": "hot dog",
    "bear": "bear",
    "teddy bear": "teddy bear",
    "bicycle": "bicycle",
    "bike": "bicycle",
    "motorcycle": "motorcycle",
    " motor bike": "motorcycle",
    "train": "train",
    "airplane": "airplane",
    "jet": "airplane",
    "chair": "chair",
    "seat": "chair",
    "toilet": "toilet",
    "tie": "tie",
    "bow tie": "tie",
    "bow": "tie",
    "wine glass": "wine glass",
    "bus": "bus",
    "minibus": "bus",
    "traffic light": "traffic light",
    "table": "dining table",
}


def singular(word):
    """What the official singularizer does to the words of these tests."""
    return {"buses": "bus", "minibuses": "minibus", "glass": "glas", "glasses": "glass"}.get(
        word, word.removesuffix("s")
    )


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("Two dogs, a PUPPY and a dog's bowl.", ["dog", "dog", "dog"]),
        ("A hot dog beside a teddy bear.", ["hot dog", "teddy bear"]),
        ("A baby bird and an adult bear", ["bird", "bear"]),
        ("A baby, an adult and a bird", ["person", "person", "bird"]),
        ("A passenger jet over a passenger train", ["airplane", "train"]),
        # Joined, and COCO's own list holds it only with a second space.
        ("A man on a motor bike", []),
        ("A motor, a bike", ["bicycle"]),
        ("Grass on the train tracks", []),
        ("The seat of the toilet", ["toilet"]),
        ("A toilet seat, a chair and a seat", ["toilet", "chair"]),
        ("A seat beside a chair", ["chair", "chair"]),
        ("A bow tie and a bow", ["tie", "tie"]),
        ("A wine glass, two wine glasses", ["wine glass", "wine glass"]),
        ("Traffic lights at a dining table", ["traffic light", "dining table"]),
        ("A birdhouse with a hot-dog stand", []),
        ("", []),
    ],
)
def test_a_caption_names_the_categories_of_the_official_rules(caption, named):
    assert caption_mentions(caption, SYNONYMS, singular) == named


def test_a_bus_is_never_counted_and_buses_are():
    assert caption_mentions("A bus beside a minibus", SYNONYMS, singular) == []
    assert caption_mentions("Two buses", SYNONYMS, singular) == ["bus"]


def test_captions_can_be_split_by_another_tokenizer():
    assert caption_mentions("Dog|Bear", SYNONYMS, singular, words=lambda text: text.split("|")) == [
        "dog",
        "bear",
    ]


# POPE


@pytest.mark.parametrize(
    "answer",
    [
        "NO",
        "none",
        "No!",
        "no\n",
        "It isn't",
        "",
        "Maybe",
        "Yes. No.",
        "Yes, there is a cup.",
        "Yes\nno",
        "I see. No cup",
    ],
)
def test_pope_reads_these_as_yes(answer):
    assert not says_no(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "No",
        "no",
        "No, there is no cup.",
        "Yes, not a doubt",
        "It is not, I think",
        "No. Yes.",
        "N,o",
    ],
)
def test_pope_reads_these_as_no(answer):
    assert says_no(answer)


def test_pope_by_hand():
    scores = pope(["Yes", "Yes", "No", "No"], ["yes", "no", "no", "yes"])
    assert scores == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5}


@pytest.mark.parametrize("labels", [["no"], ["yes", "no"]])
def test_pope_has_no_precision_when_every_answer_is_a_no(labels):
    with pytest.raises(ZeroDivisionError, match="precision"):
        pope(["No"] * len(labels), labels)


def test_pope_of_yes_answers_that_are_all_wrong():
    scores = pope(["Yes", "No"], ["no", "yes"])
    assert scores == {"accuracy": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.5}


def test_pope_refuses_answers_without_partner():
    with pytest.raises(ValueError, match=r"1 answers .* 2 labels"):
        pope(["Yes"], ["yes", "no"])


def test_pope_equals_a_confusion_table_to_the_last_digit():
    rng = random.Random(0)
    for _ in range(50):
        answers = rng.choices(["yes", "no"], k=rng.randint(40, 400))
        labels = rng.choices(["yes", "no"], k=len(answers))
        confusion = Counter(zip(answers, labels, strict=True))
        hit = confusion["yes", "yes"]
        false_alarm = confusion["yes", "no"]
        miss = confusion["no", "yes"]
        p = hit / (hit + false_alarm)
        r = hit / (hit + miss)
        expected = {
            "accuracy": (hit + confusion["no", "no"]) / len(answers),
            "precision": p,
            "recall": r,
            "f1": 2 * p * r / (p + r),
            "yes_ratio": (hit + false_alarm) / len(answers),
        }
        assert pope(answers, labels) == expected
        assert rate(pope_counts(answers, labels)["f1"]) == pytest.approx(expected["f1"])


# AMBER, yes/no questions

LABELS = {  # type in the official annotations.json: how many have the truth yes, and no
    "discriminative-hallucination": (0, 4924),
    "discriminative-attribute-state": (2382, 2382),
    "discriminative-attribute-number": (1036, 1036),
    "discriminative-attribute-action": (396, 396),
    "discriminative-relation": (975, 0),
    "relation": (0, 689),
}


def annotations(labels):
    rows = []
    for kind, (yes, no) in labels.items():
        for truth in ["yes"] * yes + ["no"] * no:
            rows.append({"id": len(rows) + 1, "type": kind, "truth": truth})
    return rows


def scores_of(answer, rows):
    """The scores of a model that answers every question with `answer(truth)`."""
    return amber_discriminative(
        [{"id": row["id"], "response": answer(row["truth"])} for row in rows], rows
    )


def figures(accuracy, precision, recall, f1):
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


def test_amber_of_always_no_on_the_official_label_counts():
    half = figures(50.0, 50.0, 100.0, 66.7)
    assert scores_of(lambda truth: "No", annotations(LABELS)) == {
        **figures(66.3, 66.3, 100.0, 79.7),
        "existence": figures(100.0, 100.0, 100.0, 100.0),
        **dict.fromkeys(("attribute", "state", "number", "action"), half),
        "relation": figures(41.4, 41.4, 100.0, 58.6),
    }


def test_amber_of_always_yes_on_the_official_label_counts():
    half = figures(50.0, 0.0, 0.0, 0.0)
    assert scores_of(lambda truth: "Yes", annotations(LABELS)) == {
        **figures(33.7, 0.0, 0.0, 0.0),
        "existence": figures(0.0, 0.0, 0.0, 0.0),
        **dict.fromkeys(("attribute", "state", "number", "action"), half),
        "relation": figures(58.6, 0.0, 0.0, 0.0),
    }


def test_amber_of_the_perfect_model_on_the_official_label_counts():
    scores = scores_of(str.capitalize, annotations(LABELS))
    assert {
        name: values for name, values in scores.items() if not isinstance(values, dict)
    } == figures(100.0, 100.0, 100.0, 100.0)
    assert all(
        scores[name] == figures(100.0, 100.0, 100.0, 100.0)
        for name in ("existence", "attribute", "relation")
    )


@pytest.mark.parametrize(
    "answer", ["Yes.", "No.", "yes", "no", "NO", " No", "", "Yes, there is a cup."]
)
def test_amber_takes_only_yes_and_no_to_the_letter(answer):
    rows = annotations({"discriminative-attribute-state": (10, 10)})
    assert scores_of(lambda truth: answer, rows)["state"] == figures(0.0, 0.0, 0.0, 0.0)


def test_amber_does_not_take_an_unreadable_answer_for_a_no():
    rows = annotations({"discriminative-relation": (0, 1000)})
    responses = [{"id": row["id"], "response": "No" if row["id"] <= 500 else "no"} for row in rows]
    assert amber_discriminative(responses, rows)["relation"] == figures(50.0, 100.0, 50.0, 66.7)


def test_amber_existence_costs_a_twentieth_of_a_point_of_f1():
    kinds = {"discriminative-hallucination": (0, 2000), "discriminative-attribute-state": (0, 2000)}
    rows = annotations(kinds)
    scores = amber_discriminative(
        [{"id": row["id"], "response": "No" if row["id"] % 2 else "Yes"} for row in rows], rows
    )
    assert scores["existence"] == figures(50.0, 100.0, 50.0, 66.6)
    assert scores["state"] == figures(50.0, 100.0, 50.0, 66.7)


def test_amber_denominators_are_a_thousandth_too_large_and_attributes_three():
    one = amber_discriminative(
        [{"id": 1, "response": "No"}],
        [{"id": 1, "type": "discriminative-attribute-state", "truth": "no"}],
    )
    assert one["state"] == figures(99.9, 99.9, 99.9, 99.9)
    assert one["attribute"] == figures(99.7, 99.7, 99.7, 99.7)  # 1 / 1.003
    assert set(one) == {"accuracy", "precision", "recall", "f1", "state", "attribute"}, (
        "only dimensions that were asked about"
    )


def test_amber_f1_comes_from_rounded_precision_and_recall():
    rows = annotations({"relation": (1, 16)})  # 1 yes, 16 no
    scores = amber_discriminative(
        [{"id": row["id"], "response": "No" if row["id"] <= 12 else "Yes"} for row in rows], rows
    )["relation"]
    assert (scores["precision"], scores["recall"]) == (91.7, 68.7)  # 11 / 12.001 and 11 / 16.001
    # 2 · 0.917 · 0.687 / (0.917 + 0.687 + 0.0001). Of the fractions themselves it would be 78.6.
    assert scores["f1"] == 78.5


def test_amber_counts_an_id_as_often_as_it_is_answered():
    rows = annotations({"relation": (1000, 1000)})
    twice = [{"id": 1, "response": "Yes"}] * 3000 + [{"id": 2000, "response": "Yes"}] * 1000
    assert amber_discriminative(twice, rows)["accuracy"] == 75.0


def test_amber_names_an_id_that_is_unknown_or_generative():
    rows = [
        {"id": 1, "type": "generative", "truth": ["sky"], "hallu": []},
        {"id": 2, "type": "relation", "truth": "no"},
    ]
    assert amber_discriminative([{"id": 2, "response": "No"}], rows)["accuracy"] == 99.9
    with pytest.raises(ValueError, match="id 7"):
        amber_discriminative([{"id": 7, "response": "No"}], rows)
    with pytest.raises(ValueError, match=r"id 1: .* 'generative'"):
        amber_discriminative([{"id": 1, "response": "No"}], rows)


def recomputed(given, no, gold, asked, name):
    """The four figures of the ids `asked`, from sets where the module counts pairs."""
    start = 0.003 if name == "attribute" else 0.001
    epsilon = 0.001 if name == "existence" else 0.0001
    right = (no & gold) | {i for i in given if given[i] == "Yes" and i not in gold}
    accuracy = round(100 * len(right & asked) / (len(asked) + start), 1)
    p = round(100 * len(no & gold & asked) / (len(no & asked) + start), 1)
    r = round(100 * len(no & gold & asked) / (len(gold & asked) + start), 1)
    f1 = round(100 * 2 * (p / 100 * r / 100) / (p / 100 + r / 100 + epsilon), 1)
    return figures(accuracy, p, r, f1)


def test_amber_discriminative_equals_a_recomputation_on_random_answers():
    rng = random.Random(0)
    dimension = {
        "discriminative-hallucination": "existence",
        "discriminative-attribute-state": "state",
        "discriminative-attribute-number": "number",
        "discriminative-attribute-action": "action",
        "discriminative-relation": "relation",
        "relation": "relation",
    }
    for _ in range(200):
        rows = []
        for i in range(1, rng.randint(3, 300)):
            kind = rng.choice(list(LABELS))
            rows.append({"id": i, "type": kind, "truth": rng.choice(["yes", "no"])})
        given = {}
        for row in rows:
            if rng.random() < 0.9:
                given[row["id"]] = rng.choice(["Yes", "No", "No", "no", "Yes."])
        responses = [{"id": i, "response": text} for i, text in given.items()]
        scores = amber_discriminative(responses, rows)
        groups = {"overall": set(given), "attribute": set()}
        for row in rows:
            if row["id"] in given:
                name = dimension[row["type"]]
                groups.setdefault(name, set()).add(row["id"])
                if name in ("state", "number", "action"):
                    groups["attribute"].add(row["id"])
        no = {i for i in given if given[i] == "No"}
        gold = {row["id"] for row in rows if row["truth"] == "no"}
        for name, asked in groups.items():
            if asked:
                got = scores if name == "overall" else scores[name]
                four = {key: got[key] for key in ("accuracy", "precision", "recall", "f1")}
                assert four == recomputed(given, no, gold, asked, name), name


# AMBER, descriptions

ASSOCIATIONS = {
    "ship": ["boat"],
    "sea": ["water", "ocean"],
    "person": ["man", "child"],
    "sky": [],
    "light": [],
    "tree": ["plant"],
}


def described(nouns, truth, hallu=(), safe=(), similar=None, times=1000):
    """Scores of the same answer to `times` equal images, where the 0.001 no longer shows."""
    rows = [{"truth": list(truth), "hallu": list(hallu)}] * times
    return amber_generative([list(nouns)] * times, rows, ASSOCIATIONS, list(safe), similar)


def test_amber_description_by_hand():
    scores = described(
        ["man", "ship", "tree", "tree", "boat"], ["person", "ship", "sky"], ["tree", "sea"]
    )
    assert scores == {"chair": 40.0, "cover": 66.7, "hal": 100.0, "cog": 50.0}


def test_amber_counts_are_the_same_per_answer():
    rows = [
        {"truth": ["person", "ship", "sky"], "hallu": ["tree", "sea"]},
        {"truth": ["sea"], "hallu": []},
    ]
    counts = amber_counts([["man", "tree", "tree"], []], rows, ASSOCIATIONS, [])
    assert {name: values.tolist() for name, values in counts.items()} == {
        "chair": [[2, 3], [0, 0]],
        "cover": [[1, 3], [0, 1]],
        "hal": [[1, 1], [0, 1]],
        "cog": [[1, 2], [0, 0]],
    }


def test_amber_drops_nouns_outside_of_the_vocabulary_and_keeps_capital_letters():
    assert described(["Ship", "picture", "SKY"], ["ship"]) == {
        "chair": 0.0,
        "cover": 0.0,
        "hal": 0.0,
        "cog": 0.0,
    }


def test_amber_of_empty_answers():
    assert described([], ["ship", "sky"], ["tree"]) == {
        "chair": 0.0,
        "cover": 0.0,
        "hal": 0.0,
        "cog": 0.0,
    }


def test_amber_denominators_show_on_few_answers():
    assert described(["ship"], ["ship"], ["tree"], times=1) == {
        "chair": 0.0,
        "cover": 99.9,
        "hal": 0.1,
        "cog": 0.0,
    }
    assert described(["tree"], ["ship"], ["tree"], times=1) == {
        "chair": 99.9,
        "cover": 0.0,
        "hal": 100.0,
        "cog": 99.9,
    }


def test_amber_cover_credits_an_entry_that_stands_twice_once():
    """Listing everything in the real files scores 93.3, not 100: some entries are there twice."""
    assert described(["ship", "ship", "boat"], ["ship", "ship"])["cover"] == 50.0


def test_amber_credits_the_first_object_whose_word_matches():
    """Associated words come before the objects: "plant" names the tree here, not the plant."""
    associations = {"tree": ["plant"], "plant": []}
    rows = [{"truth": ["plant", "tree"], "hallu": []}] * 1000
    assert amber_generative([["plant"]] * 1000, rows, associations, [])["cover"] == 50.0
    assert amber_generative([["plant", "tree"]] * 1000, rows, associations, [])["cover"] == 50.0


def test_amber_safe_words_count_as_mentions_but_never_as_mistakes():
    assert described(["light", "tree"], ["ship"])["chair"] == 100.0
    assert described(["light", "tree"], ["ship"], safe=["light"])["chair"] == 50.0


def test_amber_safe_words_are_asked_first_and_credit_nothing():
    assert described(["light"], ["light"], ["light"], safe=["light"]) == {
        "chair": 0.0,
        "cover": 0.0,
        "hal": 0.0,
        "cog": 0.0,
    }


def test_amber_cog_is_that_of_the_code_not_of_the_paper():
    """Code: 1 of 2 hallu entries. Paper: 3 of 4 mentions."""
    assert described(["tree", "tree", "tree", "ship"], ["ship"], ["tree", "sea"])["cog"] == 50.0


def alike(*pairs):
    return lambda noun, word: 0.9 if (noun, word) in pairs else 0.8  # 0.8 itself is not enough


def test_amber_similar_words_decide_in_the_official_order():
    """An equal truth ends the search; a similar one saves the noun after hallu is marked."""
    both = alike(("boat", "tree"), ("boat", "sea"))
    assert described(["boat"], ["ship"], ["tree"], similar=both)["cog"] == 0.0, (
        "the exact truth was asked first"
    )
    assert described(["boat"], ["sea"], ["tree"], similar=both) == {
        "chair": 0.0,
        "cover": 100.0,
        "hal": 0.0,
        "cog": 100.0,
    }
    assert described(["boat"], ["sky"], ["tree"], similar=both) == {
        "chair": 100.0,
        "cover": 0.0,
        "hal": 100.0,
        "cog": 100.0,
    }


def test_amber_marks_an_exact_and_a_similar_hallu_entry_for_one_noun():
    assert (
        described(["boat"], ["sky"], ["ship", "tree"], similar=alike(("boat", "tree")))["cog"]
        == 100.0
    )
    assert described(["boat"], ["sky"], ["ship", "tree"])["cog"] == 50.0


def test_amber_takes_only_the_first_similar_word():
    close = alike(("boat", "sky"), ("boat", "sea"))
    assert described(["boat"], ["sky", "sea"], similar=close)["cover"] == 50.0


def test_amber_needs_more_than_four_fifths_of_similarity():
    assert described(["boat"], ["sky"], ["tree"], similar=alike()) == {
        "chair": 100.0,
        "cover": 0.0,
        "hal": 100.0,
        "cog": 0.0,
    }


def test_amber_names_an_object_that_has_no_associations():
    with pytest.raises(ValueError, match="moon"):
        described(["ship"], ["ship", "moon"])


def test_amber_refuses_answers_without_annotation():
    with pytest.raises(ValueError, match="shorter"):
        amber_generative([["ship"]], [], ASSOCIATIONS, [])


def table(objects, associations):
    """Two lists of the same length: the words that name `objects`, and which object each names."""
    words = []
    owners = []
    for number, name in enumerate(objects):
        words += associations[name]
        owners += [number] * len(associations[name])
    return words + objects, owners + list(range(len(objects)))


def hit_first(hits, owners, matches):
    """Mark the owner of the first match, and return whether there is one."""
    if True in matches:
        hits[owners[matches.index(True)]] = 1
    return True in matches


def recomputed_description(said, row, associations, safe, similarity):
    """(wrong mentions, mentions, truth entries credited, hallu entries marked) of one response."""
    vocabulary = set(associations)
    for words in associations.values():
        vocabulary.update(words)
    words, owners = table(row["truth"], associations)
    habit_words, habit_owners = table(row["hallu"], associations)
    credits = [0] * len(row["truth"])
    marks = [0] * len(row["hallu"])
    verdicts = []
    for noun in said:
        if noun not in vocabulary:
            continue
        equal = [word == noun for word in words]
        if noun in safe or hit_first(credits, owners, equal):
            verdicts.append(0)
            continue
        hit_first(marks, habit_owners, [word == noun for word in habit_words])
        hit_first(marks, habit_owners, [similarity(noun, word) > 0.8 for word in habit_words])
        saved = hit_first(credits, owners, [similarity(noun, word) > 0.8 for word in words])
        verdicts.append(0 if saved else 1)
    return sum(verdicts), len(verdicts), sum(credits), sum(marks)


def random_descriptions(rng, words):
    """Objects with associated words, truths about some images, and nouns said of them."""
    objects = rng.sample(words, 8)
    associations = {name: rng.choices(words, k=rng.randint(0, 3)) for name in objects}
    rows = []
    nouns = []
    for _ in range(rng.randint(1, 9)):
        hallu = rng.choices(objects, k=rng.randint(0, 2))
        rows.append({"truth": rng.choices(objects, k=3), "hallu": hallu})
        nouns.append(rng.choices([*words, "elsewhere"], k=rng.randint(0, 6)))
    return associations, rows, nouns


def test_amber_generative_equals_a_recomputation_on_random_answers():
    """Written as tables of words and credits, with exact integer sums."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(14)]
    for trial in range(300):
        associations, rows, nouns = random_descriptions(rng, words)
        safe = rng.sample(words, 2)
        closeness = {}
        for pair in product(words, words):
            closeness[pair] = rng.choice([0.1, 0.7, 0.8, 0.81])
        for word in words:
            closeness[word, word] = 1.0

        def similarity(noun, word, closeness=closeness):
            return closeness[noun, word]

        def no_similarity(noun, word):
            return 0.0

        with_similar = trial % 2 == 1
        expected = []
        for said, row in zip(nouns, rows, strict=True):
            alike = similarity if with_similar else no_similarity
            expected.append(recomputed_description(said, row, associations, safe, alike))
        wrong, mentions, credits, marks = (sum(column) for column in zip(*expected, strict=True))
        spotless = [response[0] for response in expected].count(0)
        slots = sum(len(row["truth"]) for row in rows)
        traps = sum(len(row["hallu"]) for row in rows)
        similar = similarity if with_similar else None
        assert amber_generative(nouns, rows, associations, safe, similar) == {
            "chair": round(wrong / (mentions + 0.001) * 100, 1),
            "cover": round(credits / (slots + 0.001) * 100, 1),
            "hal": round(100 - spotless / (len(rows) + 0.001) * 100, 1),
            "cog": round(marks / (traps + 0.001) * 100, 1),
        }
        counts = amber_counts(nouns, rows, associations, safe, similar)
        assert np.array_equal(counts["cover"].sum(axis=0), [credits, slots])

"""The files of POPE, AMBER and CHAIR: what is written comes back, mistakes are named by line."""

import json

import pytest

from utils.benchmark_files import (
    read_amber,
    read_amber_queries,
    read_amber_responses,
    read_captions,
    read_coco,
    read_pope,
    read_pope_answers,
    read_synonyms,
    write_json,
    write_json_lines,
)
from utils.hallucination import amber_generative, caption_mentions, chair, pope

QUESTIONS = [
    {
        "question_id": 1,
        "image": "COCO_val2014_000000000042.jpg",
        "text": "Is there a cup in the image?",
        "label": "yes",
    },
    {
        "question_id": 2,
        "image": "COCO_val2014_000000000042.jpg",
        "text": "Is there a dog in the image?",
        "label": "no",
    },
]
ANSWERS = [
    {"question": "Is there a cup in the image?", "answer": "Yes"},
    {"question": "is there a dog in the image?", "answer": "No,\u2028no"},
]
ANNOTATIONS = [
    {"id": 1, "type": "generative", "truth": ["ship", "sea"], "hallu": ["person"]},
    {"id": 2, "type": "relation", "truth": "no"},
]
ASSOCIATIONS = {"ship": ["boat"], "sea": [], "person": ["man"]}
SYNONYMS = "cup, mug\ndog, puppy\nhot dog\ncake,  cheesecake, cupcake\nbowl, container, cup\n"


def singular(word):
    return word.removesuffix("s")


@pytest.fixture
def pope_files(tmp_path):
    write_json_lines(tmp_path / "pope" / "coco_pope_random.json", QUESTIONS)
    write_json_lines(tmp_path / "pope" / "answers.json", ANSWERS)
    return tmp_path / "pope"


@pytest.fixture
def amber_folder(tmp_path):
    write_json(tmp_path / "annotations.json", ANNOTATIONS)
    write_json(tmp_path / "relation.json", ASSOCIATIONS)
    (tmp_path / "safe_words.txt").write_text(
        "orange\nlight"
    )  # the official one, too, ends without a line feed
    return tmp_path


@pytest.fixture
def coco_folder(tmp_path):
    categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "hot dog"}]
    for split, image in (("val2014", 42), ("train2014", 9)):
        objects = [{"image_id": image, "category_id": 1}, {"image_id": image, "category_id": 1}]
        write_json(
            tmp_path / f"instances_{split}.json", {"categories": categories, "annotations": objects}
        )
        captions = [
            {"image_id": image, "caption": "A puppy."},
            {"image_id": image, "caption": "Two puppys and a spoon."},
        ]
        write_json(
            tmp_path / f"captions_{split}.json", {"annotations": captions if image == 42 else []}
        )
    (tmp_path / "synonyms.txt").write_text("cup, mug\ndog, puppy\nhot dog\n")
    return tmp_path


# what is written comes back


def test_pope_goes_to_disk_and_back(pope_files):
    questions = read_pope(pope_files / "coco_pope_random.json")
    answers = read_pope_answers(pope_files / "answers.json", questions)
    assert (questions, answers) == (QUESTIONS, ["Yes", "No,\u2028no"])
    assert (
        pope(answers, [row["label"] for row in questions])["accuracy"] == 0.5
    )  # "Nono" is no word of POPE's
    lines = (pope_files / "answers.json").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ANSWERS, (
        "one line an answer, as the official script splits them"
    )


def test_only_a_line_feed_ends_a_line(tmp_path):
    """Python's splitlines would also split at this mark, the official script does not."""
    row = {"question": QUESTIONS[0]["text"], "answer": "Yes.\u2028Sure."}
    (tmp_path / "answers.json").write_text(
        json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert read_pope_answers(tmp_path / "answers.json", QUESTIONS[:1]) == ["Yes.\u2028Sure."]


def test_amber_goes_to_disk_and_back(amber_folder):
    annotations, associations, safe_words = read_amber(amber_folder)
    assert (annotations, associations, safe_words) == (
        ANNOTATIONS,
        ASSOCIATIONS,
        ["orange", "light"],
    )
    assert (
        amber_generative([["boat", "man"]], annotations[:1], associations, safe_words)["cog"]
        == 99.9
    )
    queries = [
        {
            "id": 2,
            "image": "AMBER_1.jpg",
            "query": "Is there direct contact between the ship and the sea?",
        }
    ]
    write_json(amber_folder / "query" / "query_all.json", queries)
    assert read_amber_queries(amber_folder / "query" / "query_all.json") == queries
    write_json(amber_folder / "responses.json", [{"id": 2, "response": "No"}])
    assert read_amber_responses(amber_folder / "responses.json") == [{"id": 2, "response": "No"}]


def test_an_empty_safe_words_file_holds_no_word(amber_folder):
    (amber_folder / "safe_words.txt").write_text("")
    assert read_amber(amber_folder)[2] == []


@pytest.mark.parametrize(
    ("name", "write"), [("captions.json", write_json), ("captions.jsonl", write_json_lines)]
)
def test_captions_go_to_disk_and_back_in_both_forms(tmp_path, name, write):
    captions = [{"image_id": 42, "caption": "A cup.\nA “café”."}, {"image_id": 42, "caption": ""}]
    write(tmp_path / name, captions)
    assert read_captions(tmp_path / name) == captions


def test_coco_s_truth_is_what_is_segmented_and_what_captions_name(coco_folder):
    synonyms = read_synonyms(coco_folder / "synonyms.txt")
    truths = read_coco(coco_folder, synonyms, singular)
    assert truths == {42: {"cup", "dog"}, 9: {"cup"}}
    said = [caption_mentions(text, synonyms, singular) for text in ("A mug and a hot dog", "A cup")]
    assert chair(said, [truths[42], truths.get(7, set())]) == {
        "chair_i": 2 / 3,
        "chair_s": 1.0,
        "recall": 1 / 2,
    }


def test_synonyms_are_read_to_the_space_as_officially(tmp_path):
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    synonyms = read_synonyms(tmp_path / "synonyms.txt")
    assert synonyms["mug"] == "cup"
    assert synonyms["puppy"] == "dog"
    assert synonyms["hot dog"] == "hot dog"
    assert synonyms["cup"] == "bowl", "the later line wins"
    assert synonyms[" cheesecake"] == "cake" and "cheesecake" not in synonyms
    assert caption_mentions("A cheesecake and a cupcake", synonyms, singular) == ["cake"]


# what is missing


@pytest.mark.parametrize(
    ("read", "name", "source"),
    [
        (
            read_pope,
            "coco_pope_popular.json",
            "github.com/AoiDragon/POPE: output/coco/coco_pope_popular.json",
        ),
        (lambda path: read_pope_answers(path, []), "answers.json", "your own run"),
        (
            read_amber_queries,
            "query_all.json",
            "github.com/junyangwang0410/AMBER: data/query/query_all.json",
        ),
        (
            lambda path: read_amber(path.parent),
            "annotations.json",
            "github.com/junyangwang0410/AMBER: data/annotations.json",
        ),
        (read_amber_responses, "responses.json", "your own run"),
        (read_captions, "captions.jsonl", "your own run"),
        (read_synonyms, "synonyms.txt", "github.com/LisaAnne/Hallucination: data/synonyms.txt"),
        (
            lambda path: read_coco(path.parent, {}, singular),
            "instances_val2014.json",
            "annotations_trainval2014.zip: annotations/instances_val2014.json",
        ),
    ],
)
def test_a_missing_file_is_named_with_its_source(tmp_path, read, name, source):
    with pytest.raises(FileNotFoundError) as raised:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value) and source in str(raised.value)


@pytest.mark.parametrize("name", ["relation.json", "safe_words.txt"])
def test_every_file_of_amber_is_needed(amber_folder, name):
    (amber_folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"AMBER: data/{name}"):
        read_amber(amber_folder)


@pytest.mark.parametrize(
    "name", ["captions_val2014.json", "instances_train2014.json", "captions_train2014.json"]
)
def test_every_file_of_coco_is_needed(coco_folder, name):
    (coco_folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"annotations/{name}"):
        read_coco(coco_folder, {"cup": "cup", "dog": "dog", "hot dog": "hot dog"}, singular)


# what is wrong


def broken(folder, name, text, read, match):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=match) as raised:
        read(folder / name)
    assert name in str(raised.value)


def line(**changes):
    return json.dumps(QUESTIONS[0] | changes)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (line() + "\n\n" + line() + "\n", "line 2: not JSON"),
        (line() + "\n{'label': 'yes'}\n", "line 2: not JSON"),
        ("<!DOCTYPE html>\n", "line 1: not JSON"),
        (line() + '\n{"question_id": 2}\n', "line 2: no 'image'"),
        (line() + "\n[1]\n", "line 2: no 'question_id'"),
        (line() + "\n" + line(label="Yes"), "line 2: .* 'Yes'"),
        (line(text=3), "line 1: 'text' .* str"),
    ],
)
def test_pope_questions_that_are_malformed(tmp_path, text, match):
    broken(tmp_path, "coco_pope_random.json", text, read_pope, match)


@pytest.mark.parametrize(
    ("answers", "match"),
    [
        (ANSWERS[::-1], "line 1: .* a dog .* a cup"),
        ([ANSWERS[0], ANSWERS[0]], "line 2: .* a cup"),
        (ANSWERS[:1], "1 answers to 2 questions; line 2 "),
        ([*ANSWERS, ANSWERS[0]], "3 answers to 2 questions; line 3 "),
        ([{"question": "Is there a cup in the image?", "text": "Yes"}], "line 1: no 'answer'"),
    ],
)
def test_pope_answers_to_other_questions_are_refused(tmp_path, answers, match):
    text = "".join(json.dumps(row) + "\n" for row in answers)
    broken(tmp_path, "answers.json", text, lambda path: read_pope_answers(path, QUESTIONS), match)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"id": 4, "type": "relation", "truth": "no"}, "entry 3: its id is 4"),
        ({"id": 3, "type": "relation", "truth": "No"}, "entry 3: .* 'No'"),
        ({"id": 3, "type": "generative", "truth": ["ship"]}, "entry 3: .*hallu"),
        ({"id": "3", "type": "relation", "truth": "no"}, "entry 3: 'id' .* int"),
        ({"id": 3, "truth": "no"}, "entry 3: no 'type'"),
    ],
)
def test_amber_annotations_that_are_malformed(amber_folder, entry, match):
    broken(
        amber_folder,
        "annotations.json",
        json.dumps([*ANNOTATIONS, entry]),
        lambda path: read_amber(path.parent),
        match,
    )


@pytest.mark.parametrize("text", ['["ship"]', '{"ship": "boat"}'])
def test_amber_associations_that_are_malformed(amber_folder, text):
    broken(
        amber_folder,
        "relation.json",
        text,
        lambda path: read_amber(path.parent),
        "relation.json: .*object",
    )


def test_amber_responses_that_are_malformed(tmp_path):
    broken(tmp_path, "responses.json", '{"id": 1}', read_amber_responses, "list, not dict")
    broken(
        tmp_path,
        "responses.json",
        '[{"id": 1, "response": null}]',
        read_amber_responses,
        "entry 1: 'response' .* str",
    )
    broken(
        tmp_path,
        "responses.json",
        '[\n{"id": 1,\n"response" "No"}]',
        read_amber_responses,
        "line 3: not JSON",
    )


def test_a_caption_s_image_id_is_a_number(tmp_path):
    broken(
        tmp_path,
        "captions.jsonl",
        '{"image_id": "42", "caption": "A cup."}\n',
        read_captions,
        "line 1: 'image_id' .* int",
    )


@pytest.mark.parametrize(
    ("name", "whole", "match"),
    [
        ("instances_val2014.json", {"annotations": []}, "categories"),
        (
            "instances_val2014.json",
            {"categories": [{"id": 1, "name": "zebra"}], "annotations": []},
            "zebra",
        ),
        (
            "instances_val2014.json",
            {
                "categories": [{"id": 1, "name": "cup"}],
                "annotations": [{"image_id": 42, "category_id": 5}],
            },
            "annotations, entry 1: .* id 5",
        ),
        (
            "captions_val2014.json",
            {"annotations": [{"image_id": 42}]},
            "annotations, entry 1: no 'caption'",
        ),
    ],
)
def test_coco_files_that_are_malformed(coco_folder, name, whole, match):
    synonyms = read_synonyms(coco_folder / "synonyms.txt")
    broken(
        coco_folder,
        name,
        json.dumps(whole),
        lambda path: read_coco(path.parent, synonyms, singular),
        match,
    )


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "synonyms.txt").write_bytes(b"cup, caf\xe9\n")
    with pytest.raises(ValueError, match=r"synonyms\.txt .* byte 8"):
        read_synonyms(tmp_path / "synonyms.txt")

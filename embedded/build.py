"""Build the embedded default from nothing: python -m embedded.build [--reuse-model]

Writes embedded/model, embedded/dataset, embedded/manifest.json and results/embedded/base.json.
Deterministic for a seed and the versions in requirements.lock. About 20 minutes on two cores.
"""

import argparse
import hashlib
import io
import json
import random
import time

import torch
from datasets import Dataset, Features, Image, Value

from embedded import claims, exam, judge
from embedded.base_model import (
    alignment,
    draw_scenes,
    instructions,
    make_model,
    make_processor,
    train_text,
    train_vision,
)
from embedded.scenes import (
    CATEGORIES,
    DESCRIBE_QUESTIONS,
    absent_companions,
    existence_question,
    scene_and_image,
)
from utils import evaluation, layouts, models, preferences
from utils.generation import answer
from utils.paired_statistics import rate
from utils.pairing import balance_at_random
from utils.settings import EMBEDDED_MODEL, PROFILES, ROOT

SEED = 0
DRAWN = 16000  # scenes that the base model is trained on
VISION_STEPS = 1000
ALIGNMENT_STEPS = 3600
INSTRUCTION_STEPS = 1000
TRAIN_SCENES = 1350
VALIDATION_SCENES = 300
VALIDATION_YES_NO = 90  # pairs about yes or no among them: as many in ten as in the train split
TEST_SCENES = 500
SAMPLES = 8  # answers per scene and question
COLUMN_TYPES = Features(
    {
        "ds_name": Value("string"),
        "image": Image(),
        "question": Value("string"),
        "chosen": Value("string"),
        "rejected": Value("string"),
        "origin_dataset": Value("string"),
        "origin_split": Value("string"),
        "idx": Value("int64"),
        "image_path": Value("string"),
        "objects": [
            {"category": Value("string"), "colour": Value("string"), "place": Value("string")}
        ],
    }
)


def build_model(folder):
    """Train the base model and save it with its processor."""
    torch.manual_seed(SEED)
    processor = make_processor()
    model = make_model(processor)
    scenes, images = draw_scenes("base", DRAWN)
    train_vision(model, scenes, images, VISION_STEPS)
    train_text(model, processor, scenes, images, ALIGNMENT_STEPS, alignment)
    train_text(model, processor, scenes, images, INSTRUCTION_STEPS, instructions, rate=8e-4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def existence_category(objects, rng):
    """Choose a category to ask about, half the time one that is there.

    Of those that are not, habit's choice comes first.
    """
    present = [thing["category"] for thing in objects]
    if rng.random() < 0.5:
        return rng.choice(present)
    companions = absent_companions(objects)
    if companions:
        return rng.choice(companions)
    return rng.choice([category for category in CATEGORIES if category not in present])


def make_row(series, number, objects, image, question, chosen, rejected):
    """Return one row of the data set, in the columns of openbmb/RLAIF-V-Dataset plus `objects`."""
    describing = question in DESCRIBE_QUESTIONS
    kind = "detailed_description" if describing else "question_answering"
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=90)
    path = f"{series}/{number:05d}.jpg"
    return {
        "ds_name": "embedded",
        "image": {"bytes": stored.getvalue(), "path": path},
        "question": question,
        "chosen": chosen,
        "rejected": rejected,
        "origin_dataset": "embedded scenes",
        "origin_split": json.dumps({"model": EMBEDDED_MODEL, "type": kind}),
        "idx": number,
        "image_path": path,
        "objects": objects,
    }


def sample_pairs(settings, model, processor, series, questions, scenes, temperature=1.0):
    """Sample answers, judge and pair them, and return the rows.

    `scenes` is {number: (objects, image)} and `questions` is {number: question}.
    """
    numbers = list(scenes)
    images = [scenes[number][1] for number in numbers]
    asked = [questions[number] for number in numbers]
    sampled = answer(
        settings, model, processor, images, asked, samples=SAMPLES, temperature=temperature
    )
    judged = [{"objects": scenes[n][0], "question": questions[n]} for n in numbers]
    counts = judge.mistakes(sampled, judged)
    rows = []
    for number, question, texts, counted in zip(numbers, asked, sampled, counts, strict=True):
        objects, image = scenes[number]
        # A generator of its own for every question: one more scene does not change the others.
        rng = random.Random(f"{series}-{number}-{question}")
        for chosen, rejected in judge.pair_with_best(texts, counted, rng):
            rows.append(make_row(series, number, objects, image, question, chosen, rejected))
    return rows


def build_train(settings, model, processor, rng):
    """Return the rows of the train split: descriptions, and as many answers "yes" as "no"."""
    scenes = {number: scene_and_image("train", number) for number in range(TRAIN_SCENES)}
    describing = {number: rng.choice(DESCRIBE_QUESTIONS) for number in scenes}
    asking = {}
    for number, (objects, _) in scenes.items():
        asking[number] = existence_question(existence_category(objects, rng))
    descriptions = sample_pairs(settings, model, processor, "train", describing, scenes)
    descriptions = balance_at_random(descriptions, rng)
    existence = sample_pairs(settings, model, processor, "train", asking, scenes)
    says_yes = []
    others = []
    for row in existence:
        side = says_yes if row["chosen"].startswith("Yes") else others
        side.append(row)
    each = min(len(says_yes), len(others), len(descriptions) // 3)
    rows = descriptions + rng.sample(says_yes, each) + rng.sample(others, each)
    rng.shuffle(rows)
    print(f"train: {len(descriptions)} pairs of descriptions, {2 * each} of yes and no", flush=True)
    return rows


def one_pair_each(settings, model, processor, series, questions, scenes, rng):
    """Return one row for each of `scenes`, drawn at random from its pairs, by number.

    Every scene gets one: leaving out those without two different answers would drop the easy ones
    and bias the evaluation. The temperature rises until the last scene has a pair.
    """
    found = {}
    temperature = 1.0
    while len(found) < len(scenes):
        missing = {number: scene for number, scene in scenes.items() if number not in found}
        rows = sample_pairs(settings, model, processor, series, questions, missing, temperature)
        rng.shuffle(rows)
        for row in rows:
            found[row["idx"]] = row
        print(
            f"{series}: {len(found)} of {len(scenes)} scenes have a pair "
            f"at temperature {temperature}",
            flush=True,
        )
        temperature += 0.5
    return found


def build_validation(settings, model, processor):
    """Return the rows of the validation split, one for each of its scenes.

    As in the train split about 3 in 10 ask for yes or no, and "yes" is as often right as "no".
    """
    # Not those of `build_dataset`: this split was added later, and the others stay as they were.
    torch.manual_seed(SEED)
    rng = random.Random(f"validation-{SEED}")
    numbers = range(VALIDATION_SCENES)
    scenes = {number: scene_and_image("validation", number) for number in numbers}
    asking = {}
    for number, (objects, _) in scenes.items():
        asking[number] = existence_question(existence_category(objects, rng))
    existence = sample_pairs(settings, model, processor, "validation", asking, scenes)
    rng.shuffle(existence)
    found = {}
    left = {True: VALIDATION_YES_NO // 2, False: VALIDATION_YES_NO // 2}
    for row in existence:
        says_yes = row["chosen"].startswith("Yes")
        if row["idx"] not in found and left[says_yes]:
            found[row["idx"]] = row
            left[says_yes] -= 1
    print(f"validation: {len(found)} pairs of yes and no", flush=True)
    described = {number: scene for number, scene in scenes.items() if number not in found}
    questions = {number: rng.choice(DESCRIBE_QUESTIONS) for number in described}
    found |= one_pair_each(settings, model, processor, "validation", questions, described, rng)
    return [found[number] for number in sorted(found)]


def build_test(settings, model, processor, rng):
    """Return the rows of the test split, one for each of its scenes; all ask for a description."""
    scenes = {number: scene_and_image("test", number) for number in range(TEST_SCENES)}
    questions = {number: rng.choice(DESCRIBE_QUESTIONS) for number in scenes}
    found = one_pair_each(settings, model, processor, "test", questions, scenes, rng)
    return [found[number] for number in sorted(found)]


def build_dataset(settings, model, processor, folder):
    """Build the splits, write them as Parquet and return {split: Dataset}."""
    rng = random.Random(SEED)
    rows = {
        "train": build_train(settings, model, processor, rng),
        "test": build_test(settings, model, processor, rng),
        "validation": build_validation(settings, model, processor),
    }
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for name, content in rows.items():
        splits[name] = Dataset.from_list(content, features=COLUMN_TYPES)
        splits[name].to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return splits


def base_results(settings, model, processor, scenes):
    """Measure what the base model sees and how much it hallucinates on held-out scenes, greedy."""
    truths = list(scenes["objects"])
    images = list(scenes["image"])
    answers = evaluation.ask(settings, model, processor, images, exam.pope_questions(truths))
    descriptions = answers["descriptions"]
    counts = evaluation.count(answers, judge.present(truths), claims.mentions)
    counts |= judge.claim_counts(descriptions, truths)
    results = {metric: rate(counts[metric]) for metric in evaluation.METRICS}
    for kind in ("colour", "place"):
        results[kind] = judge.attributes_right(descriptions, truths, kind)
    for kind in evaluation.POPE_KINDS:
        accuracy = evaluation.pope_counts_of(answers, kind)["accuracy"]
        results[f"pope_accuracy_{kind}"] = rate(accuracy)
    results["true_words"] = judge.true_words(truths)
    results["n"] = len(truths)
    return results


def write_manifest():
    """Write the digests of all files of the model and the data set."""
    digests = {}
    for part in ("model", "dataset"):
        for path in (ROOT / "embedded" / part).rglob("*"):
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                digests[str(path.relative_to(ROOT))] = digest
    files = {name: digests[name] for name in sorted(digests)}
    text = json.dumps({"files": files}, indent=1) + "\n"
    (ROOT / "embedded" / "manifest.json").write_text(text)


def main(arguments=None):
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m embedded.build", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--reuse-model",
        action="store_true",
        help="keep embedded/model and build only the data set and the results",
    )
    options = parser.parse_args(arguments)
    start = time.time()
    settings = PROFILES["embedded"]
    folder = ROOT / "embedded"
    if not options.reuse_model:
        build_model(folder / "model")
    write_manifest()  # loading the model checks it
    torch.manual_seed(SEED)
    model = models.load_model(settings)
    processor = models.load_processor(settings)
    splits = build_dataset(settings, model, processor, folder / "dataset")
    write_manifest()
    train = layouts.as_rows(splits["train"])
    print(preferences.describe(train))
    print(preferences.check(train, layouts.as_rows(splits["test"])), flush=True)
    results = json.dumps(base_results(settings, model, processor, splits["test"]), indent=1)
    target = ROOT / "results" / "embedded" / "base.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(results + "\n")
    print(results)
    print(f"built in {(time.time() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()

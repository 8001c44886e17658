"""Build the embedded default from nothing: python -m embedded.build [--reuse-model]

Writes embedded/model, embedded/dataset, embedded/manifest.json and results/embedded/base.json. Deterministic for a seed and
the versions in requirements.lock. About 20 minutes on two cores.
"""

import argparse
import hashlib
import io
import json
import random
import time

import torch
from datasets import Dataset, Features, Image, Value

from embedded.base_model import (
    alignment,
    instructions,
    make_model,
    make_processor,
    pictures,
    train_text,
    train_vision,
)
from embedded.scenes import (
    CATEGORIES,
    DESCRIBE,
    absent_companions,
    existence_question,
    scene_and_picture,
)
from utils import evaluation, models, preferences
from utils.generation import answer
from utils.paired_statistics import rate
from utils.pairing import balance_at_random, mistakes, pair_with_best
from utils.settings import EMBEDDED_MODEL, PROFILES, ROOT

SEED, DRAWN, VISION_STEPS, ALIGNMENT_STEPS, INSTRUCTION_STEPS = 0, 16000, 1000, 3600, 1000
TRAIN_SCENES, TEST_SCENES, SAMPLES = 1350, 500, 8
FEATURES = Features(
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
    scenes, images = pictures("base", DRAWN)
    train_vision(model, scenes, images, VISION_STEPS)
    train_text(model, processor, scenes, images, ALIGNMENT_STEPS, alignment)
    train_text(model, processor, scenes, images, INSTRUCTION_STEPS, instructions, rate=8e-4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def existence_category(objects, rng):
    """What to ask about: as often something that is there as something that is not, and then what habit would add."""
    present = [o["category"] for o in objects]
    if rng.random() < 0.5:
        return rng.choice(present)
    return rng.choice(absent_companions(objects) or [c for c in CATEGORIES if c not in present])


def row(series, number, objects, image, question, chosen, rejected):
    kind = "detailed_description" if question in DESCRIBE else "question_answering"
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


def sample_pairs(model, processor, settings, series, questions, scenes, temperature=1.0):
    """Rows of preference pairs for `scenes` (number → (objects, image)) and `questions` (number → question)."""
    numbers, rows = list(scenes), []
    images, asked = [scenes[n][1] for n in numbers], [questions[n] for n in numbers]
    sampled = answer(
        model, processor, images, asked, settings, samples=SAMPLES, temperature=temperature
    )
    counts = mistakes(
        sampled, [{"objects": scenes[n][0], "question": questions[n]} for n in numbers]
    )
    for number, question, texts, counted in zip(numbers, asked, sampled, counts, strict=True):
        objects, image = scenes[number]
        pairs = pair_with_best(texts, counted, random.Random(f"{series}-{number}-{question}"))
        rows += [row(series, number, objects, image, question, *pair) for pair in pairs]
    return rows


def build_dataset(model, processor, settings, folder):
    """Sample, judge, pair and balance; write train and test as Parquet. Returns {split: Dataset}."""
    rng = random.Random(SEED)
    train = {n: scene_and_picture("train", n) for n in range(TRAIN_SCENES)}
    describing = {n: rng.choice(DESCRIBE) for n in train}
    asking = {n: existence_question(existence_category(train[n][0], rng)) for n in train}
    descriptions = balance_at_random(
        sample_pairs(model, processor, settings, "train", describing, train), rng
    )
    existence = sample_pairs(model, processor, settings, "train", asking, train)
    says_yes = [r for r in existence if r["chosen"].startswith("Yes")]
    says_no = [r for r in existence if r not in says_yes]
    each = min(len(says_yes), len(says_no), len(descriptions) // 3)
    rows = descriptions + rng.sample(says_yes, each) + rng.sample(says_no, each)
    rng.shuffle(rows)
    print(f"train: {len(descriptions)} pairs of descriptions, {2 * each} of yes and no", flush=True)

    test = {n: scene_and_picture("test", n) for n in range(TEST_SCENES)}
    asked, found, temperature = {n: rng.choice(DESCRIBE) for n in test}, {}, 1.0
    while len(found) < len(
        test
    ):  # every scene stays: leaving out the easy ones would bias the evaluation
        missing = {n: test[n] for n in test if n not in found}
        sampled = sample_pairs(model, processor, settings, "test", asked, missing, temperature)
        rng.shuffle(sampled)
        found |= {r["idx"]: r for r in sampled}
        print(
            f"test: {len(found)} of {len(test)} scenes have a pair at temperature {temperature}",
            flush=True,
        )
        temperature += 0.5
    splits = {"train": rows, "test": [found[n] for n in sorted(found)]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in splits.items():
        splits[name] = Dataset.from_list(content, features=FEATURES)
        splits[name].to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return splits


def base_results(model, processor, settings, scenes):
    """What the base model sees and how it hallucinates, on held-out scenes, greedy."""
    truths = list(scenes["objects"])
    answers = evaluation.ask(model, processor, scenes, settings)
    metrics = {name: rate(counts) for name, counts in evaluation.count(answers, truths).items()}
    metrics |= {
        kind: evaluation.attributes_right(answers["descriptions"], truths, kind)
        for kind in ("colour", "place")
    }
    for kind in evaluation.POPE_KINDS:
        metrics[f"pope_accuracy_{kind}"] = rate(
            evaluation.pope_counts_of(answers, kind)["accuracy"]
        )
    return metrics | {"true_words": evaluation.true_words(truths), "n": len(truths)}


def write_manifest():
    files = sorted(
        p
        for part in ("model", "dataset")
        for p in (ROOT / "embedded" / part).rglob("*")
        if p.is_file()
    )
    digests = {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (ROOT / "embedded" / "manifest.json").write_text(
        json.dumps({"files": digests}, indent=1) + "\n"
    )


def main():
    parser = argparse.ArgumentParser(
        prog="python -m embedded.build", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--reuse-model",
        action="store_true",
        help="keep embedded/model and build only the data set and the results",
    )
    options, start = parser.parse_args(), time.time()
    settings, folder = PROFILES["embedded"], ROOT / "embedded"
    if not options.reuse_model:
        build_model(folder / "model")
    write_manifest()
    torch.manual_seed(SEED)
    model, processor = models.load_model(settings), models.load_processor(settings)
    splits = build_dataset(model, processor, settings, folder / "dataset")
    write_manifest()
    print(
        preferences.describe(splits["train"]),
        preferences.check(splits["train"], splits["test"]),
        flush=True,
    )
    results = base_results(model, processor, settings, splits["test"])
    (ROOT / "results" / "embedded").mkdir(parents=True, exist_ok=True)
    (ROOT / "results" / "embedded" / "base.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1), f"\nbuilt in {(time.time() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()

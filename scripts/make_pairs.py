"""Make preference pairs from a folder of images: python -m scripts.make_pairs FOLDER

This is RLAIF-V's recipe, as notebook 10 shows it: sample answers, split them into sentences, let a
model judge each sentence, pair the answers, balance the lengths.
"""

import argparse
import json
import random
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from utils import pairing, settings
from utils.generation import DESCRIBE, answer
from utils.images import read_image
from utils.models import load_model, load_processor
from utils.progress import progress

PAIRS_FILE = "pairs.jsonl"
ENOUGH = 20  # with pairs about fewer images than this, a warning is printed


def readable_images(folder):
    """Return the names of the readable images below `folder`, and what is wrong with others.

    Raises ValueError if there is no such folder or no image in it can be read.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    names = []
    problems = []
    for name in progress(image_names(folder), "reading"):
        try:
            load_image(folder, name)
            names.append(name)
        except ValueError as error:
            problems.append(str(error))
    if not names:
        reason = "; ".join(problems[:5]) or "no file name ends like that of an image"
        raise ValueError(f"{folder} contains no readable image: {reason}")
    return names, problems


def image_names(folder):
    """Return the sorted names of all files in `folder` that end like an image Pillow can open."""
    endings = set()
    for ending, kind in Image.registered_extensions().items():
        if kind in Image.OPEN:
            endings.add(ending)
    files = [path for path in folder.rglob("*") if path.suffix.lower() in endings]
    return sorted(str(path.relative_to(folder)) for path in files)


def load_image(folder, name):
    """Return the image `name` of `folder`. An error names it."""
    return read_image({"bytes": (folder / name).read_bytes(), "path": None}, name)


def in_batches(folder, names, question, size):
    """Yield (slice, rows) for `size` images at a time; all of them may not fit in memory.

    A row is {"image", "question"}.
    """
    for start in progress(range(0, len(names), size), "images"):
        part = slice(start, start + size)
        rows = []
        for name in names[part]:
            rows.append({"image": load_image(folder, name), "question": question})
        yield part, rows


def sample_answers(profile, folder, names, question, samples):
    """Return `samples` answers of the profile's model for every image, as a list of lists."""
    processor = load_processor(profile)
    model = load_model(profile)
    torch.manual_seed(profile.seed)
    answers = []
    for _, rows in in_batches(folder, names, question, profile.generation_batch_size):
        images = [row["image"] for row in rows]
        questions = [question] * len(rows)
        answers += answer(profile, model, processor, images, questions, samples=samples)
    return answers


def count_rejections(profile, folder, names, question, answers):
    """Count the sentences of each answer that the profile's model rejects, nested as `answers`."""
    processor = load_processor(profile)
    model = load_model(profile)
    looks = partial(pairing.model_judge, profile, model, processor)
    counts = []
    for part, rows in in_batches(folder, names, question, profile.generation_batch_size):
        counts += pairing.rejections(answers[part], rows, looks, split=pairing.sentences)
    return counts


def save_pairs(path, pairs, names):
    """Write one line per pair with the name of its image."""
    lines = []
    for pair in pairs:
        line = {
            "image": names[pair["row"]],
            "question": pair["question"],
            "chosen": pair["chosen"],
            "rejected": pair["rejected"],
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def rejected_share(answers, counts):
    """Return the share of all sentences that the judge rejected."""
    sentences = 0
    for texts in answers:
        for text in texts:
            sentences += len(pairing.sentences(text))
    return sum(map(sum, counts)) / sentences


def parse(arguments=None):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.make_pairs",
        description=f"Make preference pairs from a folder of images. Writes FOLDER/{PAIRS_FILE}.",
    )
    parser.add_argument("folder", type=Path, help="folder of images; subfolders are included")
    parser.add_argument(
        "--profile",
        help=f"whose model answers, one of {', '.join(settings.PROFILES)}; "
        "default: VLM_DPO_PROFILE, else embedded",
    )
    parser.add_argument(
        "--judge",
        help="the profile whose model judges; default: the same. Another model sees other mistakes",
    )
    parser.add_argument(
        "--question",
        default=DESCRIBE,
        help="what to ask about every image; default: %(default)s",
    )
    parser.add_argument(
        "--samples", type=int, default=8, help="answers per image; default: %(default)s"
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    """Make the pairs that the command line asks for."""
    options = parse(arguments)
    target = options.folder / PAIRS_FILE
    if target.exists():
        raise SystemExit(f"{target} already exists: move it away to make new pairs")
    try:
        answering = settings.load(options.profile)
        judging = settings.load(options.judge) if options.judge else answering
        names, problems = readable_images(options.folder)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"{len(names)} images; {len(problems)} left out", *problems, sep="\n  ", flush=True)

    answers = sample_answers(answering, options.folder, names, options.question, options.samples)
    counts = count_rejections(judging, options.folder, names, options.question, answers)
    rows = [{"question": options.question}] * len(names)
    pairs = pairing.pair_all(rows, answers, counts, random.Random(answering.seed))
    try:
        balanced, _ = pairing.balance_by_threshold(pairs)
    except ValueError as error:
        raise SystemExit(f"{error}. More --samples may help, or another --judge") from None
    save_pairs(target, balanced, names)

    used = len({pair["row"] for pair in balanced})
    sampled = sum(map(len, answers))
    print(f"{sampled} answers; the judge rejected {rejected_share(answers, counts):.0%} of their")
    print(f"sentences; {len(pairs)} pairs, {len(balanced)} after balancing the lengths, about")
    print(f"{used} images, written to {target}. Read some: the model learns what they prefer.")
    if used < ENOUGH:
        print("That is too few to learn from: add images, or try more --samples or another --judge")


if __name__ == "__main__":
    main()

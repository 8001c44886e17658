"""From a folder of pictures to preference pairs: python -m scripts.make_pairs FOLDER [--profile NAME] [--judge NAME] …

RLAIF-V's recipe, as notebook 10 shows it: sample answers, cut them into sentences, let a model judge each, pair, balance.
"""

import argparse
import json
import random
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from utils import pairing
from utils.generation import answer
from utils.images import read
from utils.models import load_model, load_processor
from utils.progress import progress
from utils.settings import PROFILES, load

QUESTION = "Describe the image."
PAIRS = "pairs.jsonl"


def pictures(folder):
    """(Names of the picture files anywhere in `folder` that can be read, what is wrong with the others). ValueError if none can."""
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder}")
    endings = {
        ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN
    }
    names = sorted(
        str(path.relative_to(folder))
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in endings
    )
    good, problems = [], []
    for name in progress(names, "reading"):
        try:
            load_picture(folder, name)
            good.append(name)
        except ValueError as error:
            problems.append(str(error))
    if not good:
        raise ValueError(
            f"{folder} holds no picture that can be read: {'; '.join(problems[:5]) or 'no file has the ending of one'}"
        )
    return good, problems


def load_picture(folder, name):
    return read({"bytes": (Path(folder) / name).read_bytes(), "path": None}, name)


def in_batches(folder, names, question, settings):
    """Rows {"image", "question"} of the pictures, as many at a time as are asked at once: all of them may not fit in memory."""
    for start in progress(range(0, len(names), settings.generation_batch_size), "pictures"):
        part = slice(start, start + settings.generation_batch_size)
        yield (
            part,
            [{"image": load_picture(folder, name), "question": question} for name in names[part]],
        )


def sample(folder, names, question, samples, settings):
    """`samples` answers of the profile's model to `question` about every picture: a list of lists of texts."""
    processor, model, answers = load_processor(settings), load_model(settings), []
    torch.manual_seed(settings.seed)
    for _, rows in in_batches(folder, names, question, settings):
        images, questions = [row["image"] for row in rows], [question] * len(rows)
        answers += answer(model, processor, images, questions, settings, samples=samples)
    return answers


def judge(folder, names, question, answers, settings):
    """How many sentences of each answer the profile's model rejects when it looks at the picture, nested as `answers`."""
    processor, model, counts = load_processor(settings), load_model(settings), []
    looks = partial(pairing.model_judge, model=model, processor=processor, settings=settings)
    for part, rows in in_batches(folder, names, question, settings):
        counts += pairing.rejections(answers[part], rows, looks, split=pairing.sentences)
    return counts


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m scripts.make_pairs", description=f"Pictures become FOLDER/{PAIRS}."
    )
    parser.add_argument("folder", type=Path, help="pictures, in folders or not")
    parser.add_argument(
        "--profile",
        help=f"whose model answers: {', '.join(PROFILES)}; default: VLM_DPO_PROFILE, else embedded",
    )
    parser.add_argument(
        "--judge",
        help="the profile whose model judges; default: the same. Another one sees other mistakes",
    )
    parser.add_argument(
        "--question", default=QUESTION, help=f"asked about every picture; default: {QUESTION}"
    )
    parser.add_argument(
        "--samples", type=int, default=8, help="answers for each picture; default: 8"
    )
    options = parser.parse_args(arguments)
    target = options.folder / PAIRS
    if target.exists():
        raise SystemExit(f"{target} is there already: move it away to make new pairs")
    try:
        settings = load(options.profile)
        judging = load(options.judge) if options.judge else settings
        names, problems = pictures(options.folder)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"{len(names)} pictures; {len(problems)} left out", *problems, sep="\n  ", flush=True)
    answers = sample(options.folder, names, options.question, options.samples, settings)
    counts = judge(options.folder, names, options.question, answers, judging)
    rows = [{"question": options.question}] * len(names)
    pairs = pairing.pair_all(rows, answers, counts, random.Random(settings.seed))
    try:
        balanced, _ = pairing.balance_by_threshold(pairs)
    except ValueError as error:
        raise SystemExit(f"{error}. More --samples may help, or another --judge") from None
    used = len({pair["row"] for pair in balanced})
    lines = [
        {"image": names[pair["row"]]}
        | {key: pair[key] for key in ("question", "chosen", "rejected")}
        for pair in balanced
    ]
    target.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    rejected = sum(map(sum, counts)) / sum(
        len(pairing.sentences(text)) for texts in answers for text in texts
    )
    print(
        f"{sum(map(len, answers))} answers; the judge rejected {rejected:.0%} of their sentences; {len(pairs)} pairs"
    )
    print(
        f"{len(balanced)} of them, balanced in length, about {used} pictures, in {target}: read some, they teach what they prefer"
    )
    if used < 20:
        print(
            "that is too few to learn from: take more pictures, or more --samples, or another --judge"
        )


if __name__ == "__main__":
    main()

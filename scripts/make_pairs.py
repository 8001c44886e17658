"""Make preference pairs from a folder of images: python -m scripts.make_pairs FOLDER

This is RLAIF-V's recipe, as notebook 10 shows it: sample answers, split them into claims, let a
model judge each claim, pair the answers, balance the lengths.

Answers and verdicts are kept in FOLDER/.make_pairs as they come, one line for each batch of
pictures. The same command goes on where an earlier one stopped, and its pairs are those of a run
without a stop.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import random
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from utils import pairing, review, settings
from utils.generation import DESCRIBE, generated
from utils.images import HEIC_ENDINGS, image_size, read_image
from utils.models import load_model, load_processor
from utils.preferences import special_tokens
from utils.progress import progress
from utils.settings import digest

PAIRS_FILE = "pairs.jsonl"
WORK_FOLDER = ".make_pairs"
ANSWERS_FILE = "answers.jsonl"
VERDICTS_FILE = "verdicts.jsonl"
ENOUGH = 20  # with pairs about fewer images than this, a warning is printed
NAMED = 5  # how many of the files that are left out are named
OWN_FILES = (PAIRS_FILE, "pairs.csv", review.REVIEW_FILE)


def readable_images(folder):
    """Return {name: digest of the bytes} of the images below `folder`, and what was left out.

    The latter is a list of sentences. Only headers are read: damage behind them is found when a
    picture is answered. Raises ValueError if there is no such folder or no image in it.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    images, photographs, others = sorted_files(folder)
    digests = {}
    problems = []
    for name in progress(images, "reading"):
        try:
            data = (folder / name).read_bytes()
            image_size(data or {}, name)
            digests[name] = digest(data)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    left_out = named(problems, "; ", "{} cannot be read: {}")
    left_out += named(photographs, ", ", "{} HEIC photographs: {}; `pip install pillow-heif`")
    left_out += named(others, ", ", "{} files whose names do not end like those of images: {}")
    if not digests:
        reason = "; ".join(left_out) or "it is empty"
        raise ValueError(f"{folder} contains no readable image: {reason}")
    return digests, left_out


def sorted_files(folder):
    """Return the names of all files below `folder`: images, HEIC photographs, and others.

    The second list is empty where the package is installed that reads such photographs. What this
    command writes is in none.
    """
    endings = set()
    for ending, kind in Image.registered_extensions().items():
        if kind in Image.OPEN:
            endings.add(ending)
    reads_heic = importlib.util.find_spec("pillow_heif") is not None
    images = []
    photographs = []
    others = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or name in OWN_FILES or WORK_FOLDER in path.parts:
            continue
        if path.suffix.lower() in HEIC_ENDINGS and not reads_heic:
            photographs.append(name)
        elif path.suffix.lower() in endings or path.suffix.lower() in HEIC_ENDINGS:
            images.append(name)
        else:
            others.append(name)
    return images, photographs, others


def named(texts, between, sentence):
    """Return a list with the `sentence` about the number of `texts` and the first of them."""
    if not texts:
        return []
    shown = between.join(texts[:NAMED])
    if len(texts) > NAMED:
        shown += between + "…"
    return [sentence.format(len(texts), shown)]


# What is kept


def kept_lines(path, made_with):
    """Return what an earlier run left in a file of JSON lines: {image: line}. Or begin the file.

    Its first line says what it was made with, each other holds those of a batch. Raises ValueError
    where that is not `made_with`, and for a damaged line.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:  # the run was stopped while it wrote the last line
        os.truncate(path, len(whole))
    if not whole:
        path.parent.mkdir(exist_ok=True)
        keep(path, {"made_with": made_with})
        return {}
    lines = []
    for number, text in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            raise ValueError(
                f"line {number} of {path} is damaged: delete the file to make it again"
            ) from None
    before = lines[0]["made_with"]
    if before != made_with:
        raise ValueError(
            f"{path} was made with {changes(before, made_with)}. Give the same options to go on "
            "where it ends, or delete it to begin again"
        )
    found = {}
    for batch in lines[1:]:
        for line in batch:
            found[line["image"]] = line
    return found


def changes(before, now):
    """Return in words what differs between two dicts of settings."""
    parts = []
    for name in before | now:
        if before.get(name) != now.get(name):
            parts.append(f"{name} {before.get(name)!r}, and now it is {now.get(name)!r}")
    return "; ".join(parts)


def keep(path, line):
    """Add a line to a file of JSON lines and wait until it is on the disk."""
    with open(path, "ab") as file:
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def identity(profile):
    """Return what decides how the model of a profile answers."""
    names = ("profile", "model", "model_revision", "four_bit", "pixel_budget", "max_new_tokens")
    return {name: getattr(profile, name) for name in names}


# Sample and judge


def model_of(profile, held):
    """Return processor and model of a profile; `held` keeps those that were loaded last."""
    if held.get("profile") != profile:
        held.clear()  # two models may not fit in memory
        held["processor"] = load_processor(profile)
        held["model"] = load_model(profile)
        held["profile"] = profile
    return held["processor"], held["model"]


def load_images(profile, folder, names):
    """Return {name: image}, reduced to the pixel budget, and {name: what is wrong with it}."""
    images = {}
    problems = {}
    for name in names:
        try:
            images[name] = read_image(str(folder / name), name, profile.pixel_budget)
        except ValueError as error:
            problems[name] = str(error)
    return images, problems


def batches(digests, lines, profile, samples):
    """Return the names of the images that have no line yet, in lists of a few that fit a batch.

    An image whose bytes have changed counts as one without a line. A list is kept whole or not at
    all, so the lists are the same wherever an earlier run was stopped.
    """
    left = [name for name in digests if lines.get(name, {}).get("digest") != digests[name]]
    size = max(1, profile.generation_batch_size // samples)
    return [left[start : start + size] for start in range(0, len(left), size)]


def sample_answers(profile, folder, digests, options, held):
    """Sample answers about every image that has none yet. Return {image: its line}.

    A line has "answers", each {"text", "ended"}; or "problem", for an image that is damaged.
    """
    path = folder / WORK_FOLDER / ANSWERS_FILE
    made_with = {
        **identity(profile),
        "seed": profile.seed,
        "question": options.question,
        "samples": options.samples,
    }
    lines = kept_lines(path, made_with)
    for names in progress(batches(digests, lines, profile, options.samples), "answering"):
        processor, model = model_of(profile, held)
        begin = time.perf_counter()
        images, problems = load_images(profile, folder, names)
        questions = [options.question] * len(images)
        # A seed of their own, so that it does not matter what was sampled before.
        torch.manual_seed(int(digest(f"{profile.seed} {names[0]}".encode())[:15], 16))
        answers = generated(
            profile, model, processor, list(images.values()), questions, samples=options.samples
        )
        answers_of = dict(zip(images, answers, strict=True))
        each = round((time.perf_counter() - begin) / len(names), 3)
        made = {}
        for name in names:
            made[name] = {"image": name, "digest": digests[name], "seconds": each}
            if name in problems:
                made[name]["problem"] = problems[name]
            else:
                made[name]["answers"] = answers_of[name]
        keep(path, list(made.values()))
        lines |= made
    return {name: lines[name] for name in digests}


def judge_answers(profile, folder, answered, options, held):
    """Let the model of a profile judge the answers of every image. Return {image: its line}.

    `answered` is what `sample_answers` returns. A line has "judged", for each different answer
    {"text", "claims"}, its claims [claim, verdict]; "unfit", how many answers are no candidates for
    which reason; and "unlisted", for how many the claims could not be listed.
    """
    path = folder / WORK_FOLDER / VERDICTS_FILE
    made_with = {
        **identity(profile),
        "claims": options.claims,
        "answers": kept_header(folder / WORK_FOLDER / ANSWERS_FILE),
    }
    lines = kept_lines(path, made_with)
    digests = {}
    for name, line in answered.items():
        if "answers" in line:
            digests[name] = line["digest"]
    for names in progress(batches(digests, lines, profile, options.samples), "judging"):
        processor, model = model_of(profile, held)
        special = special_tokens(processor)
        begin = time.perf_counter()
        images, problems = load_images(profile, folder, names)
        if problems:
            raise ValueError(f"{next(iter(problems.values()))}. It could be read before")
        made = {}
        claims = {}  # (image, text) → claims of the text
        for name in names:
            texts, unfit = fit_texts(answered[name]["answers"], special)
            found, unlisted = claims_of_texts(
                profile, model, processor, texts, images[name], options
            )
            made[name] = {"image": name, "digest": digests[name], "unfit": unfit}
            made[name]["unlisted"] = unlisted
            claims[name] = dict(zip(texts, found, strict=True))
        judge = partial(pairing.model_judge, profile, model, processor)
        told = judge_batch(judge, images, claims)
        each = round((time.perf_counter() - begin) / len(names), 3)
        for name in names:
            made[name]["judged"] = told[name]
            made[name]["seconds"] = each
        keep(path, list(made.values()))
        lines |= made
    return {name: lines[name] for name in digests}


def claims_of_texts(profile, model, processor, texts, image, options):
    """Return the claims of each of the `texts` about an image, and how many were not listed.

    Where a list was asked for and did not come, the claims are the sentences.
    """
    found = [None] * len(texts)
    if options.claims == "listed" and texts:
        found = pairing.listed_claims(profile, model, processor, texts, image)
    claims = []
    for text, listed in zip(texts, found, strict=True):
        claims.append(listed or pairing.sentences(text))
    unlisted = found.count(None) if options.claims == "listed" else 0
    return claims, unlisted


def judge_batch(judge, images, claims):
    """Return {image: [{"text", "claims"}]}, the claims with the verdicts of `judge` about them.

    `images` is {name: image}, and `claims` is {name: {text: its claims}}.
    """
    # An answer is here a pair (image, text), because a text may be about several images.
    answers = [[(name, text) for text in claims[name]] for name in images]
    rows = [{"image": image} for image in images.values()]

    def split(answer):
        name, text = answer
        return claims[name][text]

    told = {}
    for name, of_row in zip(images, pairing.judged(answers, rows, judge, split), strict=True):
        told[name] = []
        for text, of_text in zip(claims[name], of_row, strict=True):
            told[name].append({"text": text, "claims": of_text})
    return told


def kept_header(path):
    """Return what a file of JSON lines was made with."""
    with open(path, encoding="utf-8") as file:
        return json.loads(file.readline())["made_with"]


def fit_texts(answers, tokens):
    """Return the different texts that are candidates for a pair, and {reason: number of others}.

    `tokens` are the special tokens of the judge.
    """
    texts = []
    unfit = Counter()
    for answer in answers:
        reason = pairing.unfit(answer, tokens)
        if reason:
            unfit[reason] += 1
        else:
            texts.append(answer["text"])
    return list(dict.fromkeys(texts)), dict(unfit)


# Pairs, and what is said about them


def make(judged, options, seed):
    """Return the pairs about the images of `judge_answers`; "row" counts them."""
    rows = [{"question": options.question}] * len(judged)
    answers = []
    told = []
    for line in judged.values():
        answers.append([answer["text"] for answer in line["judged"]])
        told.append([answer["claims"] for answer in line["judged"]])
    rng = random.Random(seed)
    if options.pairs == "sentence":
        return pairing.pair_sentences(rows, answers, told, rng)
    counts = []
    for of_row in told:
        counts.append([pairing.rejected(claims) for claims in of_row])
    return pairing.pair_all(rows, answers, counts, rng)


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


def all_verdicts(judged):
    """Return (image, claim, verdict) for every claim of `judge_answers`."""
    told = []
    for name, line in judged.items():
        for answer in line["judged"]:
            told += [(name, claim, verdict) for claim, verdict in answer["claims"]]
    return told


def tell_answers(answered, judged, options, profile):
    """Print what became of the answers, what the judge said, and what it all costs."""
    unfit = Counter()
    for line in judged.values():
        unfit.update(line["unfit"])
    print(f"{options.samples * len(judged)} answers, {sum(unfit.values())} of them no candidates")
    for reason, number in unfit.most_common():
        print(f"  {number} {reason}")
    if unfit[pairing.CUT]:
        print(f"  (--max-new-tokens above {profile.max_new_tokens} leaves them room)")
    told = all_verdicts(judged)
    if told:
        share = sum(not verdict for _, _, verdict in told) / len(told)
        print(f"{len(told)} claims, {share:.0%} rejected by the judge")
    if options.claims == "listed":
        unlisted = sum(line["unlisted"] for line in judged.values())
        texts = sum(len(line["judged"]) for line in judged.values())
        print(f"the claims of {unlisted} of {texts} answers could not be listed: their sentences")
    seconds = 0.0
    for line in [*answered.values(), *judged.values()]:
        seconds += line["seconds"]
    each = seconds / len(answered)
    print(f"{each:.2f} s a picture, {each * 1000 / 60:.0f} minutes for 1,000", flush=True)


def reviewed(options, judged, seed):
    """Draw a review or look at the one that a person made. Return whether pairs may be written.

    Raises ValueError where the review shows that the judge is not good enough, where it is about
    other verdicts, and where nobody judged anything yet.
    """
    folder = options.folder
    path = folder / review.REVIEW_FILE
    if not path.exists():
        if not options.review:
            return True
        drawn = review.draw_claims(folder, all_verdicts(judged), options.review, seed)
        print(f"{drawn} claims are in {path}. Judge them in a notebook:")
        print(f'  from utils import review; review.verdicts("{folder}")')
        print("or write true or false for each person in the file. Then repeat this command.")
        return False
    known = set(all_verdicts(judged))
    for line in review.read_lines(folder):
        if (line["image"], line["claim"], line["accepted"]) not in known:
            raise ValueError(
                f"{path} is about other verdicts, as {line['claim'][:80]!r}: move it away"
            )
    found = review.agreement(folder)
    print(f"In {path}, {review.as_text(found)}", flush=True)
    if options.keep_anyway or review.is_worth_training(found):
        return True
    if not found["accepted"]["claims"] + found["rejected"]["claims"]:
        raise ValueError(
            f'nobody has judged the claims in {path} yet: review.verdicts("{folder}") in a '
            "notebook asks you about them (from utils import review)"
        )
    raise ValueError(
        f"the pairs are not worth training on: the judge must be right about "
        f"{review.LEAST_SHARE:.0%} of the accepted and of the rejected claims, clearly more often "
        "than by chance. Judge more claims, try another --judge, or write them with --keep-anyway"
    )


def parse(arguments=None):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.make_pairs",
        description=f"Make preference pairs from a folder of images. Writes FOLDER/{PAIRS_FILE}. "
        f"Goes on where it was stopped: answers and verdicts are kept in FOLDER/{WORK_FOLDER}.",
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
    parser.add_argument(
        "--max-new-tokens", type=int, help="longer answers are cut; default: as the profile says"
    )
    parser.add_argument(
        "--claims",
        choices=("sentences", "listed"),
        default="sentences",
        help="what is judged: each sentence, or what the judge's model lists when it is asked for "
        "the claims of an answer; default: %(default)s",
    )
    parser.add_argument(
        "--pairs",
        choices=("answer", "sentence"),
        default="answer",
        help="pair whole answers, or one right and one wrong sentence after the same beginning; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--review",
        type=int,
        metavar="N",
        help="before any pair is written, draw N claims for you to judge as well, such as 40",
    )
    parser.add_argument(
        "--keep-anyway",
        action="store_true",
        help="write the pairs of a judge that the review found not good enough",
    )
    options = parser.parse_args(arguments)
    if options.samples < 2:
        parser.error("--samples must be 2 or more: a pair needs two answers")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        parser.error("--max-new-tokens must be 1 or more")
    if options.review is not None and options.review < 1:
        parser.error("--review must be 1 or more")
    if options.pairs == "sentence" and options.claims == "listed":
        parser.error("--pairs sentence needs --claims sentences: a listed claim has no place")
    return options


def run(options):
    """Make the pairs that the command line asks for."""
    target = options.folder / PAIRS_FILE
    if target.exists():
        raise ValueError(f"{target} already exists: move it away to make new pairs")
    answering = settings.load(options.profile)
    judging = settings.load(options.judge) if options.judge else answering
    if options.max_new_tokens:
        answering = dataclasses.replace(answering, max_new_tokens=options.max_new_tokens)
    if not options.judge:
        judging = answering
    pairing.splitter()  # before hours of work, not after them
    digests, left_out = readable_images(options.folder)
    print(f"{len(digests)} images")
    for sentence in left_out:
        print(f"  left out: {sentence}")
    print(end="", flush=True)

    held = {}
    answered = sample_answers(answering, options.folder, digests, options, held)
    damaged = [line["problem"] for line in answered.values() if "problem" in line]
    for sentence in named(damaged, "; ", "{} cannot be read: {}"):
        print(f"  left out: {sentence}")
    judged = judge_answers(judging, options.folder, answered, options, held)
    if not judged:
        raise ValueError(f"{options.folder} contains no readable image: see above")
    tell_answers(answered, judged, options, answering)
    if not reviewed(options, judged, answering.seed):
        return

    pairs = make(judged, options, answering.seed)
    try:
        balanced, _ = pairing.balance_by_threshold(pairs)
    except ValueError as error:
        raise ValueError(f"{error}. More --samples may help, or another --judge") from None
    save_pairs(target, balanced, list(judged))
    used = len({pair["row"] for pair in balanced})
    print(f"{len(pairs)} pairs, {len(balanced)} after balancing the lengths, about {used} images,")
    print(f"written to {target}. Read some: the model learns what they prefer.")
    if used < ENOUGH:
        print("That is too few to learn from: add images, or try more --samples or another --judge")


def main(arguments=None):
    """Run the command; say what is wrong without a traceback."""
    options = parse(arguments)
    try:
        run(options)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

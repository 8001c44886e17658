"""Train one profile from the command line: python -m scripts.train --profile NAME --output DIR"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from utils import chat, models, plan, preferences, preflight, settings, training


def parse(arguments=None):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train",
        description="Train an adapter with QLoRA and DPO, without a notebook.",
    )
    parser.add_argument(
        "--profile",
        help=f"one of {', '.join(settings.PROFILES)}; default: VLM_DPO_PROFILE, else embedded",
    )
    parser.add_argument(
        "--dataset",
        help="what to train on instead of the profile's data: a folder that import_pairs wrote, a "
        "file or folder in another layout that the README lists, or a name on the hub; all of its "
        "split train is used",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for adapter/, training.json and checkpoints; default: runs/<profile>",
    )
    parser.add_argument(
        "--max-steps", type=int, default=-1, help="stop after this many optimizer steps"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in the output folder",
    )
    parser.add_argument(
        "--preflight",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="check the run first, and train only if no check fails",
    )
    planned = "default: what fits into the memory of the GPU, or as the profile says"
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="PAIRS",
        help=f"pairs in a micro-batch; an optimizer step keeps its pairs; {planned}",
    )
    parser.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help=f"compute again instead of keeping in memory; {planned}",
    )
    parser.add_argument(
        "--four-bit",
        action=argparse.BooleanOptionalAction,
        help=f"the language model's matrices in 4 bits, or in 16; {planned}",
    )
    parser.add_argument(
        "--shared-prefix",
        action=argparse.BooleanOptionalAction,
        help="compute each image and prompt once, or use TRL's own trainer; "
        "default: as the profile says",
    )
    return parser.parse_args(arguments)


def fixed_by_hand(profile, options):
    """Return `profile` with what the command line fixes, which is no longer planned."""
    given = {}
    for name in ("batch_size", "gradient_checkpointing", "four_bit", "shared_prefix"):
        if getattr(options, name) is not None:
            given[name] = getattr(options, name)
    if "batch_size" in given:
        pairs = profile.batch_size * profile.gradient_accumulation
        size = given["batch_size"]
        if size < 1 or pairs % size:
            raise ValueError(
                f"--batch-size {size} does not divide the {pairs} pairs of an optimizer step"
            )
        given["gradient_accumulation"] = pairs // size
    planned = tuple(name for name in profile.planned if name not in given)
    return dataclasses.replace(profile, planned=planned, **given)


def load_pairs(profile, processor, held_out=()):
    """Return the profile's training rows, formatted; print which rows were dropped and why.

    `held_out`: the names of the parts whose images must not be trained on.
    """
    loaded = preferences.load_part(profile, "train")
    others = [preferences.load_part(profile, part) for part in held_out]
    sound, problems = preferences.without_problems(loaded, processor, profile.pixel_budget, others)
    if problems:
        count = len(loaded) - len(sound)
        found = preferences.as_text(problems)
        print(f"{count} of {len(loaded)} rows dropped. Found: {found}", flush=True)
    formatted = chat.format_dataset(sound, profile.pixel_budget)
    pairs, dropped = chat.within_budget(formatted, processor, profile.token_budget)
    numbers = f": rows {dropped}" if dropped else ""
    print(
        f"{len(pairs)} pairs; "
        f"{len(dropped)} longer than {profile.token_budget} tokens dropped{numbers}",
        flush=True,
    )
    return pairs


def stop_if_preflight_fails(trainer):
    """Print the checks of `trainer`; raise SystemExit with the names of those that failed."""
    rows = preflight.check(trainer)
    print(preflight.as_text(rows), flush=True)
    failed = [row["check"] for row in rows if row["result"] == preflight.FAILED]
    if failed:
        raise SystemExit(
            f"nothing was trained: preflight failed at {', '.join(failed)}. "
            "Use --no-preflight to train anyway"
        )


def main(arguments=None):
    """Train as the command line asks."""
    options = parse(arguments)
    # Under `accelerate launch` the first process speaks for all.
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")
        os.environ["TQDM_DISABLE"] = "1"
    try:
        profile = settings.load(options.profile)
        if options.dataset:
            profile = dataclasses.replace(
                profile,
                dataset=options.dataset,
                dataset_revision="main",
                train_split="train",
                train_rows=None,
            )
        profile = fixed_by_hand(profile, options)
        processor = models.load_processor(profile)
        # Data of the user's own may have no such parts.
        held_out = () if options.dataset else ("validation", "test")
        pairs = load_pairs(profile, processor, held_out)
    except (OSError, ValueError) as error:  # say what is wrong and what helps, without a traceback
        raise SystemExit(str(error)) from None
    output = options.output or settings.run_folder(profile)
    profile, chosen = plan.for_training(profile, plan.longest_text(pairs, processor))
    print(chosen, flush=True)
    trainer = training.make_trainer(
        profile,
        models.load_model(profile),
        processor,
        pairs,
        output,
        max_steps=options.max_steps,
    )
    if options.preflight:
        stop_if_preflight_fails(trainer)
    try:
        record = training.train(profile, trainer, resume=options.resume)
    except (FileNotFoundError, ValueError) as error:
        if not options.resume:
            raise
        raise SystemExit(f"cannot resume: {error}") from error
    speed = f"{record['seconds']:.0f} s, {record['pairs_per_second']:.1f} pairs per second"
    print(f"{record['steps']} steps in {speed}; adapter in {output / 'adapter'}")
    # Without it one of several processes may abort as it exits; seen with gloo.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()

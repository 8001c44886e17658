"""Train one profile from the command line: python -m scripts.train --profile NAME --output DIR"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from utils import chat, models, preferences, preflight, settings, training


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
    parser.add_argument(
        "--shared-prefix",
        action=argparse.BooleanOptionalAction,
        help="compute each image and prompt once, or use TRL's own trainer; "
        "default: as the profile says",
    )
    return parser.parse_args(arguments)


def load_pairs(profile, processor):
    """Return the profile's training rows, formatted; print which rows were dropped and why."""
    loaded = preferences.load_part(profile, "train")
    sound, problems = preferences.without_problems(loaded, processor, profile.pixel_budget)
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
        processor = models.load_processor(profile)
        pairs = load_pairs(profile, processor)
    except (OSError, ValueError) as error:  # say what is wrong and what helps, without a traceback
        raise SystemExit(str(error)) from None
    output = options.output or settings.run_folder(profile)
    trainer = training.make_trainer(
        profile,
        models.load_model(profile),
        processor,
        pairs,
        output,
        shared_prefix=options.shared_prefix,
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

"""The command line: python -m scripts.train --profile NAME --output DIR [--dataset DIR] [--max-steps N] [--resume] …"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from utils import chat, models, preferences, settings, training
from utils.preflight import FAILED, as_text


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train", description="QLoRA DPO of one profile, without a notebook."
    )
    parser.add_argument(
        "--profile",
        help=f"one of {', '.join(settings.PROFILES)}; default: VLM_DPO_PROFILE, else embedded",
    )
    parser.add_argument(
        "--dataset",
        type=Path,
        help="a folder of Parquet files to train on instead, all of its split train",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for adapter/, training.json and checkpoints; default: runs/<profile>",
    )
    parser.add_argument(
        "--max-steps", type=int, default=-1, help="stop after so many optimizer steps"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in the output folder"
    )
    parser.add_argument(
        "--preflight",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train only if every check passes",
    )
    parser.add_argument(
        "--shared-prefix",
        action=argparse.BooleanOptionalAction,
        help="each image and prompt once, or TRL's own trainer",
    )
    return parser.parse_args(arguments)


def load_pairs(profile, processor):
    """The profile's training rows, formatted. What is dropped, for what `check` reports or for its length, is said with its numbers."""
    loaded = preferences.load(profile.dataset, profile.train_split, profile.dataset_revision)
    sound, problems = preferences.without_problems(loaded, preferences.special_tokens(processor))
    if problems:
        print(
            f"{len(loaded) - len(sound)} of {len(loaded)} rows dropped: {preferences.as_text(problems)}",
            flush=True,
        )
    pairs, dropped = chat.within_budget(chat.format_dataset(sound), processor, profile.token_budget)
    rows = f": rows {dropped}" if dropped else ""
    print(
        f"{len(pairs)} pairs; {len(dropped)} longer than {profile.token_budget} tokens dropped{rows}",
        flush=True,
    )
    return pairs


def main(arguments=None):
    options = parse(arguments)
    if (
        os.environ.get("RANK", "0") != "0"
    ):  # under `accelerate launch` the first process speaks for all
        sys.stdout, os.environ["TQDM_DISABLE"] = open(os.devnull, "w"), "1"
    try:
        profile = settings.load(options.profile)
        if options.dataset:
            profile = dataclasses.replace(
                profile, dataset=str(options.dataset), train_split="train"
            )
            if not options.dataset.is_dir():
                raise FileNotFoundError(
                    f"there is no folder {options.dataset}: python -m scripts.import_pairs writes one"
                )
        processor = models.load_processor(profile)
        pairs = load_pairs(profile, processor)
    except (OSError, ValueError) as error:  # what is wrong, and what helps; not where in the code
        raise SystemExit(str(error)) from None
    output = options.output or settings.run_folder(profile)
    changes = {"max_steps": options.max_steps, "shared_prefix": options.shared_prefix}
    trainer = training.make_trainer(
        profile, models.load_model(profile), processor, pairs, output, **changes
    )
    if options.preflight:
        rows = training.preflight(trainer)
        print(as_text(rows), flush=True)
        if failed := [row["check"] for row in rows if row["result"] == FAILED]:
            raise SystemExit(
                f"nothing was trained: preflight failed at {', '.join(failed)}. --no-preflight trains all the same"
            )
    try:
        record = training.train(trainer, profile, resume=options.resume)
    except (FileNotFoundError, ValueError) as error:
        if not options.resume:
            raise
        raise SystemExit(f"cannot resume: {error}") from error
    speed = f"{record['seconds']:.0f} s, {record['pairs_per_second']:.1f} pairs per second"
    print(f"{record['steps']} steps in {speed}; adapter in {output / 'adapter'}")
    trainer.accelerator.end_training()  # of several processes one may otherwise abort as it exits, seen with gloo


if __name__ == "__main__":
    main()

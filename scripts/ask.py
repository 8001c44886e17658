"""Ask a model about images, before and after tuning: python -m scripts.ask IMAGE… --adapter DIR"""

import argparse
from pathlib import Path

from utils import generation, images, models, settings


def parse(arguments=None):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.ask",
        description="Print a model's greedy answers about images, before and after tuning.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    parser.add_argument(
        "--adapter",
        type=Path,
        required=True,
        help="folder of the adapter, such as runs/qwen/adapter",
    )
    parser.add_argument(
        "--profile",
        help="the profile it was trained with; default: VLM_DPO_PROFILE, else embedded",
    )
    parser.add_argument(
        "--question",
        default=generation.DESCRIBE,
        help="asked about every image; default: %(default)s",
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    """Print both answers to the question for every image."""
    options = parse(arguments)
    try:
        profile = settings.load(options.profile)
        shown = []
        for path in options.images:
            shown.append(images.read_image({"bytes": None, "path": str(path)}, str(path)))
        model = models.load_tuned(profile, options.adapter)
        processor = models.load_processor(profile)
    except (OSError, ValueError) as error:  # say what is wrong and what helps, without a traceback
        raise SystemExit(str(error)) from None
    questions = [options.question] * len(shown)
    base = generation.answer(profile, model, processor, shown, questions, adapter=False)
    tuned = generation.answer(profile, model, processor, shown, questions)
    for path, before, after in zip(options.images, base, tuned, strict=True):
        print(f"{path}\n  base:  {before}\n  tuned: {after if after != before else '(the same)'}")


if __name__ == "__main__":
    main()

"""Ask a model about a picture, without and with its adapter: python -m scripts.ask PICTURE… --adapter DIR [--profile NAME] …"""

import argparse
from pathlib import Path

from utils import models, settings
from utils.generation import answer
from utils.images import read


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m scripts.ask", description="Greedy answers, before and after tuning."
    )
    parser.add_argument("pictures", nargs="+", type=Path, help="picture files")
    parser.add_argument(
        "--adapter",
        type=Path,
        required=True,
        help="folder of the adapter, such as runs/qwen/adapter",
    )
    parser.add_argument(
        "--profile", help="the one it was trained with; default: VLM_DPO_PROFILE, else embedded"
    )
    parser.add_argument("--question", default="Describe the image.")
    options = parser.parse_args(arguments)
    try:
        profile = settings.load(options.profile)
        images = [read({"bytes": None, "path": str(path)}, str(path)) for path in options.pictures]
        model, processor = (
            models.load_tuned(profile, options.adapter),
            models.load_processor(profile),
        )
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    questions = [options.question] * len(images)
    base, tuned = (
        answer(model, processor, images, questions, profile, adapter) for adapter in (False, True)
    )
    for path, before, after in zip(options.pictures, base, tuned, strict=True):
        print(f"{path}\n  base:  {before}\n  tuned: {after if after != before else '(the same)'}")


if __name__ == "__main__":
    main()

"""Import your own preference pairs: python -m scripts.import_pairs FOLDER [--output DIR]."""

import argparse
from pathlib import Path

from utils.layouts import NAMES, held_out, load_folder


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m scripts.import_pairs", description="Check FOLDER and write it as Parquet."
    )
    parser.add_argument("folder", type=Path, help=f"images, and {' or '.join(NAMES)}")
    parser.add_argument("--output", type=Path, help="where to write (default: FOLDER/data)")
    options = parser.parse_args(arguments)
    output = options.output or options.folder / "data"
    try:
        train, test = held_out(load_folder(options.folder))
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
    output.mkdir(parents=True, exist_ok=True)
    train.to_parquet(output / "train.parquet")
    test.to_parquet(output / "test.parquet")
    print(f"{len(train)} pairs to train on, {len(test)} about other images held out, in {output}")


if __name__ == "__main__":
    main()

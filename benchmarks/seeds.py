"""Train and evaluate the embedded default with several seeds: python -m benchmarks.seeds [--seeds 0 1 2]

Writes results/embedded/evaluation-seed<N>.json (as runs/<profile>/evaluation.json, with the training's seconds and last log
entry) and, of seed 0, before_after.png; prints a table and one line of JSON.
"""

import argparse
import json
from dataclasses import replace

from utils import chat, evaluation, models, plots, preferences, training
from utils.settings import PROFILES, ROOT


def run(settings):
    """Train with `settings.seed` and compare with the base on the evaluation scenes."""
    processor = models.load_processor(settings)
    pairs = chat.format_dataset(preferences.load(settings.dataset, settings.train_split))
    output = ROOT / "runs" / f"seed-{settings.seed}"
    trainer = training.make_trainer(
        settings, models.load_model(settings), processor, pairs, output, disable_tqdm=True
    )
    record = training.train(trainer, settings)
    scenes = preferences.load(settings.evaluation_dataset, settings.evaluation_split)
    truths = list(scenes["objects"])
    answers = [
        evaluation.ask(trainer.model, processor, scenes, settings, adapter=adapter)
        for adapter in (False, True)
    ]
    result = evaluation.compare(*answers, truths)
    return result | {
        "true_words": evaluation.true_words(truths),
        "training": {name: record[name] for name in ("steps", "pairs", "seconds", "final")},
    }


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.seeds", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    summary, folder = {}, ROOT / "results" / "embedded"
    print("seed  seconds  CHAIR_i base → DPO (relative)   recall        words/true  POPE accuracy")
    for seed in options.seeds:
        result = run(replace(PROFILES["embedded"], seed=seed))
        (folder / f"evaluation-seed{seed}.json").write_text(json.dumps(result, indent=1) + "\n")
        if seed == 0:  # the one that the README's text and the card of notebook 13 speak of
            plots.before_after(result).savefig(folder / "before_after.png")
        base, dpo = result["base"], result["dpo"]
        relative = dpo["chair_i"] / base["chair_i"] - 1
        print(
            f"{seed:4}  {result['training']['seconds']:7.0f}  {base['chair_i']:.3f} → {dpo['chair_i']:.3f} ({relative:+.0%})        "
            f"{base['recall']:.3f} → {dpo['recall']:.3f}  {dpo['words'] / result['true_words']:.2f}        "
            f"{base['pope_accuracy']:.3f} → {dpo['pope_accuracy']:.3f}",
            flush=True,
        )
        summary[seed] = {
            "chair_i_relative": relative,
            "recall_change": dpo["recall"] - base["recall"],
            "seconds": result["training"]["seconds"],
        }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

"""Train and evaluate the embedded default with several seeds: python -m benchmarks.seeds

Writes results/embedded/evaluation-seed<N>.json: what evaluation.json holds, with the training's
seconds and last log entry. Of seed 0 it draws before_after.png too. Prints a table and one line
of JSON.
"""

import argparse
import json
from dataclasses import replace

from datasets import load_dataset

from embedded import claims, exam, judge
from utils import chat, evaluation, models, plots, preferences, training
from utils.settings import PROFILES, ROOT, locate


def count_both(settings, model, processor, images, truths):
    """Ask base and tuned about scenes. Return what each gets wrong, counted."""
    questions = exam.pope_questions(truths)
    counts = []
    for answers in evaluation.ask_both(settings, model, processor, images, questions):
        of_objects = evaluation.count(answers, judge.present(truths), claims.mentions)
        counts.append(of_objects | judge.claim_counts(answers["descriptions"], truths))
    return counts


def train_and_evaluate(settings):
    """Train with `settings.seed` and compare with the base on the evaluation scenes."""
    processor = models.load_processor(settings)
    model = models.load_model(settings)
    pairs = chat.format_dataset(preferences.load_part(settings, "train"))
    output = ROOT / "runs" / f"seed-{settings.seed}"
    trainer = training.make_trainer(settings, model, processor, pairs, output, disable_tqdm=True)
    record = training.train(settings, trainer)

    scenes = load_dataset(locate(settings.evaluation_dataset), split=settings.evaluation_split)
    images = list(scenes["image"])
    truths = list(scenes["objects"])
    result = evaluation.compare(*count_both(settings, trainer.model, processor, images, truths))
    result["true_words"] = judge.true_words(truths)
    result["training"] = {name: record[name] for name in ("steps", "pairs", "seconds", "final")}
    return result


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.seeds", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    folder = ROOT / "results" / "embedded"
    summary = {}
    print("base → tuned")
    print("seed  seconds  CHAIR_i (relative)     recall         words/true  POPE accuracy")
    for seed in seeds:
        result = train_and_evaluate(replace(PROFILES["embedded"], seed=seed))
        (folder / f"evaluation-seed{seed}.json").write_text(json.dumps(result, indent=1) + "\n")
        if seed == 0:  # the one that the README and the model card of notebook 13 report
            plots.before_after(result).savefig(folder / "before_after.png")
        base = result["base"]
        tuned = result["tuned"]
        seconds = result["training"]["seconds"]
        relative = tuned["chair_i"] / base["chair_i"] - 1
        print(
            f"{seed:4}{seconds:9.0f}  "
            f"{base['chair_i']:.3f} → {tuned['chair_i']:.3f} ({relative:+.0%})  "
            f"{base['recall']:.3f} → {tuned['recall']:.3f}"
            f"{tuned['words'] / result['true_words']:12.2f}  "
            f"{base['pope_accuracy']:.3f} → {tuned['pope_accuracy']:.3f}",
            flush=True,
        )
        summary[seed] = {
            "chair_i_relative": relative,
            "recall_change": tuned["recall"] - base["recall"],
            "seconds": seconds,
        }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

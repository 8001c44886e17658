"""Kill training again and again, resume it, compare: python -m benchmarks.kill [--times 20] [--seed 0]

Each time a short run of the embedded default is killed (SIGKILL) at a random moment: anywhere between its beginning and its end or,
every second time, while it saves a checkpoint or the adapter. It is resumed, every third time killed and resumed once more, and its
adapter compared, bit for bit, with that of a run that nobody disturbed. Every attempt is a process of its own.

Writes results/reliability.json, prints a table and one line of JSON; fails where a run ended at another adapter.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from utils import chat, checkpoints, models, preferences, training, versions
from utils.settings import PROFILES, ROOT

STEPS, SAVE_STEPS, PAIRS = 16, 2, 4
SHORT = {
    "train_split": f"train[:{STEPS * PAIRS // 2}]",
    "epochs": 2,
    "batch_size": PAIRS,
    "warmup_steps": 2,
    "save_steps": SAVE_STEPS,
}
SETTINGS = replace(PROFILES["embedded"], **SHORT)


class Tell(transformers.TrainerCallback):
    """Sends ("begin" | "step" | "saved" | "end", optimizer steps done) through `connection` when it happens."""

    def __init__(self, connection):
        self.connection = connection

    def on_train_begin(self, args, state, control, **kwargs):
        self.connection.send(("begin", state.global_step))

    def on_step_end(self, args, state, control, **kwargs):
        self.connection.send(("step", state.global_step))

    def on_save(self, args, state, control, **kwargs):
        self.connection.send(("saved", state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        self.connection.send(("end", state.global_step))


def train(output, resume, connection):
    """One attempt, in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what was found on disk is reported by the parent
    processor = models.load_processor(SETTINGS)
    rows = chat.format_dataset(preferences.load(SETTINGS.dataset, SETTINGS.train_split))
    changes = {"callbacks": [Tell(connection)], "disable_tqdm": True}
    trainer = training.make_trainer(
        SETTINGS, models.load_model(SETTINGS), processor, rows, output, **changes
    )
    training.train(trainer, SETTINGS, resume=resume)


def processes():
    """Makes processes that start from one which has imported the libraries and done nothing else, so that each begins in a second."""
    os.environ["TQDM_DISABLE"] = "1"
    # A killed process cannot give its semaphores back; Python's tracker does it, and would say so at the end.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["utils.chat", "utils.training"])
    return context


def reached(moment, told, output):
    """Whether `moment` has come: {"seconds"} after the beginning, or the "folder" that is saved after an "event" holds so many "files"."""
    if not told:
        return False
    if "seconds" in moment:
        return time.monotonic() - told[0][2] >= moment["seconds"]
    return (
        told[-1][:2] == moment["event"]
        and len(list((output / moment["folder"]).glob("*"))) >= moment["files"]
    )


def attempt(context, output, begin, moment=None):
    """Train into `output`, in a process that is killed at `moment` (None: never); resume unless `begin`, the step to go on from, is 0.

    Returns ([(event, step, at)] that it told, when it was killed or None); RuntimeError when it failed or began elsewhere.
    """
    receiver, sender = context.Pipe(duplex=False)
    process, told, killed = (
        context.Process(target=train, args=(output, begin > 0, sender)),
        [],
        None,
    )
    process.start()
    sender.close()  # so that reading ends when the process does
    try:
        while True:
            if receiver.poll(0.0005):
                told.append((*receiver.recv(), time.monotonic()))
            if moment and not killed and reached(moment, told, output):
                process.kill()
                killed = time.monotonic()
    except (EOFError, OSError):  # it has ended; OSError: in the middle of a message
        process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(
            f"training failed by itself, exit code {process.exitcode}: its message stands above"
        )
    if told[0][:2] != ("begin", begin):  # then an equal end would prove nothing
        raise RuntimeError(f"training began at step {told[0][1]} instead of {begin}")
    return told, killed if process.exitcode else None


def choose(draw, saving, begin, seconds, files):
    """A random moment of a run that goes on from optimizer step `begin`: while it saves, or any.

    `seconds`: {step: from there to the end}, and `files`: {"checkpoint", "adapter": files in it}, are of the undisturbed run."""
    if not saving:
        return {"seconds": draw.uniform(0, seconds[begin])}
    step = draw.randrange(begin + SAVE_STEPS, STEPS + SAVE_STEPS + 1, SAVE_STEPS)
    if step > STEPS:
        return {
            "event": ("end", STEPS),
            "folder": "adapter.new",
            "files": draw.randint(1, files["adapter"]),
        }
    return {
        "event": ("step", step),
        "folder": f"checkpoint-{step}",
        "files": draw.randint(1, files["checkpoint"]),
    }


def on_disk(output):
    """{checkpoint: "whole" or what is wrong with it}, newest first, and the same of the adapter if there is one."""
    found = {
        folder.name: checkpoints.damage(folder) or "whole"
        for folder in checkpoints.newest_first(output)
    }
    if (output / "adapter").exists():
        found["adapter"] = (
            "damaged"
            if any(map(checkpoints.unreadable, (output / "adapter").iterdir()))
            else "whole"
        )
    return found


def kill_and_resume(context, output, times, draw, saving, seconds, files):
    """Kill a run in `output` `times` times, going on after each, and let it end; returns one entry a kill."""
    kills, resumed = [], 0
    while len(kills) < times:
        moment = choose(draw, saving, resumed, seconds, files)
        told, killed = attempt(context, output, resumed, moment)
        if not killed:  # it was quicker than the undisturbed one: all over again
            shutil.rmtree(output)
            kills, resumed = [], 0
            continue
        found = on_disk(output)
        resumed = next(
            (
                int(name.split("-")[1])
                for name, problem in found.items()
                if problem == "whole" and name != "adapter"
            ),
            0,
        )
        entry = {
            "chosen": moment,
            "seconds": round(killed - told[0][2], 3),
            "last_told": f"{told[-1][0]} {told[-1][1]}",
        }
        kills.append(entry | {"found": found, "resumed_from": resumed})
    attempt(context, output, resumed)
    return kills


def difference(output, undisturbed):
    """The largest difference between the adapters of two folders; 0: equal to the last bit."""
    ours, theirs = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (output, undisturbed)
    )
    return max(
        (ours[name] - theirs[name]).abs().max().item() for name in ours.keys() | theirs.keys()
    )


def measure(times, seed, folder):
    """The record of `times` runs in `folder`; a row of the table each."""
    context, draw, runs = processes(), random.Random(seed), []
    straight = folder / "undisturbed"
    (told, _), end = attempt(context, straight, 0), time.monotonic()
    seconds = {step: end - at for event, step, at in told if event in ("begin", "saved")}
    saved = {"checkpoint": straight / f"checkpoint-{STEPS}", "adapter": straight / "adapter"}
    files = {name: len(list(place.iterdir())) for name, place in saved.items()}
    print(
        f"undisturbed: {STEPS} steps, a checkpoint every {SAVE_STEPS}, {seconds[0]:.1f} s from the first step to the end\n"
    )
    print(f"{'run':>3}{'killed at':>11}  {'during':15}{'on disk':56}resumed from  difference")
    for number in range(times):
        output = folder / f"run-{number}"
        kills = kill_and_resume(
            context, output, 1 + (number % 3 == 2), draw, number % 2 == 1, seconds, files
        )
        runs.append({"largest_difference": difference(output, straight), "kills": kills})
        for kill in kills:
            found = (
                ", ".join(
                    f"{name.removeprefix('checkpoint-')} {problem}"
                    for name, problem in kill["found"].items()
                )
                or "nothing"
            )
            during = kill["chosen"].get("folder", kill["last_told"])
            outcome = (
                f"{runs[-1]['largest_difference']:g}" if kill is kills[-1] else "(killed again)"
            )
            print(
                f"{number + 1:3}{kill['seconds']:9.2f} s  {during:15}{found:56}{kill['resumed_from']:12}  {outcome}",
                flush=True,
            )
    kills = [kill for run in runs for kill in run["kills"]]
    return {
        "runs": len(runs),
        "kills": len(kills),
        "kills_while_saving": sum("folder" in kill["chosen"] for kill in kills),
        "kills_that_left_a_damaged_checkpoint": sum(
            bool(set(kill["found"].values()) - {"whole"}) for kill in kills
        ),
        "equal_to_the_last_bit": sum(run["largest_difference"] == 0 for run in runs),
        "largest_difference": max(run["largest_difference"] for run in runs),
        "setup": {
            "steps": STEPS,
            "save_steps": SAVE_STEPS,
            "pairs_a_step": PAIRS,
            "seed": seed,
            "seconds": seconds[0],
        },
        "versions": versions(*training.LIBRARIES),
        "each": runs,
    }


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kill", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = measure(options.times, options.seed, Path(folder))
    (ROOT / "results" / "reliability.json").write_text(json.dumps(record, indent=1) + "\n")
    print(
        json.dumps(
            {
                name: value
                for name, value in record.items()
                if name not in ("setup", "versions", "each")
            }
        )
    )
    if record["equal_to_the_last_bit"] < record["runs"]:
        raise SystemExit("a run ended at another adapter: see results/reliability.json")


if __name__ == "__main__":
    main()

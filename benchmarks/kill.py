"""Kill training at random moments, resume it, and compare: python -m benchmarks.kill

A short run of the embedded default is killed (SIGKILL) and resumed. The moment is anywhere between
its beginning and its end or, in every second run, while it saves a checkpoint or the adapter. Every
third run is killed and resumed twice. Its adapter is compared, bit for bit, with that of an
undisturbed run. Every attempt is a new process.

Writes results/reliability.json, prints a table and one line of JSON. Fails if a run ended at
another adapter.
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

STEPS = 16
SAVE_STEPS = 2
PAIRS = 4
LIMIT = 1200  # seconds; an optimizer step takes less than one
SETTINGS = replace(
    PROFILES["embedded"],
    train_split=f"train[:{STEPS * PAIRS // 2}]",  # twice this many pairs in two epochs
    epochs=2,
    batch_size=PAIRS,
    warmup_steps=2,
    save_steps=SAVE_STEPS,
)


class Tell(transformers.TrainerCallback):
    """Send (event, optimizer steps done) through `connection` as training goes on.

    The events are "begin", "step", "saved" and "end".
    """

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


def train_in_child(output, resume, connection):
    """Train into `output`. This is what a child process runs."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the parent reports what it finds on disk
    processor = models.load_processor(SETTINGS)
    model = models.load_model(SETTINGS)
    rows = chat.format_dataset(preferences.load_part(SETTINGS, "train"))
    callbacks = [Tell(connection)]
    trainer = training.make_trainer(
        SETTINGS, model, processor, rows, output, callbacks=callbacks, disable_tqdm=True
    )
    training.train(SETTINGS, trainer, resume=resume)


def process_context():
    """Return what makes processes that start within a second.

    They start from one that has imported the libraries and done nothing else.
    """
    os.environ["TQDM_DISABLE"] = "1"
    # A killed process cannot release its semaphores. Python's tracker does, and would warn.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    # A copy of a process that has threads may wait forever for a lock that one of them held.
    # Arrow's allocator would start one.
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["utils.chat", "utils.training"])
    return context


def reached(moment, told, output):
    """Return whether `moment` has come.

    It is {"seconds": since training began} or {"event", "folder", "files"}: after the event, the
    folder that is being saved holds so many files.
    """
    if not told:
        return False
    if "seconds" in moment:
        _, _, begun = told[0]
        return time.monotonic() - begun >= moment["seconds"]
    event, step, _ = told[-1]
    if (event, step) != moment["event"]:
        return False
    return len(list((output / moment["folder"]).glob("*"))) >= moment["files"]


def attempt(context, output, begin, moment=None):
    """Train into `output` from optimizer step `begin`, in a process that is killed at `moment`.

    Returns [(event, step, time)] as the process told them, and when it was killed or None.
    RuntimeError when training failed by itself, began at another step, or told nothing for LIMIT.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=train_in_child, args=(output, begin > 0, sender))
    process.start()
    sender.close()  # so that reading ends when the process does
    told = []
    killed = None
    last_heard = time.monotonic()
    try:
        while True:
            if time.monotonic() - last_heard > LIMIT:
                process.kill()
                raise RuntimeError(f"training told nothing for {LIMIT} seconds")
            if receiver.poll(0.0005):
                last_heard = time.monotonic()
                event, step = receiver.recv()
                told.append((event, step, time.monotonic()))
            if moment and not killed and reached(moment, told, output):
                process.kill()
                killed = time.monotonic()
    except (EOFError, OSError):  # the process has ended; OSError: in the middle of a message
        process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(
            f"training failed by itself, exit code {process.exitcode}: see its error above"
        )
    event, step, _ = told[0]
    if (event, step) != ("begin", begin):  # then an equal end would prove nothing
        raise RuntimeError(f"training began at step {step} instead of {begin}")
    if process.exitcode == 0:
        killed = None  # it ended before the signal came
    return told, killed


def choose_moment(draw, saving, begin, seconds, files):
    """Draw a moment of a run that resumes from optimizer step `begin`, `saving` or any.

    From the undisturbed run come `seconds`, {step: from there to the end}, and `files`, how many
    files there are in {"checkpoint", "adapter"}.
    """
    if not saving:
        return {"seconds": draw.uniform(0, seconds[begin])}
    # One more than the checkpoints: after the last of them the adapter is saved.
    step = draw.randrange(begin + SAVE_STEPS, STEPS + SAVE_STEPS + 1, SAVE_STEPS)
    if step > STEPS:
        event = ("end", STEPS)
        folder = "adapter.new"
        count = files["adapter"]
    else:
        event = ("step", step)
        folder = f"checkpoint-{step}"
        count = files["checkpoint"]
    return {"event": event, "folder": folder, "files": draw.randint(1, count)}


def saved_in(output):
    """Return {checkpoint or "adapter": "whole" or what is wrong with it}, newest first."""
    found = {}
    for folder in checkpoints.newest_first(output):
        found[folder.name] = checkpoints.damage(folder) or "whole"
    adapter = output / "adapter"
    if adapter.exists():
        damaged = any(checkpoints.unreadable(path) for path in adapter.iterdir())
        found["adapter"] = "damaged" if damaged else "whole"
    return found


def step_to_resume(found):
    """Return the optimizer step of the newest whole checkpoint in `found`, 0 without one."""
    for name, problem in found.items():
        if problem == "whole" and name != "adapter":
            return int(name.removeprefix("checkpoint-"))
    return 0


def kill_and_resume(context, output, times, draw, saving, seconds, files):
    """Kill a run in `output` `times` times, resume it each time, and let it end.

    Returns one entry per kill.
    """
    kills = []
    resumed = 0
    while len(kills) < times:
        moment = choose_moment(draw, saving, resumed, seconds, files)
        told, killed = attempt(context, output, resumed, moment)
        if not killed:  # it was faster than the undisturbed run and ended first: start over
            shutil.rmtree(output)
            kills = []
            resumed = 0
            continue
        found = saved_in(output)
        resumed = step_to_resume(found)
        _, _, begun = told[0]
        event, step, _ = told[-1]
        kills.append(
            {
                "chosen": moment,
                "seconds": round(killed - begun, 3),
                "last_told": f"{event} {step}",
                "found": found,
                "resumed_from": resumed,
            }
        )
    attempt(context, output, resumed)
    return kills


def adapter_difference(output, undisturbed):
    """Return the largest difference between the adapters in two folders. 0: equal bit for bit."""
    ours = load_file(output / "adapter" / "adapter_model.safetensors")
    theirs = load_file(undisturbed / "adapter" / "adapter_model.safetensors")
    differences = []
    for name in ours.keys() | theirs.keys():
        differences.append((ours[name] - theirs[name]).abs().max().item())
    return max(differences)


def print_kills(number, kills, difference):
    """Print the kills of run `number`, one to a line."""
    for kill in kills:
        found = []
        for name, problem in kill["found"].items():
            found.append(f"{name.removeprefix('checkpoint-')} {problem}")
        during = kill["chosen"].get("folder", kill["last_told"])
        outcome = f"{difference:g}" if kill is kills[-1] else "(killed again)"
        print(
            f"{number:3}{kill['seconds']:9.2f} s  {during:15}{', '.join(found) or 'nothing':56}"
            f"{kill['resumed_from']:12}  {outcome}",
            flush=True,
        )


def measure(times, seed, folder):
    """Kill and resume `times` runs in `folder`, print a row for each kill, return the record."""
    context = process_context()
    draw = random.Random(seed)
    straight = folder / "undisturbed"
    told, _ = attempt(context, straight, 0)
    end = time.monotonic()
    seconds = {}
    for event, step, at in told:
        if event in ("begin", "saved"):
            seconds[step] = end - at
    files = {
        "checkpoint": len(list((straight / f"checkpoint-{STEPS}").iterdir())),
        "adapter": len(list((straight / "adapter").iterdir())),
    }
    print(
        f"undisturbed: {STEPS} optimizer steps, a checkpoint every {SAVE_STEPS}, "
        f"{seconds[0]:.1f} s from the first step to the end\n"
    )
    print(f"{'run':>3}{'killed at':>11}  {'during':15}{'on disk':56}resumed from  difference")
    runs = []
    for number in range(times):
        output = folder / f"run-{number}"
        twice = number % 3 == 2
        saving = number % 2 == 1
        kills = kill_and_resume(context, output, 2 if twice else 1, draw, saving, seconds, files)
        difference = adapter_difference(output, straight)
        runs.append({"largest_difference": difference, "kills": kills})
        print_kills(number + 1, kills, difference)
    return reliability_record(runs, seed, seconds[0])


def reliability_record(runs, seed, seconds):
    """Return what results/reliability.json holds."""
    kills = 0
    while_saving = 0
    left_damage = 0
    equal = 0
    for run in runs:
        if run["largest_difference"] == 0:
            equal += 1
        for kill in run["kills"]:
            kills += 1
            if "folder" in kill["chosen"]:
                while_saving += 1
            if set(kill["found"].values()) - {"whole"}:
                left_damage += 1
    return {
        "runs": len(runs),
        "kills": kills,
        "kills_while_saving": while_saving,
        "kills_that_left_a_damaged_checkpoint": left_damage,
        "equal_to_the_last_bit": equal,
        "largest_difference": max(run["largest_difference"] for run in runs),
        "setup": {
            "steps": STEPS,
            "save_steps": SAVE_STEPS,
            "pairs_a_step": PAIRS,
            "seed": seed,
            "seconds": seconds,
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
    text = json.dumps(record, indent=1) + "\n"
    (ROOT / "results" / "reliability.json").write_text(text)
    summary = dict(record)
    for name in ("setup", "versions", "each"):
        del summary[name]
    print(json.dumps(summary))
    if record["equal_to_the_last_bit"] < record["runs"]:
        raise SystemExit("a run ended at another adapter: see results/reliability.json")


if __name__ == "__main__":
    main()

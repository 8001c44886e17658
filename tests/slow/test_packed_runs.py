"""The faster trainer against TRL's own in the embedded world: true collator, 4 bit, whole runs."""

import json
import math
import os
import socket
import subprocess
import sys
from functools import partial

import bitsandbytes as bnb
import pytest
import torch
from both_trainers import (
    BOTH,
    SETTINGS,
    assert_same_adapter,
    assert_same_batch,
    assert_same_run,
    assert_same_step,
    embedded_trainer,
    logged,
    step,
)
from datasets import Dataset
from mixed_rows import NONE, NONE_EITHER, ONE, ROWS, TURNS, TWO, dataset

from utils import chat, models, preferences
from utils.generation import answer
from utils.shared_prefix import SharedPrefixDPOTrainer


@pytest.fixture(scope="module")
def rows():
    return chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:48]"))


@pytest.fixture
def make(processor, tmp_path):
    return partial(embedded_trainer, processor, tmp_path)


def test_a_step_is_the_same_in_4_bit(make, rows):
    stock, ours = (make(kind, rows, gradient_checkpointing=True) for kind in BOTH)
    some = list(rows.select(range(4)))
    batches = [stock.data_collator([dict(row) for row in some]), ours.collate(some)]
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in ours.model.modules())
    assert assert_same_batch(*batches) == 4
    assert_same_step(stock, ours, batches)
    assert_same_step(stock, ours, [batches[0], ours.data_collator(some)])  # in another order


def test_text_without_images_is_packed_too(make, rows):
    """Rows without a column of images, which TRL tokenizes before it trains."""
    texts = []
    for row in rows:
        text = {}
        for name in ("prompt", "chosen", "rejected"):
            turn = row[name][0]
            text[name] = [{"role": turn["role"], "content": turn["content"][-1]["text"]}]
        texts.append(text)
    stock, ours = (make(kind, Dataset.from_list(texts)) for kind in BOTH)
    batches = [next(iter(trainer.get_train_dataloader())) for trainer in (stock, ours)]
    assert ours.packs
    assert "pixel_values" not in batches[0]
    assert_same_step(stock, ours, batches)


def test_a_run_on_rows_with_and_without_images_is_the_same(make):
    """Each batch has two rows; in some of them neither has an image."""
    trainers = []
    for kind in BOTH:
        trainer = make(
            kind,
            chat.format_dataset(dataset(ROWS)),
            per_device_train_batch_size=2,
            max_steps=6,
            logging_steps=1,
            learning_rate=1e-3,
            save_strategy="no",
            gradient_checkpointing=True,
            seed=3,
        )
        seen = watched(trainer)
        trainer.train()
        assert {True, False} == set(seen)
        trainers.append(trainer)
    assert trainers[1].packs
    assert_same_run(*trainers)


def watched(trainer):
    """Return a list that gets, for each batch of the training, whether it has an image."""
    seen = []
    compute_loss = trainer.compute_loss

    def watch(model, inputs, *arguments, **options):
        seen.append("pixel_values" in inputs)
        return compute_loss(model, inputs, *arguments, **options)

    trainer.compute_loss = watch
    return seen


def test_a_whole_run_logs_and_ends_the_same(make, rows, processor, tmp_path):
    """With accumulation, evaluation, checkpointing and two workers; then resumed halfway."""
    options = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "eval_dataset": rows.select(range(40, 46)),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 4,
        "dataloader_num_workers": 2,
        "save_steps": 2,
        "gradient_checkpointing": True,
    }
    trainers = []
    for kind in BOTH:
        trainer = make(kind, rows, output_dir=tmp_path / kind.__name__, **options)
        trainer.train()
        trainers.append(trainer)
    assert_same_run(*trainers)
    assert logged(trainers[1])[0]["loss"] != pytest.approx(math.log(2), abs=1e-3)

    scenes = list(chat.format_dataset(preferences.load(SETTINGS.dataset, "test[:8]")))
    answers = []
    for trainer in trainers:
        answers.append(
            answer(
                SETTINGS,
                trainer.model,
                processor,
                [row["images"][0] for row in scenes],
                [chat.last_question(row) for row in scenes],
                max_new_tokens=24,
            )
        )
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1

    resumed = make(SharedPrefixDPOTrainer, rows, output_dir=tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "SharedPrefixDPOTrainer" / "checkpoint-2"))
    assert_same_adapter(trainers[1], resumed)


def test_a_run_on_streamed_rows_is_the_same(make):
    stream = preferences.load(SETTINGS.dataset, "train", streaming=True).take(48)
    rows = chat.format_dataset(stream)
    trainers = []
    for kind in BOTH:
        trainer = make(
            kind,
            rows,
            per_device_train_batch_size=4,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
        )
        trainer.train()
        trainers.append(trainer)
    assert_same_run(*trainers)


def test_a_new_adapter_starts_at_ln_2_with_no_reward(make, rows):
    """Policy and reference go through the same operations, so their difference is exactly zero."""
    trainer = make(SharedPrefixDPOTrainer, rows)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    loss, metrics, _ = step(trainer, trainer.data_collator(list(rows.select(range(8)))))
    assert loss == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["rewards/accuracies"] == 0
    assert metrics["rewards/margins"] == 0


@pytest.mark.parametrize("pairs", ["embedded", "mixed"])
def test_two_processes_log_the_same(pairs, tmp_path):
    """Four pairs a step, two in each process, and seven to evaluate.

    Of the mixed pairs, one process has images in a step in which the other one has none. This file
    runs as the program of both processes (below).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, __file__, str(tmp_path), pairs]
    processes = []
    for rank in ("0", "1"):
        ranked = {**environment, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(subprocess.Popen(command, env=ranked))
    assert [process.wait(timeout=1800) for process in processes] == [0, 0]
    stock, ours = (json.loads((tmp_path / f"{kind.__name__}.json").read_text()) for kind in BOTH)
    assert len(stock) == len(ours) == 4
    assert stock[0]["num_tokens"] > (500 if pairs == "embedded" else 200)
    assert "eval_loss" in stock[2]
    for kind in BOTH:
        first, second = (
            json.loads((tmp_path / f"{kind.__name__}-{rank}.json").read_text()) for rank in range(2)
        )
        # Whether there is an image in the two batches of the training and the two to evaluate.
        if pairs == "mixed":
            assert (first, second) == ([True, False] * 2, [False, True] * 2)
        else:
            assert first == second == [True] * 4
    for expected, entry in zip(stock, ours, strict=True):
        assert entry == pytest.approx(expected, rel=1e-5, abs=1e-5)


def run_as_one_process(folder, name):
    torch.set_num_threads(1)
    processor = models.load_processor(SETTINGS)
    order = "random"
    loaded = preferences.load(SETTINGS.dataset, "train[:48]")
    if name == "mixed":
        order = "sequential"
        # The first two rows of a step are those of the first process.
        loaded = dataset([ONE, TWO, NONE, NONE_EITHER, NONE, NONE_EITHER, TURNS, ONE])
    pairs = chat.format_dataset(loaded)
    for kind in BOTH:
        trainer = embedded_trainer(
            processor,
            folder,
            kind,
            pairs,
            learning_rate=1e-3,
            per_device_train_batch_size=2,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            gradient_checkpointing=True,
            eval_dataset=pairs.select(range(len(pairs) - 8, len(pairs) - 1)),
            train_sampling_strategy=order,
            eval_strategy="steps",
            eval_steps=2,
            per_device_eval_batch_size=2,
        )
        assert trainer.accelerator.num_processes == 2
        seen = watched(trainer)
        trainer.train()
        rank = trainer.accelerator.process_index
        with open(f"{folder}/{kind.__name__}-{rank}.json", "w") as file:
            json.dump(seen, file)
        if trainer.accelerator.is_main_process:
            with open(f"{folder}/{kind.__name__}.json", "w") as file:
                json.dump(logged(trainer), file)
    trainer.accelerator.end_training()  # a process may otherwise abort as it exits


if __name__ == "__main__":
    run_as_one_process(*sys.argv[1:])

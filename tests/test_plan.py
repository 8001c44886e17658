"""The plan: what fits is chosen, the pairs of a step stay, and a GPU measured no more memory."""

import dataclasses
import json

import pytest
import torch

from utils import chat, memory, models, plan, preferences
from utils.settings import PROFILES, ROOT

SMOLVLM = PROFILES["smolvlm"]
TEXT = 185
RECORDS = [json.loads(path.read_text()) for path in (ROOT / "results" / "gpu").glob("*.json")]


def measured_rows(kind):
    """Return (settings, tokens of text, row) for every row of `kind` that a GPU measured."""
    found = []
    for record in RECORDS:
        for row in record["training"]:
            if row["kind"] != kind:
                continue
            settings = dataclasses.replace(
                PROFILES[record["profile"]],
                batch_size=row["batch_size"],
                four_bit=row["four_bit"],
                gradient_checkpointing=row["checkpointing"],
            )
            found.append((settings, row["row_tokens"] - memory.image_tokens(settings), row))
    assert len(found) > 12
    return found


def test_a_step_took_no_more_on_a_gpu_than_the_plan_allows():
    for settings, text_tokens, row in measured_rows("ours"):
        allowed = (plan.step_bytes(settings, text_tokens) - plan.RESERVE) / 1e9
        assert row["allocated_gb"] <= allowed <= 1.6 * row["allocated_gb"], row


def test_the_estimate_is_near_what_a_gpu_measured_without_gradient_in_the_tower():
    for settings, text_tokens, row in measured_rows("fixed_tower"):
        estimate = sum(memory.estimate(settings, text_tokens).values()) / 1e9
        assert estimate == pytest.approx(row["allocated_gb"], rel=0.09), row


def test_answers_took_no_more_on_a_gpu_than_the_plan_allows():
    for record in RECORDS:
        settings = dataclasses.replace(PROFILES[record["profile"]], max_new_tokens=32)
        fewest, *_, most = record["answering"]
        answers = most["batch_size"] - fewest["batch_size"]
        each = 1e9 * (most["allocated_gb"] - fewest["allocated_gb"]) / answers
        assert each <= memory.answer_bytes(settings, 35) <= 1.6 * each


def test_more_memory_is_used_for_what_saves_time():
    chosen = [plan.for_training(SMOLVLM, TEXT, free)[0] for free in (8e9, 14e9, 30e9, 70e9)]
    assert [one.gradient_checkpointing for one in chosen] == [True, False, False, False]
    assert [one.four_bit for one in chosen] == [True, True, False, False]
    sizes = [one.batch_size for one in chosen[1:]]
    assert sizes == sorted(sizes) and sizes[0] >= plan.FEWEST_PAIRS
    for one in chosen:
        assert one.batch_size * one.gradient_accumulation == 16
        same = dataclasses.asdict(SMOLVLM) | {
            name: getattr(one, name) for name in (*SMOLVLM.planned, "gradient_accumulation")
        }
        assert dataclasses.asdict(one) == same


def test_the_choice_fits_and_the_next_better_one_does_not():
    free = 14e9
    chosen, said = plan.for_training(SMOLVLM, TEXT, free)
    needed = plan.step_bytes(chosen, TEXT)
    assert needed <= free
    assert memory.readable(needed) in said and "14.0 GB are free" in said
    choices = plan.candidates(SMOLVLM)
    for better in choices[: choices.index(chosen)]:
        assert plan.step_bytes(better, TEXT) > free


def test_what_fits_nowhere_is_said():
    chosen, said = plan.for_training(SMOLVLM, TEXT, free=1e9)
    assert chosen.batch_size == 1 and chosen.four_bit and chosen.gradient_checkpointing
    assert "too little" in said


@pytest.mark.parametrize("name", ["batch_size", "gradient_checkpointing", "four_bit"])
def test_what_is_fixed_by_hand_stays(name):
    others = tuple(field for field in SMOLVLM.planned if field != name)
    fixed = dataclasses.replace(SMOLVLM, planned=others)
    for free in (6e9, 70e9):
        chosen, _ = plan.for_training(fixed, TEXT, free)
        assert getattr(chosen, name) == getattr(SMOLVLM, name)


def test_processes_share_the_pairs_of_a_step(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    chosen, _ = plan.for_training(SMOLVLM, TEXT, free=70e9)
    assert chosen.batch_size == 4 and chosen.gradient_accumulation == 4


def test_a_sharded_model_is_not_planned(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    chosen, said = plan.for_training(SMOLVLM, TEXT, free=70e9)
    assert chosen == SMOLVLM and "FSDP" in said


def test_without_a_gpu_the_profile_stays():
    for settings in (PROFILES["embedded"], SMOLVLM):
        if torch.cuda.is_available() and settings.planned:
            continue
        for choose in (plan.for_training, plan.for_answering):
            chosen, said = choose(settings, TEXT)
            assert chosen == settings and "as the profile says" in said


def test_a_model_without_a_configuration_is_not_planned():
    unknown = dataclasses.replace(SMOLVLM, model="someone/their-model")
    for choose in (plan.for_training, plan.for_answering):
        chosen, said = choose(unknown, TEXT, free=70e9)
        assert chosen == unknown and "their-model" in said


def test_as_many_answers_as_fit():
    sizes = []
    for free in (1e9, 6e9, 60e9):
        chosen, said = plan.for_answering(SMOLVLM, 35, free)
        sizes.append(chosen.generation_batch_size)
        assert f"{sizes[-1]} answers" in said
    assert sizes[0] == 1 and sizes[-1] == plan.MOST_ANSWERS
    assert sizes == sorted(sizes)


def test_what_torch_holds_unused_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5e9, 15e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3e9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1e9)
    assert plan.free_on_gpu() == 7e9


def test_the_longest_text_is_that_of_the_longest_row():
    settings = PROFILES["embedded"]
    processor = models.load_processor(settings)
    rows = chat.format_dataset(preferences.load(settings.dataset, "train[:40]"))
    lengths = [chat.count_tokens(row, processor) for row in rows]
    image = memory.image_tokens(settings)
    assert plan.longest_text(rows, processor) == max(lengths) - image

"""The faster trainer on a few families, by hand, and where it must not pack.

tests/slow/test_packed_families.py compares every family with TRL's trainer.
"""

from functools import partial

import pytest
import torch
from both_trainers import (
    BOTH,
    SETTINGS,
    assert_same_batch,
    assert_same_for_mixed_rows,
    assert_same_step,
    family_trainers,
    log_probs,
    make_trainer,
    same_to_the_last_bit,
    seen_by_the_vision_tower,
)
from mixed_rows import BATCHES, TWO, dataset
from peft import LoraConfig, get_peft_model
from tiny_models import Pair, tiny_batch, tiny_model
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from utils import chat, packed_rows, preferences, shared_prefix, vision
from utils.shared_prefix import PackedPairs, SharedPrefixDPOTrainer

PAIRS = [Pair(7, 1, 5, 9), Pair(3, 2, 1, 20), Pair(12, 1, 13, 3)]


@pytest.fixture
def make(processor, tmp_path):
    return partial(make_trainer, processor, tmp_path)


@pytest.fixture(scope="module")
def rows():
    return chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:3]"))


# The packed row


def test_the_row_that_the_docstring_draws():
    """Prompt of three tokens, answers of two, and a second pair that is longer by two."""
    labels = torch.full((4, 7), -100)
    labels[0, 3:5] = labels[2, 3:5] = 5
    labels[1, 4:7] = labels[3, 4:6] = 6
    attention_mask = torch.tensor([[1] * 5 + [0] * 2, [1] * 7, [1] * 5 + [0] * 2, [1] * 6 + [0]])
    lengths = shared_prefix.row_lengths(attention_mask, labels)
    assert lengths == ([3, 4, 3, 4], [2, 3, 2, 2])
    pairs = PackedPairs(attention_mask, labels, lengths=lengths)
    assert pairs.place.tolist() == list(range(10))
    assert pairs.row[0].tolist() == [0, 0, 0, 0, 0, 2, 2, 2, 2, 2]
    assert pairs.column[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]
    assert pairs.branch[0].tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert pairs.predicted_in.tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 1]
    assert pairs.predicted_at.tolist() == [2, 3, 3, 4, 5, 5, 6, 7, 8]


def test_the_mask_of_a_pair_by_hand():
    """Prompt of three tokens, answers of two: [p p p | c c | p r r]."""
    labels = torch.tensor([[-100, -100, -100, 4, 5], [-100, -100, -100, 6, 7]])
    pairs = PackedPairs(torch.ones(2, 5, dtype=torch.long), labels)
    assert pairs.pack(torch.arange(10).view(2, 5)).tolist() == [[0, 1, 2, 3, 4, 7, 8, 9]]
    assert pairs.targets.tolist() == [[4, 5, 6, 7]]
    expected = """
        x.......
        xx......
        xxx.....
        xxxx....
        xxxxx...
        xx...x..
        xx...xx.
        xx...xxx""".split()
    masks = pairs.mask("sdpa", torch.float32)[:, 0]
    for line, place in zip(expected, masks[0].tolist(), strict=True):
        assert "".join("x" if sees else "." for sees in place) == line
    eager = pairs.mask("eager", torch.float32)[:, 0]
    assert torch.equal(eager == 0, masks)
    assert eager.min() == torch.finfo(torch.float32).min


def test_the_mask_of_two_pairs_in_a_row_by_hand():
    """[p p | c | p r | p | c | p r]: prompts of two tokens and of one, answers of one."""
    labels = torch.tensor([[-100, -100, 4], [-100, 5, -100], [-100, -100, 6], [-100, 7, -100]])
    attention_mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]])
    pairs = PackedPairs(attention_mask, labels, width=1000)  # attention costs next to nothing
    places = torch.arange(3).expand(4, 3)
    assert pairs.pack(places).tolist() == [[0, 1, 2, 1, 2, 0, 1, 0, 1]]
    assert pairs.row.tolist() == [[0, 0, 0, 2, 2, 1, 1, 3, 3]]
    assert pairs.predicted_in.tolist() == [0, 0, 0, 0]
    assert pairs.predicted_at.tolist() == [1, 5, 3, 7]
    expected = """
        x........
        xx.......
        xxx......
        x..x.....
        x..xx....
        .....x...
        .....xx..
        .......x.
        .......xx""".split()
    mask = pairs.mask("sdpa", torch.float32)[0, 0]
    for line, place in zip(expected, mask.tolist(), strict=True):
        assert "".join("x" if sees else "." for sees in place) == line


def test_a_padded_row_may_repeat_its_last_token():
    """The first pair's rows leave no room for padding, and the second pair is packed longer."""
    labels = torch.full((4, 4), -100)
    labels[0, 3] = labels[2, 3] = 5
    labels[1, 1:] = labels[3, 1:] = 6
    pairs = PackedPairs(torch.ones(4, 4, dtype=torch.long), labels)
    assert pairs.column.tolist() == [[0, 1, 2, 3, 2, 3, 3, 3], [0, 1, 2, 3, 0, 1, 2, 3]]


# One step, the same as TRL's


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl", "gemma3"])
def test_a_step_is_the_same(family, make):
    stock, ours = (make(kind, tiny_model(family)) for kind in BOTH)
    assert_same_step(stock, ours, tiny_batch(tiny_model(family), PAIRS))
    assert ours.packs


def test_the_device_is_asked_for_lengths_once_a_forward(make, monkeypatch):
    ours = make(SharedPrefixDPOTrainer, tiny_model("llava"))
    _, batch = tiny_batch(tiny_model("llava"), PAIRS)
    asked = []
    right = shared_prefix.row_lengths

    def counted(*arguments):
        asked.append(1)
        return right(*arguments)

    monkeypatch.setattr(shared_prefix, "row_lengths", counted)
    log_probs(ours, batch)
    assert ours.packs
    assert len(asked) == 1


def test_the_comparison_finds_a_rejected_answer_that_sees_the_chosen_one(make, monkeypatch):
    stock, ours = (make(kind, tiny_model("llava")) for kind in BOTH)
    batches = tiny_batch(tiny_model("llava"), PAIRS)
    right = PackedPairs.__init__

    def chosen_is_shared(pairs, *arguments):
        right(pairs, *arguments)
        pairs.branch[pairs.branch == 1] = packed_rows.SHARED

    monkeypatch.setattr(PackedPairs, "__init__", chosen_is_shared)
    with pytest.raises(AssertionError):
        assert_same_step(stock, ours, batches)


def test_the_comparison_finds_a_pair_that_sees_the_pair_before_it(make, monkeypatch):
    stock, ours = (make(kind, tiny_model("llava")) for kind in BOTH)
    batches = tiny_batch(tiny_model("llava"), PAIRS)
    monkeypatch.setattr(shared_prefix, "groups_in_rows", lambda lengths, _: [len(lengths)])
    assert_same_step(stock, ours, batches)
    right = PackedPairs.__init__

    def one_group(pairs, *arguments):
        right(pairs, *arguments)
        pairs.group = torch.zeros_like(pairs.group)

    monkeypatch.setattr(PackedPairs, "__init__", one_group)
    with pytest.raises(AssertionError):
        assert_same_step(stock, ours, batches)


def test_a_frozen_vision_tower_sees_each_image_once_and_gets_no_gradient(make):
    """Stock: all images twice in the policy's forward, and twice in the reference's."""
    stock, ours = (make(kind, tiny_model("llava")) for kind in BOTH)
    stock_batch, batch = tiny_batch(tiny_model("llava"), PAIRS)
    forwards, once, backwards = seen_by_the_vision_tower(ours, batch)
    assert (forwards, backwards) == (1, 0)
    assert seen_by_the_vision_tower(stock, stock_batch)[:2] == (2, 2 * 2 * once)


# Rows with none, one and several images, with the family's own processor and collator


@pytest.fixture(scope="module")
def mixed_trainers(tmp_path_factory):
    return family_trainers("SmolVLM", tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("case", BATCHES)
def test_a_step_on_mixed_rows_is_the_same(case, mixed_trainers):
    rows = chat.format_dataset(dataset(BATCHES[case]))
    assert mixed_trainers[1].packs
    assert_same_for_mixed_rows(mixed_trainers, list(rows))


def test_the_comparison_of_mixed_rows_finds_images_of_another_row(mixed_trainers, monkeypatch):
    rows = chat.format_dataset(dataset(BATCHES["none, one and two images"]))
    ours = mixed_trainers[1]
    collate = ours.data_collator

    def rolled(examples):
        batch = collate(examples)
        batch["pixel_values"] = batch["pixel_values"].roll(1, 0)
        return batch

    monkeypatch.setattr(ours, "data_collator", rolled)
    with pytest.raises(AssertionError):
        assert_same_for_mixed_rows(mixed_trainers, list(rows))


def test_the_order_of_images_matters(mixed_trainers):
    row = chat.format_dataset(dataset([TWO]))[0]
    other = {**row, "images": row["images"][::-1]}
    for trainer in mixed_trainers:
        logps = [log_probs(trainer, trainer.data_collator([dict(one)])) for one in (row, other)]
        assert (logps[0].sum(1) - logps[1].sum(1)).abs().min() > 1e-3


# What decides whether images and rows are shared


def train_connector(backbone):
    backbone.connector.requires_grad_(True)


def adapt_connector(backbone):
    adapter = LoraConfig(target_modules=".*connector.*proj")
    get_peft_model(backbone, adapter).requires_grad_(False)


def add_dropout(backbone):
    backbone.vision_model.register_module("drop", torch.nn.Dropout(0.1))


def add_attention_dropout(backbone):
    backbone.config.vision_config.attention_dropout = 0.1


@pytest.mark.parametrize(
    "change", [train_connector, adapt_connector, add_dropout, add_attention_dropout]
)
def test_what_stands_between_pixels_and_language_model_decides_what_is_shared(change):
    backbone = shared_prefix.backbone_of(tiny_model("idefics3"))
    backbone.get_decoder().requires_grad_(True)
    assert vision.vision_is_fixed(backbone)
    change(backbone)
    assert not vision.vision_is_fixed(backbone)


def test_a_prompt_that_sees_ahead_runs_as_two_rows_and_says_so_once(make):
    with pytest.warns(UserWarning, match="paligemma") as warned:
        ours = make(SharedPrefixDPOTrainer, tiny_model("paligemma"))
    assert len([warning for warning in warned if warning.category is UserWarning]) == 1
    assert not ours.packs


def test_an_empty_prompt_runs_as_two_rows(make):
    stock, ours = (make(kind, tiny_model("idefics3")) for kind in BOTH)
    batches = tiny_batch(tiny_model("idefics3"), [Pair(0, 0, 4, 6), Pair(3, 0, 2, 3)])
    with pytest.warns(UserWarning, match="prompt is empty"):
        assert same_to_the_last_bit(stock, ours, batches)


def test_every_reason_against_packing_is_named(make):
    trainer = make(SharedPrefixDPOTrainer, tiny_model("llava"))
    config = trainer.model.config
    text = config.get_text_config()
    adapter = trainer.model.peft_config["default"]

    def reason(**changes):
        options = {"output_dir": "x", "use_cpu": True, "bf16": False, "max_length": None}
        return shared_prefix.why_not_packed(trainer.model, DPOConfig(**options | changes))

    assert reason() is None
    assert trainer.packs
    assert "keep_end" in reason(max_length=9, truncation_mode="keep_end")
    for thing, name, value, match in [
        (text, "_attn_implementation", "flash_attention_2", "flash_attention_2"),
        (text, "model_type", "recurrent_gemma", "recurrent_gemma decoder"),
        (text, "use_bidirectional_attention", True, "later tokens"),
        (text, "attention_dropout", 0.1, "dropout"),
        (config, "model_type", "mllama", "mllama"),
        (adapter, "peft_type", "IA3", "LoRA"),
        (adapter, "alora_invocation_tokens", [1], "LoRA"),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(thing, name, value, raising=False)
            assert match in reason()
    trainer.model.add_module("noise", torch.nn.Dropout(0.1))
    assert "dropout" in reason()


# The collator


def test_a_collator_of_one_s_own_is_refused(make):
    with pytest.raises(ValueError, match="data_collator"):
        make(SharedPrefixDPOTrainer, tiny_model("llava"), data_collator=lambda rows: rows)


@pytest.mark.parametrize("images", [[1, 1, 1], [0, 2, 1], [0, 0, 0]])
@pytest.mark.parametrize("max_length", [None, 60])
def test_the_collator_gives_the_stock_batch_with_each_image_once(
    images, max_length, rows, processor
):
    examples = []
    for row, count in zip(rows, images, strict=True):
        question = row["prompt"][0]["content"][-1]["text"]
        example = {"chosen": row["chosen"], "rejected": row["rejected"]}
        example["prompt"] = [{"role": "user", "content": question}]
        example["images"] = row["images"] * count
        examples.append(example)
    kept = str(examples)
    stock = DataCollatorForVisionPreference(processor, max_length)
    batch = shared_prefix.collate_pairs(stock, examples)
    assert str(examples) == kept
    assert_same_batch(stock(examples), batch)


def test_the_image_processor_runs_once_per_image(rows, processor, monkeypatch):
    processed = []
    image_processor = type(processor.image_processor)
    preprocess = image_processor.preprocess

    def counted(self, images, **options):
        processed.append(images)
        return preprocess(self, images, **options)

    monkeypatch.setattr(image_processor, "preprocess", counted)
    shared_prefix.collate_pairs(DataCollatorForVisionPreference(processor), list(rows))
    assert len(processed) == 1
    assert len(processed[0]) == 3

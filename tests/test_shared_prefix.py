"""The faster trainer against TRL's own: the same batch, the same weights, LoRA's B at random (at zero every mistake hides behind ln 2)."""

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
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_models import FAMILIES, Pair, tiny_batch, tiny_model
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from utils import chat, models, preferences, shared_prefix
from utils.generation import answer
from utils.settings import PROFILES
from utils.shared_prefix import PackedPairs, SharedPrefixDPOTrainer

SETTINGS = PROFILES["embedded"]
BOTH = (DPOTrainer, SharedPrefixDPOTrainer)
LANGUAGE = r".*(text_model|language_model)\..*(q|k|v|o|gate|up|down)_proj"
PAIRS = [Pair(7, 1, 5, 9), Pair(3, 2, 1, 20), Pair(12, 1, 13, 3)]
CASES = {
    "one pair": [Pair(5, 1, 4, 6)],
    "answers of 1 and of 200 tokens": [Pair(5, 1, 1, 200), Pair(5, 1, 200, 1), Pair(5, 1, 1, 1)],
    "prompts of very different length": [Pair(1, 1, 4, 6), Pair(60, 1, 7, 3)],
    "none, one and two images": [Pair(5, 0, 4, 6), Pair(4, 1, 3, 3), Pair(6, 2, 8, 2)],
    "no image at all": [Pair(5, 0, 4, 6), Pair(9, 0, 3, 3)],
}


@pytest.fixture(scope="session")
def row():
    texts = chat.conversation(
        {"question": "What is this?", "chosen": "A cup.", "rejected": "A dog."}
    )
    return {"images": [Image.new("RGB", (64, 64), "red")], **texts}


@pytest.fixture
def make(processor, row, tmp_path):
    """`make(trainer class, model)`: a trainer in the state it is in during `train`, with the same random adapter every time."""
    return partial(make_trainer, processor, row, tmp_path)


def make_trainer(processor, row, output, kind, model, lora=LANGUAGE, **changes):
    settings = {
        "output_dir": output,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_length": None,
    }
    settings |= {"gradient_checkpointing": False, "disable_tqdm": True}
    arguments = (
        {"train_dataset": Dataset.from_list([row])} if "train_dataset" not in changes else {}
    )
    arguments |= {
        name: changes.pop(name)
        for name in ("ref_model", "train_dataset", "eval_dataset", "data_collator")
        if name in changes
    }
    if lora:
        arguments["peft_config"] = LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=lora
        )
    trainer = kind(
        model=model, args=DPOConfig(**settings | changes), processing_class=processor, **arguments
    )
    trainer.remove_callback(PrinterCallback)
    randomise(trainer.model)
    trainer.model.train()
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer


def randomise(model, size=0.2):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad and "lora_" in name:
            parameter.data.normal_(0, size, generator=generator)


def step(trainer, batch):
    """Loss, logged metrics and gradients of one batch."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = {
        name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None
    }
    return (
        loss.item(),
        {name: values[-1] for name, values in trainer._metrics["train"].items()},
        gradients,
    )


def assert_same_step(stock, ours, batches):
    """Loss within 1e-6, every logged metric within 1e-5, every gradient within 1e-4 of its length. Returns the differences.

    Metrics above 1 are compared relative to their size. A gradient 1,000 times shorter than the longest is compared with
    that thousandth: some are zero but for rounding (the bias of a key shifts all scores alike).
    """
    (loss, metrics, gradients), (our_loss, our_metrics, our_gradients) = (
        step(stock, batches[0]),
        step(ours, batches[1]),
    )
    assert gradients and gradients.keys() == our_gradients.keys()
    floor = max(1e-12, *(gradient.norm() / 1000 for gradient in gradients.values()))
    worst = max(
        (
            (our_gradients[name] - gradients[name]).norm() / gradients[name].norm().clamp(min=floor)
        ).item()
        for name in gradients
    )
    assert our_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    assert our_loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert worst < 1e-4
    return {
        "loss": abs(our_loss - loss),
        "metrics": max(abs(our_metrics[name] - metrics[name]) for name in metrics),
        "gradients": worst,
    }


def log_probs(trainer, batch):
    """Per-token log-probabilities (2n, T - 1) of the policy."""
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    run = (
        trainer.run
        if isinstance(trainer, SharedPrefixDPOTrainer)
        else lambda model, **rest: model(**rest)
    )
    with torch.no_grad():
        return run(trainer.model, **inputs, labels=labels, fused_lm_head=True).log_probs


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_equal_to_the_last_bit_with_a_float64_body(family, make):
    stock, ours = (make(kind, tiny_model(family)) for kind in BOTH)
    stock.model.double(), ours.model.double()
    batches = tiny_batch(tiny_model(family), PAIRS)
    expected = log_probs(stock, batches[0])
    assert torch.equal(log_probs(ours, batches[1]), expected)
    assert ours.packs and expected.min() < -5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_same_in_every_family(family, make):
    stock, ours = (make(kind, tiny_model(family)) for kind in BOTH)
    assert_same_step(stock, ours, tiny_batch(tiny_model(family), PAIRS))


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_same_in_hard_cases(family, case, make):
    """With a float64 body: the sum of 200 log-probabilities alone is known to 1e-5 in float32, in the stock trainer too."""
    stock, ours = (make(kind, tiny_model(family)) for kind in BOTH)
    stock.model.double(), ours.model.double()
    assert assert_same_step(stock, ours, tiny_batch(tiny_model(family), CASES[case]))["loss"] == 0


@pytest.mark.parametrize(
    ("images", "max_length", "left"),
    [(1, 30, [16, 5, 16, 21]), (1, 14, [0, 5, 0, 5]), (0, 4, [0, 0, 0, 0])],
)
def test_a_step_is_the_same_with_answers_cut_short_or_off(images, max_length, left, make):
    batches = tiny_batch(
        tiny_model("smolvlm"),
        [Pair(9, images, 30, 40), Pair(4, images, 5, 30)],
        max_length=max_length,
    )
    assert batches[0]["completion_mask"].sum(1).tolist() == left
    stock, ours = (make(kind, tiny_model("smolvlm")) for kind in BOTH)
    assert_same_step(stock, ours, batches)


def test_identical_answers_get_identical_log_probabilities(make):
    """With a float64 body; in float32 the last bit decides which of two equal rewards counts as higher. The gradients are zero."""
    stock, ours = (make(kind, tiny_model("qwen3_vl")) for kind in BOTH)
    stock.model.double(), ours.model.double()
    batches = tiny_batch(tiny_model("qwen3_vl"), [Pair(5, 1, 7, 7), Pair(3, 1, 4, 4)])
    for batch in batches:
        batch["input_ids"][2:] = batch["input_ids"][:2]
    (loss, metrics, _), (our_loss, our_metrics, gradients) = (
        step(stock, batches[0]),
        step(ours, batches[1]),
    )
    assert our_loss == loss and our_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    assert max(gradient.abs().max() for gradient in gradients.values()) < 1e-7
    chosen, rejected = log_probs(ours, batches[1]).chunk(2)
    assert torch.equal(chosen, rejected) and chosen.any()


@pytest.mark.parametrize("family", ["idefics2", "llava_next", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("lora", [LANGUAGE, "all-linear"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_step_is_the_same_with_gradient_checkpointing(family, lora, reentrant, make):
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    stock, ours = (make(kind, tiny_model(family), lora, **checkpointing) for kind in BOTH)
    assert_same_step(stock, ours, tiny_batch(tiny_model(family), PAIRS))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_same_with_an_adapter_everywhere(family, make):
    stock, ours = (make(kind, tiny_model(family), "all-linear") for kind in BOTH)
    assert not shared_prefix.vision_is_fixed(shared_prefix.backbone_of(ours.model))
    assert_same_step(stock, ours, tiny_batch(tiny_model(family), PAIRS))


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl", "gemma3"])
def test_a_step_is_the_same_with_eager_attention(family, make):
    stock, ours = (make(kind, tiny_model(family, attention="eager")) for kind in BOTH)
    assert_same_step(stock, ours, tiny_batch(tiny_model(family), PAIRS))


def test_a_step_is_the_same_for_a_second_round_on_an_adapter(make):
    """The reference is then the adapter as it was ("ref")."""

    def adapted():
        model = get_peft_model(
            tiny_model("qwen2_vl"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LANGUAGE)
        )
        randomise(model)
        return model

    trainers = [make(kind, adapted(), lora=None) for kind in BOTH]
    for trainer in trainers:
        assert list(trainer.model.peft_config) == ["default", "ref"]
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name:
                parameter.data += 0.05
    assert_same_step(*trainers, tiny_batch(tiny_model("qwen2_vl"), PAIRS))


@pytest.mark.parametrize("trained", ["", "language_model"])
def test_a_step_is_the_same_in_full_fine_tuning(trained, make):
    """Of everything, and of the language model alone; the reference is another model, here with other weights."""
    trainers = []
    for kind in BOTH:
        model = tiny_model("llava")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        trainers.append(make(kind, model, lora=None, ref_model=tiny_model("llava", seed=5)))
    assert_same_step(*trainers, tiny_batch(tiny_model("llava"), PAIRS))


LOSSES = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft sigmoid_norm"


@pytest.mark.parametrize(
    "settings",
    [{"loss_type": [loss]} for loss in LOSSES.split()]
    + [
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 1.0]},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
    ]
    + [{"f_divergence_type": "js_divergence"}],
    ids=str,
)
def test_a_step_is_the_same_for_every_loss(settings, make):
    stock, ours = (
        make(kind, tiny_model("idefics3"), label_smoothing=0.1, beta=0.02, **settings)
        for kind in BOTH
    )
    assert_same_step(stock, ours, tiny_batch(tiny_model("idefics3"), PAIRS))


def test_metrics_of_an_evaluation_with_outputs_are_the_same(make):
    batches = tiny_batch(tiny_model("qwen2_5_vl"), PAIRS)
    results = []
    for kind, batch in zip(BOTH, batches, strict=True):
        trainer = make(kind, tiny_model("qwen2_5_vl"))
        trainer.model.eval()
        with pytest.warns(FutureWarning, match="return_outputs"):
            loss, logits, _ = trainer.prediction_step(
                trainer.model, dict(batch), prediction_loss_only=False
            )
        results.append(
            (
                loss.item(),
                logits,
                {name: values[-1] for name, values in trainer._metrics["eval"].items()},
            )
        )
    (loss, logits, metrics), (our_loss, our_logits, our_metrics) = results
    assert our_loss == pytest.approx(loss, abs=1e-6) and our_metrics == pytest.approx(
        metrics, rel=1e-5, abs=1e-5
    )
    assert torch.equal(our_logits, logits)


def seen_by_the_vision_tower(trainer, batch):
    """(forwards, numbers that went in, backwards) of the first linear layer of the vision tower in one step."""
    backbone = shared_prefix.backbone_of(trainer.model)
    language = set(backbone.get_decoder().modules())
    layer = next(
        module
        for module in backbone.modules()
        if isinstance(module, torch.nn.Linear) and module not in language
    )
    sizes, backwards = [], []
    hooks = [
        layer.register_forward_hook(
            lambda _module, inputs, _output: sizes.append(inputs[0].numel())
        )
    ]
    hooks += [layer.register_full_backward_hook(lambda *_: backwards.append(1))]
    step(trainer, batch)
    for hook in hooks:
        hook.remove()
    return len(sizes), sum(sizes), len(backwards)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_vision_tower_sees_each_image_once_and_gets_no_gradient(family, make):
    """Stock: all images twice in the policy's forward, in the reference's and again to recompute what checkpointing let go."""
    stock, ours = (make(kind, tiny_model(family), gradient_checkpointing=True) for kind in BOTH)
    stock_batch, batch = tiny_batch(tiny_model(family), PAIRS)
    forwards, once, backwards = seen_by_the_vision_tower(ours, batch)
    assert (forwards, backwards) == (1, 0)
    recomputed = family != "qwen3_vl"  # its patches get no hook that asks for gradients
    expected = (3, 3 * 2 * once, 1) if recomputed else (2, 2 * 2 * once, 0)
    assert seen_by_the_vision_tower(stock, stock_batch) == expected


def test_a_trained_vision_tower_sees_each_image_once_per_forward(make):
    stock, ours = (make(kind, tiny_model("idefics2"), "all-linear") for kind in BOTH)
    stock_batch, batch = tiny_batch(tiny_model("idefics2"), PAIRS)
    forwards, size, _ = seen_by_the_vision_tower(ours, batch)
    assert forwards == 2
    assert seen_by_the_vision_tower(stock, stock_batch)[:2] == (2, 2 * size)


@pytest.mark.parametrize(
    "train",
    [
        lambda backbone: backbone.connector.requires_grad_(True),
        lambda backbone: get_peft_model(
            backbone, LoraConfig(target_modules=".*connector.*proj")
        ).requires_grad_(False),
        lambda backbone: backbone.vision_model.register_module("drop", torch.nn.Dropout(0.1)),
        lambda backbone: setattr(backbone.config.vision_config, "attention_dropout", 0.1),
    ],
    ids=["a trained connector", "a frozen adapter", "dropout", "dropout in attention"],
)
def test_what_stands_between_pixels_and_language_model_decides_what_is_shared(train):
    backbone = shared_prefix.backbone_of(tiny_model("idefics3"))
    backbone.get_decoder().requires_grad_(True)
    assert shared_prefix.vision_is_fixed(backbone)
    train(backbone)
    assert not shared_prefix.vision_is_fixed(backbone)


# Where the answers cannot share a row


def same_to_the_last_bit(stock, ours, batches):
    return set(assert_same_step(stock, ours, batches).values()) == {0.0}


def test_a_prompt_that_sees_ahead_runs_as_two_rows_and_shares_the_images(make):
    stock = make(DPOTrainer, tiny_model("paligemma"))
    with pytest.warns(UserWarning, match="two rows, as in DPOTrainer.*paligemma") as warned:
        ours = make(SharedPrefixDPOTrainer, tiny_model("paligemma"))
    assert len([warning for warning in warned if warning.category is UserWarning]) == 1
    batches = tiny_batch(tiny_model("paligemma"), [Pair(5, 1, 4, 6), Pair(3, 1, 2, 3)])
    assert same_to_the_last_bit(stock, ours, batches)
    assert seen_by_the_vision_tower(ours, batches[1])[0::2] == (1, 0)


@pytest.mark.parametrize(("window", "packs"), [(32, False), (33, True)])
def test_rows_longer_than_a_sliding_window_run_as_two(window, packs, make):
    """33 tokens are the longest row; packed rows may be longer, as no token sees more than its own row."""
    stock, ours = (make(kind, tiny_model("gemma3", sliding_window=window)) for kind in BOTH)
    batches = tiny_batch(tiny_model("gemma3"), PAIRS)
    assert batches[0]["input_ids"].shape[1] == 33
    if packs:
        assert not same_to_the_last_bit(stock, ours, batches)
    else:
        with pytest.warns(UserWarning, match="sliding window"):
            assert same_to_the_last_bit(stock, ours, batches)


def test_an_empty_prompt_runs_as_two_rows(make):
    stock, ours = (make(kind, tiny_model("idefics3")) for kind in BOTH)
    with pytest.warns(UserWarning, match="a prompt is empty"):
        assert same_to_the_last_bit(
            stock, ours, tiny_batch(tiny_model("idefics3"), [Pair(0, 0, 4, 6), Pair(3, 0, 2, 3)])
        )


def test_every_reason_against_packing_is_named(make):
    trainer = make(SharedPrefixDPOTrainer, tiny_model("llava"))
    text = trainer.model.config.get_text_config()

    def reason(**changes):
        return shared_prefix.why_not_packed(
            trainer.model,
            DPOConfig(
                **{"output_dir": "x", "use_cpu": True, "bf16": False, "max_length": None} | changes
            ),
        )

    assert reason() is None and trainer.packs
    assert "keep_end" in reason(max_length=9, truncation_mode="keep_end")
    for thing, name, value, match in [
        (text, "_attn_implementation", "flash_attention_2", "flash_attention_2"),
        (text, "model_type", "recurrent_gemma", "recurrent_gemma decoder"),
        (text, "use_bidirectional_attention", True, "sees later tokens"),
        (text, "attention_dropout", 0.1, "dropout"),
        (trainer.model.config, "model_type", "mllama", "mllama"),
        (trainer.model.peft_config["default"], "peft_type", "IA3", "not plain LoRA"),
        (trainer.model.peft_config["default"], "alora_invocation_tokens", [1], "not plain LoRA"),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(thing, name, value, raising=False)
            assert match in reason()
    trainer.model.add_module("noise", torch.nn.Dropout(0.1))
    assert "dropout" in reason()


def test_a_collator_of_one_s_own_is_refused(make):
    with pytest.raises(ValueError, match="leave data_collator out"):
        make(SharedPrefixDPOTrainer, tiny_model("llava"), data_collator=lambda rows: rows)


# Teeth: every mistake that was thought of must fail the comparison above.


def wrong_mask(change):
    def plant(monkeypatch, _trainer):
        right = PackedPairs.mask

        def mask(pairs, attention, dtype, token_type_ids=None):
            kept, pairs.branch = pairs.branch, change(pairs.branch)
            made = right(pairs, attention, dtype, token_type_ids)
            pairs.branch = kept
            return made

        monkeypatch.setattr(PackedPairs, "mask", mask)

    return plant


def positions_run_on(monkeypatch, _trainer):
    right = PackedPairs.pack

    def pack(pairs, rows):
        packed = right(pairs, rows)
        return (
            torch.arange(packed.shape[1]).expand_as(packed)
            if torch.equal(rows[0], torch.arange(rows.shape[1]))
            else packed
        )

    monkeypatch.setattr(PackedPairs, "pack", pack)


def one_position_per_token(monkeypatch, trainer):
    def flat(input_ids, **_rest):
        return torch.arange(input_ids.shape[1]).expand(3, *input_ids.shape), None

    monkeypatch.setattr(shared_prefix.backbone_of(trainer.model), "get_rope_index", flat)


def no_image_blocks(monkeypatch, _trainer):
    right = PackedPairs.mask
    monkeypatch.setattr(
        PackedPairs,
        "mask",
        lambda pairs, attention, dtype, _token_type_ids=None: right(pairs, attention, dtype),
    )


def features_of_a_trained_tower_shared(monkeypatch, _trainer):
    monkeypatch.setattr(shared_prefix, "vision_is_fixed", lambda _backbone: True)


def first_rejected_token_predicted_by_the_chosen_answer(monkeypatch, _trainer):
    right = PackedPairs.__init__

    def init(pairs, attention_mask, labels):
        right(pairs, attention_mask, labels)
        first = (
            pairs.column == pairs.column.gather(1, pairs.branch.eq(2).int().argmax(1, keepdim=True))
        ) & (pairs.branch == 2)
        pairs.predicted_at = pairs.predicted_at - first[pairs.pair, pairs.predicted_at].int()

    monkeypatch.setattr(PackedPairs, "__init__", init)


MISTAKES = {
    "the rejected answer sees the chosen one": ("llava", wrong_mask(torch.zeros_like)),
    "the last prompt token counts twice": (
        "smolvlm",
        wrong_mask(lambda branch: branch * ~first_of(branch, 1)),
    ),
    "positions do not restart": ("idefics2", positions_run_on),
    "the first rejected token follows the chosen answer": (
        "internvl",
        first_rejected_token_predicted_by_the_chosen_answer,
    ),
    "M-RoPE ignored in Qwen2-VL": ("qwen2_vl", one_position_per_token),
    "M-RoPE ignored in Qwen2.5-VL": ("qwen2_5_vl", one_position_per_token),
    "M-RoPE ignored in Qwen3-VL": ("qwen3_vl", one_position_per_token),
    "image blocks missing": ("gemma3", no_image_blocks),
    "features of a trained tower shared": ("llava_next", features_of_a_trained_tower_shared),
}


def first_of(branch, value):
    """True at the first place of each row that has this value."""
    return (branch == value) & ((branch == value).cumsum(1) == 1)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_finds(mistake, make, monkeypatch):
    family, plant = MISTAKES[mistake]
    lora = "all-linear" if plant is features_of_a_trained_tower_shared else LANGUAGE
    batches = tiny_batch(tiny_model(family), PAIRS)
    trainers = [make(kind, tiny_model(family), lora) for kind in BOTH]
    assert_same_step(*trainers, batches)
    plant(monkeypatch, trainers[1])
    with pytest.raises(AssertionError):
        assert_same_step(*trainers, batches)


def test_the_mask_of_a_pair_by_hand():
    """Prompt of three tokens, answers of two: [p p p | c c | p r r]."""
    labels = torch.tensor([[-100, -100, -100, 4, 5], [-100, -100, -100, 6, 7]])
    pairs = PackedPairs(torch.ones(2, 5, dtype=torch.long), labels)
    assert pairs.pack(torch.arange(10).view(2, 5)).tolist() == [[0, 1, 2, 3, 4, 7, 8, 9]]
    assert pairs.targets.tolist() == [[4, 5, 6, 7]] and pairs.predicted_at.tolist() == [2, 3, 5, 6]
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
    assert [
        "".join("x" if sees else "." for sees in place) for place in masks[0].tolist()
    ] == expected
    eager = pairs.mask("eager", torch.float32)[:, 0]
    assert torch.equal(eager == 0, masks) and eager.min() == torch.finfo(torch.float32).min


# The embedded world: the true collator, 4 bit, whole runs


@pytest.fixture(scope="module")
def rows():
    return chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:48]"))


def embedded(make, kind, rows, **changes):
    trainer = make(
        kind, models.load_model(SETTINGS), SETTINGS.lora_target, train_dataset=rows, **changes
    )
    for (
        parameter
    ) in trainer.model.parameters():  # TRL casts the adapter of a 4-bit model to bfloat16
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    randomise(trainer.model, 0.03)  # so that it still speaks
    return trainer


def assert_same_batch(stock, ours):
    """Text bit for bit; images once, and bit for bit when repeated. Returns how many images."""
    assert list(stock) == list(ours)
    for name, value in stock.items():
        again = (
            ours[name]
            if name in (*shared_prefix.TEXT, "completion_mask")
            else torch.cat([ours[name]] * 2)
        )
        assert torch.equal(value, again) and value.dtype == again.dtype, name
    return len(ours["pixel_values"]) if "pixel_values" in ours else 0


@pytest.mark.parametrize("images", [[1, 1, 1], [0, 2, 1], [0, 0, 0]])
@pytest.mark.parametrize("max_length", [None, 60])
def test_the_collator_gives_the_stock_batch_with_each_image_once(
    images, max_length, rows, processor
):
    examples = [
        {name: value for name, value in row.items() if name != "image"}
        for row in rows.select(range(3))
    ]
    for number, (example, count) in enumerate(zip(examples, images, strict=True)):
        example["images"] = [rows[number]["image"]] * count
        example["prompt"] = [
            {"role": "user", "content": example["prompt"][0]["content"][-1]["text"]}
        ]
    kept = str(examples)
    stock = DataCollatorForVisionPreference(processor, max_length)
    batch = shared_prefix.collate_pairs(stock, examples)
    assert str(examples) == kept
    assert_same_batch(stock(examples), batch)


def test_the_image_processor_runs_once_per_image(rows, processor, monkeypatch):
    processed, right = [], type(processor.image_processor).preprocess
    monkeypatch.setattr(
        type(processor.image_processor),
        "preprocess",
        lambda self, images, **rest: processed.append(images) or right(self, images, **rest),
    )
    shared_prefix.collate_pairs(
        DataCollatorForVisionPreference(processor), list(rows.select(range(3)))
    )
    assert len(processed) == 1 and len(processed[0]) == 3


def test_a_step_is_the_same_in_4_bit(make, rows):
    stock, ours = (embedded(make, kind, rows, gradient_checkpointing=True) for kind in BOTH)
    batches = [
        trainer.data_collator([dict(row) for row in rows.select(range(4))])
        for trainer in (stock, ours)
    ]
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in ours.model.modules())
    assert assert_same_batch(*batches) == 4
    assert_same_step(stock, ours, batches)


def test_text_without_images_is_packed_too(make, rows):
    texts = [
        {
            name: [{"role": m["role"], "content": m["content"][-1]["text"]} for m in row[name]]
            for name in ("prompt", "chosen", "rejected")
        }
        for row in rows
    ]
    stock, ours = (embedded(make, kind, Dataset.from_list(texts)) for kind in BOTH)
    batches = [next(iter(trainer.get_train_dataloader())) for trainer in (stock, ours)]
    assert ours.packs and "pixel_values" not in batches[0]
    assert_same_step(stock, ours, batches)


NOT_COMPARED = ("runtime", "per_second", "total_flos")


def logged(trainer):
    return [
        {
            name: value
            for name, value in entry.items()
            if not any(part in name for part in NOT_COMPARED)
        }
        for entry in trainer.state.log_history
    ]


def assert_same_run(stock, ours):
    """Every logged number within 1e-5, the adapter within 1e-4."""
    assert len(logged(stock)) == len(logged(ours)) > 0
    for expected, entry in zip(logged(stock), logged(ours), strict=True):
        assert entry == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert_same_adapter(stock, ours)


def assert_same_adapter(stock, ours):
    for (name, expected), parameter in zip(
        stock.model.named_parameters(), ours.model.named_parameters(), strict=True
    ):
        if expected.requires_grad:
            torch.testing.assert_close(parameter[1], expected, rtol=0, atol=1e-4, msg=name)


def test_a_whole_run_logs_and_ends_the_same(make, rows, processor, tmp_path):
    """With accumulation, evaluation, checkpointing and two workers; then resumed from its middle."""
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }
    settings |= {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 4,
        "dataloader_num_workers": 2,
        "save_steps": 2,
    }
    settings |= {"gradient_checkpointing": True, "eval_dataset": rows.select(range(40, 46))}
    trainers = [
        embedded(make, kind, rows, output_dir=tmp_path / kind.__name__, **settings) for kind in BOTH
    ]
    for trainer in trainers:
        trainer.train()
    assert_same_run(*trainers)
    assert logged(trainers[1])[0]["loss"] != pytest.approx(math.log(2), abs=1e-3)
    scenes = preferences.load(SETTINGS.dataset, "test[:8]")
    first, second = (
        answer(t.model, processor, scenes["image"], scenes["question"], SETTINGS, max_new_tokens=24)
        for t in trainers
    )
    assert first == second and len(set(first)) > 1

    resumed = embedded(
        make, SharedPrefixDPOTrainer, rows, output_dir=tmp_path / "resumed", **settings
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "SharedPrefixDPOTrainer" / "checkpoint-2"))
    assert_same_adapter(trainers[1], resumed)


def test_a_run_on_streamed_rows_is_the_same(make):
    streamed = chat.format_dataset(
        preferences.load(SETTINGS.dataset, "train[:48]").to_iterable_dataset()
    )
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    trainers = [embedded(make, kind, streamed, **settings) for kind in BOTH]
    for trainer in trainers:
        trainer.train()
    assert_same_run(*trainers)


def test_a_new_adapter_starts_at_ln_2_with_no_reward(make, rows):
    """Policy and reference then go through the same operations, so their difference is exactly zero."""
    trainer = embedded(make, SharedPrefixDPOTrainer, rows)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    loss, metrics, _ = step(trainer, trainer.data_collator(list(rows.select(range(8)))))
    assert loss == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["rewards/accuracies"] == metrics["rewards/margins"] == 0


def test_two_processes_log_the_same(tmp_path):
    """Four pairs a step, two in each process, and seven to evaluate; this file runs as the program of both (below)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
    place |= {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [
        subprocess.Popen(command, env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    stock, ours = (json.loads((tmp_path / f"{kind.__name__}.json").read_text()) for kind in BOTH)
    assert len(stock) == len(ours) == 4 and stock[0]["num_tokens"] > 500 and "eval_loss" in stock[2]
    for expected, entry in zip(stock, ours, strict=True):
        assert entry == pytest.approx(expected, rel=1e-5, abs=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": True,
    }
    pairs = chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:48]"))
    settings |= {
        "eval_dataset": pairs.select(range(40, 47)),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 2,
    }
    make_here = partial(make_trainer, models.load_processor(SETTINGS), None, sys.argv[1])
    for kind in BOTH:
        trainer = embedded(make_here, kind, pairs, learning_rate=1e-3, **settings)
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        if trainer.accelerator.is_main_process:
            with open(f"{sys.argv[1]}/{kind.__name__}.json", "w") as file:
                json.dump(logged(trainer), file)
    trainer.accelerator.end_training()  # a process may otherwise abort as it exits

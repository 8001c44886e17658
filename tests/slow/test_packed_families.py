"""The faster trainer against TRL's own in ten families of tiny models, and with their processors.

Every mistake that was thought of is planted, and must fail the comparison.
"""

from functools import partial

import families
import pytest
import torch
from both_trainers import (
    BOTH,
    LANGUAGE,
    assert_same_for_mixed_rows,
    assert_same_step,
    family_trainers,
    log_probs,
    make_trainer,
    randomize,
    same_to_the_last_bit,
    seen_by_the_vision_tower,
    step,
)
from mixed_rows import BATCHES, ROWS, TWO, dataset
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, Pair, tiny_batch, tiny_model

from utils import chat, shared_prefix, vision
from utils import families as utils_families
from utils.shared_prefix import PackedPairs

PAIRS = [Pair(7, 1, 5, 9), Pair(3, 2, 1, 20), Pair(12, 1, 13, 3)]
CASES = {
    "one pair": [Pair(5, 1, 4, 6)],
    "answers of 1 and of 200 tokens": [Pair(5, 1, 1, 200), Pair(5, 1, 200, 1), Pair(5, 1, 1, 1)],
    "prompts of very different length": [Pair(1, 1, 4, 6), Pair(60, 1, 7, 3)],
    "none, one and two images": [Pair(5, 0, 4, 6), Pair(4, 1, 3, 3), Pair(6, 2, 8, 2)],
    "no image at all": [Pair(5, 0, 4, 6), Pair(9, 0, 3, 3)],
}


@pytest.fixture
def make(processor, tmp_path):
    return partial(make_trainer, processor, tmp_path)


CHOSEN = 1  # the branches of a packed row
REJECTED = 2
ONE_PAIR_A_ROW = "one pair a row"
ONE_ROW = "all pairs in one row"


@pytest.fixture(params=[ONE_PAIR_A_ROW, ONE_ROW])
def sharing(request, monkeypatch):
    """How many pairs share a row, whatever would compute least."""

    def groups_in_rows(lengths, _width):
        return [len(lengths)] if request.param == ONE_ROW else [1] * len(lengths)

    monkeypatch.setattr(shared_prefix, "groups_in_rows", groups_in_rows)
    return request.param


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_equal_to_the_last_bit_with_a_float64_body(family, make):
    stock, ours = (make(kind, tiny_model(family)) for kind in BOTH)
    stock.model.double()
    ours.model.double()
    batches = tiny_batch(tiny_model(family), PAIRS)
    expected = log_probs(stock, batches[0])
    assert torch.equal(log_probs(ours, batches[1]), expected)
    assert ours.packs
    assert expected.min() < -5


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_same_in_every_family(family, make):
    stock, ours = (make(kind, tiny_model(family)) for kind in BOTH)
    assert_same_step(stock, ours, tiny_batch(tiny_model(family), PAIRS))


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_same_in_hard_cases(family, case, make):
    """With a float64 body: in float32 the sum of 200 log-probabilities alone is known to 1e-5."""
    stock, ours = (make(kind, tiny_model(family)) for kind in BOTH)
    stock.model.double()
    ours.model.double()
    batches = tiny_batch(tiny_model(family), CASES[case])
    assert assert_same_step(stock, ours, batches)["loss"] == 0


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_step_on_mixed_rows_is_the_same_in_every_family(name, tmp_path):
    """With the family's own processor and collator, which no row without an image may upset."""
    trainers = family_trainers(name, tmp_path)
    for rows in BATCHES.values():
        assert_same_for_mixed_rows(trainers, list(chat.format_dataset(dataset(rows))))
    row = chat.format_dataset(dataset([TWO]))[0]
    other = {**row, "images": row["images"][::-1]}
    logps = [log_probs(trainers[1], trainers[1].data_collator([one])) for one in (row, other)]
    assert (logps[0].sum(1) - logps[1].sum(1)).abs().min() > 1e-3


@pytest.mark.parametrize("name", families.FAMILIES)
def test_training_and_inference_prompts_of_mixed_rows_are_the_same_in_every_family(name):
    processor = utils_families.complete_template(families.make_processor(families.FAMILIES[name]))
    for row in chat.format_dataset(dataset(ROWS)):
        if name == "Gemma 3" and row["prompt"][0]["role"] == "system":
            continue  # this template, unlike the real one, refuses a system turn
        assert bool(chat.check_tokens(row, processor)["image_tokens"]) == bool(row["images"])
        expected = chat.training_batch([row], processor)["input_ids"].shape[1]
        assert chat.count_tokens(row, processor) == expected


@pytest.mark.parametrize(
    ("images", "max_length", "left"),
    [(1, 30, [16, 5, 16, 21]), (1, 14, [0, 5, 0, 5]), (0, 4, [0, 0, 0, 0])],
)
def test_a_step_is_the_same_with_answers_cut_short_or_off(images, max_length, left, make):
    pairs = [Pair(9, images, 30, 40), Pair(4, images, 5, 30)]
    batches = tiny_batch(tiny_model("smolvlm"), pairs, max_length=max_length)
    assert batches[0]["completion_mask"].sum(1).tolist() == left
    stock, ours = (make(kind, tiny_model("smolvlm")) for kind in BOTH)
    assert_same_step(stock, ours, batches)


def test_identical_answers_get_identical_log_probabilities(make):
    """With a float64 body: in float32 the last bit decides which of two equal rewards is higher.

    The gradients are zero.
    """
    stock, ours = (make(kind, tiny_model("qwen3_vl")) for kind in BOTH)
    stock.model.double()
    ours.model.double()
    batches = tiny_batch(tiny_model("qwen3_vl"), [Pair(5, 1, 7, 7), Pair(3, 1, 4, 4)])
    for batch in batches:
        batch["input_ids"][2:] = batch["input_ids"][:2]
    loss, metrics, _ = step(stock, batches[0])
    our_loss, our_metrics, gradients = step(ours, batches[1])
    assert our_loss == loss
    assert our_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    assert max(gradient.abs().max() for gradient in gradients.values()) < 1e-7
    chosen, rejected = log_probs(ours, batches[1]).chunk(2)
    assert torch.equal(chosen, rejected)
    assert chosen.any()


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
    assert not vision.vision_is_fixed(shared_prefix.backbone_of(ours.model))
    assert_same_step(stock, ours, tiny_batch(tiny_model(family), PAIRS))


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl", "gemma3"])
def test_a_step_is_the_same_with_eager_attention(family, make):
    stock, ours = (make(kind, tiny_model(family, attention="eager")) for kind in BOTH)
    assert_same_step(stock, ours, tiny_batch(tiny_model(family), PAIRS))


def test_a_step_is_the_same_for_a_second_round_on_an_adapter(make):
    """The reference is then the adapter as it was ("ref")."""
    trainers = []
    for kind in BOTH:
        adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LANGUAGE)
        model = get_peft_model(tiny_model("qwen2_vl"), adapter)
        randomize(model)
        trainer = make(kind, model, lora=None)
        assert list(trainer.model.peft_config) == ["default", "ref"]
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name:
                parameter.data += 0.05
        trainers.append(trainer)
    assert_same_step(*trainers, tiny_batch(tiny_model("qwen2_vl"), PAIRS))


@pytest.mark.parametrize("trained", ["", "language_model"])
def test_a_step_is_the_same_in_full_fine_tuning(trained, make):
    """Of everything, and of the language model alone. The reference is a model of other weights."""
    trainers = []
    for kind in BOTH:
        model = tiny_model("llava")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        trainers.append(make(kind, model, lora=None, ref_model=tiny_model("llava", seed=5)))
    assert_same_step(*trainers, tiny_batch(tiny_model("llava"), PAIRS))


LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero "
    "apo_down discopop sft sigmoid_norm"
)


@pytest.mark.parametrize(
    "settings",
    [
        *({"loss_type": [loss]} for loss in LOSSES.split()),
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 1.0]},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"f_divergence_type": "js_divergence"},
    ],
    ids=str,
)
def test_a_step_is_the_same_for_every_loss(settings, make):
    settings = {"label_smoothing": 0.1, "beta": 0.02, **settings}
    stock, ours = (make(kind, tiny_model("idefics3"), **settings) for kind in BOTH)
    assert_same_step(stock, ours, tiny_batch(tiny_model("idefics3"), PAIRS))


def test_metrics_of_an_evaluation_with_outputs_are_the_same(make):
    results = []
    batches = tiny_batch(tiny_model("qwen2_5_vl"), PAIRS)
    for kind, batch in zip(BOTH, batches, strict=True):
        trainer = make(kind, tiny_model("qwen2_5_vl"))
        trainer.model.eval()
        with pytest.warns(FutureWarning, match="return_outputs"):
            loss, logits, _ = trainer.prediction_step(
                trainer.model, dict(batch), prediction_loss_only=False
            )
        metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
        results.append((loss.item(), logits, metrics))
    (loss, logits, metrics), (our_loss, our_logits, our_metrics) = results
    assert our_loss == pytest.approx(loss, abs=1e-6)
    assert our_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    assert torch.equal(our_logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_vision_tower_sees_each_image_once_with_checkpointing(family, make):
    """Stock: all images twice in each forward, and again to recompute what checkpointing let go."""
    stock, ours = (make(kind, tiny_model(family), gradient_checkpointing=True) for kind in BOTH)
    stock_batch, batch = tiny_batch(tiny_model(family), PAIRS)
    forwards, once, backwards = seen_by_the_vision_tower(ours, batch)
    assert (forwards, backwards) == (1, 0)
    expected = (3, 3 * 2 * once, 1)
    if family == "qwen3_vl":  # its patches get no hook that asks for gradients: nothing recomputed
        expected = (2, 2 * 2 * once, 0)
    assert seen_by_the_vision_tower(stock, stock_batch) == expected


def test_a_trained_vision_tower_sees_each_image_once_per_forward(make):
    stock, ours = (make(kind, tiny_model("idefics2"), "all-linear") for kind in BOTH)
    stock_batch, batch = tiny_batch(tiny_model("idefics2"), PAIRS)
    forwards, size, _ = seen_by_the_vision_tower(ours, batch)
    assert forwards == 2
    assert seen_by_the_vision_tower(stock, stock_batch)[:2] == (2, 2 * size)


# Where the answers cannot share a row


def test_a_prompt_that_sees_ahead_runs_as_two_rows_and_shares_the_images(make):
    stock, ours = (make(kind, tiny_model("paligemma")) for kind in BOTH)
    batches = tiny_batch(tiny_model("paligemma"), [Pair(5, 1, 4, 6), Pair(3, 1, 2, 3)])
    assert same_to_the_last_bit(stock, ours, batches)
    forwards, _, backwards = seen_by_the_vision_tower(ours, batches[1])
    assert (forwards, backwards) == (1, 0)


@pytest.mark.parametrize(("window", "packs"), [(32, False), (33, True)])
def test_rows_longer_than_a_sliding_window_run_as_two(window, packs, make):
    """The longest row has 33 tokens. A packed row may be longer: tokens see only their own row."""
    stock, ours = (make(kind, tiny_model("gemma3", sliding_window=window)) for kind in BOTH)
    batches = tiny_batch(tiny_model("gemma3"), PAIRS)
    assert batches[0]["input_ids"].shape[1] == 33
    if packs:
        assert not same_to_the_last_bit(stock, ours, batches)
    else:
        with pytest.warns(UserWarning, match="sliding window"):
            assert same_to_the_last_bit(stock, ours, batches)


# Teeth: each of these mistakes must fail the comparison above.


def wrong_mask(change):
    def plant(monkeypatch, _trainer):
        right = PackedPairs.mask

        def mask(pairs, attention, dtype, token_type_ids=None):
            branch = pairs.branch
            pairs.branch = change(branch)
            made = right(pairs, attention, dtype, token_type_ids)
            pairs.branch = branch
            return made

        monkeypatch.setattr(PackedPairs, "mask", mask)

    return plant


def positions_run_on(monkeypatch, _trainer):
    right = PackedPairs.pack

    def pack(pairs, rows):
        packed = right(pairs, rows)
        if torch.equal(rows[0], torch.arange(rows.shape[1])):
            return torch.arange(packed.shape[1]).expand_as(packed)
        return packed

    monkeypatch.setattr(PackedPairs, "pack", pack)


def one_position_per_token(monkeypatch, trainer):
    def flat(input_ids, **_rest):
        return torch.arange(input_ids.shape[1]).expand(3, *input_ids.shape), None

    monkeypatch.setattr(shared_prefix.backbone_of(trainer.model), "get_rope_index", flat)


def no_image_blocks(monkeypatch, _trainer):
    right = PackedPairs.mask

    def mask(pairs, attention, dtype, _token_type_ids=None):
        return right(pairs, attention, dtype)

    monkeypatch.setattr(PackedPairs, "mask", mask)


def features_of_a_trained_tower_shared(monkeypatch, _trainer):
    monkeypatch.setattr(vision, "vision_is_fixed", lambda _backbone: True)


def first_of(branch, value):
    """True at the first place of each row that has this value."""
    return (branch == value) & ((branch == value).cumsum(1) == 1)


def first_rejected_token_predicted_by_the_chosen_answer(monkeypatch, _trainer):
    right = PackedPairs.__init__

    def init(pairs, *arguments):
        right(pairs, *arguments)
        is_repeated_token = first_of(pairs.branch, REJECTED)
        pairs.predicted_at -= is_repeated_token[pairs.predicted_in, pairs.predicted_at].int()

    monkeypatch.setattr(PackedPairs, "__init__", init)


def chosen_token_counts_twice(branch):
    return branch * ~first_of(branch, CHOSEN)


MISTAKES = {
    "the rejected answer sees the chosen one": ("llava", wrong_mask(torch.zeros_like)),
    "the last prompt token counts twice": ("smolvlm", wrong_mask(chosen_token_counts_twice)),
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

"""TRL's trainer and ours side by side: the same batch, the same weights, LoRA's B at random.

With B at zero every mistake would hide behind a loss of ln 2.
"""

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, make_processor, write_checkpoint
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForImageTextToText, PrinterCallback
from trl import DPOConfig, DPOTrainer

from utils import chat, families, models, shared_prefix
from utils.settings import PROFILES
from utils.shared_prefix import SharedPrefixDPOTrainer

SETTINGS = PROFILES["embedded"]
BOTH = (DPOTrainer, SharedPrefixDPOTrainer)
LANGUAGE = r".*(text_model|language_model)\..*(q|k|v|o|gate|up|down)_proj"


def one_row():
    row = {
        "images": [Image.new("RGB", (64, 64), "red")],
        "prompt": chat.prompt_messages("What is this?"),
        "chosen": chat.answer_messages("A cup."),
        "rejected": chat.answer_messages("A dog."),
    }
    return Dataset.from_list([row])


def make_trainer(
    processor,
    output,
    kind,
    model,
    lora=LANGUAGE,
    train_dataset=None,
    eval_dataset=None,
    ref_model=None,
    data_collator=None,
    **changes,
):
    """Return a trainer of class `kind` as it is during `train`, always with the same adapter."""
    settings = {
        "output_dir": output,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_length": None,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    if train_dataset is None:
        train_dataset = one_row()
    peft_config = None
    if lora:
        peft_config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=lora)
    trainer = kind(
        model=model,
        args=DPOConfig(**settings | changes),
        processing_class=processor,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        ref_model=ref_model,
        data_collator=data_collator,
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    randomize(trainer.model)
    trainer.model.train()
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer


def randomize(model, size=0.2):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad and "lora_" in name:
            parameter.data.normal_(0, size, generator=generator)


def embedded_trainer(processor, output, kind, rows, **changes):
    """Return a trainer of the embedded model in 4 bit, with an adapter that lets it still speak."""
    model = models.load_model(SETTINGS)
    trainer = make_trainer(
        processor, output, kind, model, SETTINGS.lora_target, train_dataset=rows, **changes
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL casts the adapter of a 4-bit model to bfloat16
            parameter.data = parameter.data.float()
    randomize(trainer.model, 0.03)
    return trainer


def family_trainers(name, folder):
    """Return TRL's trainer and ours of a tiny model of the family with its own processor.

    The body is float64, so that only rounding to float32 at the end makes log-probabilities differ.
    """
    write_checkpoint(FAMILIES[name], folder)
    processor = families.complete_template(make_processor(FAMILIES[name]))
    trainers = []
    for kind in BOTH:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        trainer = make_trainer(processor, folder / "run", kind, model.requires_grad_(False))
        trainer.model.double()
        trainers.append(trainer)
    return trainers


def assert_same_for_mixed_rows(trainers, rows):
    """A step on the batch is the same in both, and each row has what it has in a batch alone."""
    stock, ours = trainers
    batches = [stock.data_collator([dict(row) for row in rows]), ours.collate(rows)]
    images = assert_same_batch(*batches)
    assert bool(images) == any(row["images"] for row in rows)
    assert_same_step(*trainers, batches)
    assert_same_step(*trainers, [batches[0], ours.data_collator(rows)])  # in another order
    for trainer, batch in zip(trainers, batches, strict=True):
        alone = []
        for row in rows:
            one = trainer.data_collator([dict(row)])
            alone.append(log_probs(trainer, one).sum(1))
        together = log_probs(trainer, batch).sum(1).view(2, -1)
        assert together.max() < -5
        torch.testing.assert_close(together, torch.stack(alone, dim=1), rtol=0, atol=1e-4)


def step(trainer, batch):
    """Return loss, logged metrics and gradients of one batch."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    gradients = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    return loss.item(), metrics, gradients


def assert_same_step(stock, ours, batches):
    """Loss within 1e-6, logged metrics within 1e-5, every gradient within 1e-4 of its length.

    Metrics above 1 are compared relative to their size. A gradient 1,000 times shorter than the
    longest is compared with that thousandth: some are zero but for rounding, since the bias of a
    key shifts all scores alike. Returns the differences.
    """
    loss, metrics, gradients = step(stock, batches[0])
    our_loss, our_metrics, our_gradients = step(ours, batches[1])
    assert gradients
    assert gradients.keys() == our_gradients.keys()
    lengths = {name: gradient.norm() for name, gradient in gradients.items()}
    floor = max(1e-12, *(length / 1000 for length in lengths.values()))
    worst = 0
    for name, gradient in gradients.items():
        off = (our_gradients[name] - gradient).norm() / lengths[name].clamp(min=floor)
        worst = max(worst, off.item())
    assert our_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    assert our_loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert worst < 1e-4
    return {
        "loss": abs(our_loss - loss),
        "metrics": max(abs(our_metrics[name] - metrics[name]) for name in metrics),
        "gradients": worst,
    }


def same_to_the_last_bit(stock, ours, batches):
    return set(assert_same_step(stock, ours, batches).values()) == {0.0}


def log_probs(trainer, batch):
    """Return the policy's log-probabilities per token, (2n, T - 1)."""
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    inputs["labels"] = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        if isinstance(trainer, SharedPrefixDPOTrainer):
            return trainer.run(trainer.model, **inputs, fused_lm_head=True).log_probs
        return trainer.model(**inputs, fused_lm_head=True).log_probs


def seen_by_the_vision_tower(trainer, batch):
    """Return what the tower's first linear layer does in a step: (forwards, numbers, backwards)."""
    backbone = shared_prefix.backbone_of(trainer.model)
    language = set(backbone.get_decoder().modules())
    layers = [
        module
        for module in backbone.modules()
        if isinstance(module, torch.nn.Linear) and module not in language
    ]
    sizes = []
    backwards = []

    def count_forward(_module, inputs, _output):
        sizes.append(inputs[0].numel())

    def count_backward(*_):
        backwards.append(1)

    hooks = [
        layers[0].register_forward_hook(count_forward),
        layers[0].register_full_backward_hook(count_backward),
    ]
    step(trainer, batch)
    for hook in hooks:
        hook.remove()
    return len(sizes), sum(sizes), len(backwards)


def assert_same_batch(stock, ours):
    """Text bit for bit; images once, and bit for bit when repeated. Returns how many images."""
    assert list(stock) == list(ours)
    for name, value in stock.items():
        again = ours[name]
        if name not in (*shared_prefix.TEXT_TENSORS, "completion_mask"):
            again = torch.cat([again, again])
        assert torch.equal(value, again), name
        assert value.dtype == again.dtype, name
    return len(ours["pixel_values"]) if "pixel_values" in ours else 0


NOT_COMPARED = ("runtime", "per_second", "total_flos")


def logged(trainer):
    """Return the trainer's log without what depends on the clock."""
    entries = []
    for entry in trainer.state.log_history:
        kept = {}
        for name, value in entry.items():
            if not any(part in name for part in NOT_COMPARED):
                kept[name] = value
        entries.append(kept)
    return entries


def assert_same_run(stock, ours):
    """Every logged number within 1e-5, the adapter within 1e-4."""
    assert len(logged(stock)) == len(logged(ours)) > 0
    for expected, entry in zip(logged(stock), logged(ours), strict=True):
        assert entry == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert_same_adapter(stock, ours)


def assert_same_adapter(stock, ours):
    ours = dict(ours.model.named_parameters())
    for name, expected in stock.model.named_parameters():
        if expected.requires_grad:
            torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-4, msg=name)

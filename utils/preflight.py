"""Check a trainer before a long run. Takes seconds and leaves the trainer unchanged."""

import dataclasses
import inspect
import itertools
import math
import random
import shutil
import tempfile
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import bitsandbytes as bnb
import numpy
import psutil  # comes with accelerate
import torch
from packaging.requirements import Requirement
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from utils import chat, memory, versions
from utils.models import trainable_by_part
from utils.settings import ROOT
from utils.shared_prefix import balanced_order
from utils.vision import backbone_of

OK = "ok"
WARNING = "warning"
FAILED = "failed"
LOWEST_RATE = 5e-6  # below it, an adapter hardly moves in a run of the usual length
HIGHEST_RATE = 1e-3  # above it, an adapter is ruined
ROWS = 8  # at least this many rows are looked at


def check(trainer, parts=("language",)):
    """Return what is right and wrong about `trainer`, a `DPOTrainer`, before `trainer.train()`.

    One training step on the longest rows is computed and undone. An error in it becomes a row too.
    The token budget and the memory estimate need the profile in `trainer.settings`, which
    `training.make_trainer` sets.

    Args:
        parts: the parts of the model that are meant to train, keys of `models.trainable_by_part`.

    Returns:
        A list of {"check", "result": OK, WARNING or FAILED, "found", "what to do"}.
    """
    rows = [
        check_versions(),
        check_device(trainer),
        check_precision(trainer),
        check_learning_rate(trainer),
        check_trainable_weights(trainer, parts),
        check_adapter(trainer),
        check_disk(trainer),
    ]
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        rows.append(check_images_of_every_process(trainer))
        found = "not computed: the model is sharded across processes"
        rows.append(finding("one step", WARNING, found, "run preflight in one process as well"))
        return rows
    try:
        with left_as_it_was(trainer):
            # One by one, so that the rows before an error are kept.
            for row in check_one_step(trainer):
                rows.append(row)
    except Exception as error:  # whatever it is, it would stop the training too
        found = f"{type(error).__name__}: {str(error).strip()[:300]}"
        advice = "see the failed rows above, or run trainer.train() for the whole error"
        rows.append(finding("one step", FAILED, found, advice))
    return rows


def as_text(rows):
    """Return the rows of `check` as text for a terminal, with the advice below each finding."""
    lines = []
    for row in rows:
        lines.append(f"{row['result']:<8}{row['check']}: {row['found']}")
        if row["what to do"]:
            lines.append(f"{'':<8}→ {row['what to do']}")
    return "\n".join(lines)


def finding(name, result, found, advice=""):
    """Return one row of `check`. What is OK needs no advice."""
    if result == OK:
        advice = ""
    return {"check": name, "result": result, "found": found, "what to do": advice}


def some_of(names):
    """Return the first two of `names` as text, and how many more there are."""
    text = ", ".join(names[:2])
    if len(names) > 2:
        text += f" and {len(names) - 2} more"
    return text


# What a trainer shows without running.


def check_versions():
    """Compare the installed packages with requirements.txt."""
    needed = []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        # Colab brings its own notebook, so a missing JupyterLab is fine.
        if not line.startswith(("#", "jupyterlab")):
            needed.append(Requirement(line))
    unsuitable = []
    for need in needed:
        try:
            installed = version(need.name)
        except PackageNotFoundError:
            unsuitable.append(f"{need} is missing")
            continue
        if not need.specifier.contains(installed, prereleases=True):
            unsuitable.append(f"{need}, here {installed}")
    if unsuitable:
        advice = "install requirements.txt, then restart Python"
        return finding("versions", FAILED, "; ".join(unsuitable), advice)
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    found = versions(*names)
    return finding("versions", OK, ", ".join(f"{name} {found[name]}" for name in names))


def check_device(trainer):
    """Check whether an available GPU is used, and whether the model is small enough without one."""
    device = trainer.args.device
    if device.type == "cuda":
        return finding("device", OK, torch.cuda.get_device_name(device))
    if torch.cuda.is_available():
        found = f"{device.type}, although there is a GPU"
        return finding("device", WARNING, found, "use_cpu=False")
    weights = sum(parameter.numel() for parameter in trainer.model.parameters())
    result = WARNING if weights > 1e9 else OK
    advice = f"use a GPU: this model has {weights / 1e9:.1f} billion weights"
    return finding("device", result, device.type, advice)


def check_precision(trainer):
    """Check that the device supports the compute type and that small updates are not lost."""
    args = trainer.args
    gpu = args.device.type == "cuda"
    trained_types = set()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            trained_types.add(parameter.dtype)
    computed = "float32"
    if args.bf16:
        computed = "bfloat16"
    elif args.fp16:
        computed = "float16"
    kept = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in trained_types))
    found = f"computes in {computed}, trains weights in {kept or 'nothing'}"
    keep_float32 = "keep what trains in float32: training.make_trainer does it"

    if args.bf16 and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        found += "; this GPU only emulates bfloat16, slowly"
        return finding("precision", FAILED, found, "bf16=False, fp16=True")
    if args.fp16 and torch.float16 in trained_types:
        return finding("precision", FAILED, f"{found}, where gradients overflow", keep_float32)
    if trained_types & {torch.float16, torch.bfloat16}:
        return finding("precision", WARNING, f"{found}, where small updates vanish", keep_float32)
    if (args.bf16 or args.fp16) != gpu:
        advice = "bf16=True or fp16=True" if gpu else "bf16=False, fp16=False"
        return finding("precision", WARNING, f"{found}, which is slow here", advice)
    return finding("precision", OK, found)


def check_learning_rate(trainer):
    """Check the learning rate. An adapter needs one about a hundred times that of full tuning."""
    rate = trainer.args.learning_rate
    if not isinstance(trainer.model, PeftModel):
        result = WARNING if rate > LOWEST_RATE else OK
        return finding("learning rate", result, f"{rate:g}, without an adapter", "about 1e-6")
    advice = "1e-5 to 1e-4, 3e-4 for a very small model"
    if rate < LOWEST_RATE:
        found = f"{rate:g} is for training all weights; an adapter hardly moves"
        return finding("learning rate", FAILED, found, advice)
    result = WARNING if rate > HIGHEST_RATE else OK
    return finding("learning rate", result, f"{rate:g}", advice)


def check_trainable_weights(trainer, parts):
    """Check that weights train in `parts` of the model only, and with an adapter only its own."""
    name = "trainable weights"
    counts = {}
    for part, (trainable, _) in trainable_by_part(trainer.model).items():
        counts[part] = trainable
    if not any(counts.values()):
        return finding(name, FAILED, "none", "peft_config=training.lora_config(settings)")
    found = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    wrong = [part for part, count in counts.items() if count and part not in parts]
    if wrong:
        found += f": {' and '.join(wrong)} would change too"
        advice = (
            "target_modules=settings.lora_target; if it is intended, "
            f"preflight.check(trainer, parts={(*parts, *wrong)})"
        )
        return finding(name, FAILED, found, advice)
    if isinstance(trainer.model, PeftModel):
        stray = []
        for parameter_name, parameter in trainer.model.named_parameters():
            of_adapter = "lora_" in parameter_name or "modules_to_save" in parameter_name
            if parameter.requires_grad and not of_adapter:
                stray.append(parameter_name)
        if stray:
            found += f"; not the adapter's: {some_of(stray)}"
            advice = (
                "model.requires_grad_(False) before the trainer is made: "
                "the reference would change with them"
            )
            return finding(name, FAILED, found, advice)
    return finding(name, OK, found)


def check_adapter(trainer):
    """Check that the model carries exactly one adapter and that the trainer made it."""
    model = trainer.model
    if not isinstance(model, PeftModel):
        return finding("one adapter", OK, "none")
    base = model.get_base_model()
    adapters = list(model.peft_config)
    layers = [name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    targeted = getattr(model.base_model, "targeted_module_names", layers)
    foreign = sorted(set(layers) - set(targeted))

    problem = ""
    if isinstance(base, PeftModel):
        problem = "one adapter wraps another"
    elif not set(adapters) <= {"default", "ref"}:
        problem = f"adapters {', '.join(adapters)}"
    elif "ref" in adapters and not has_moved(model):
        # TRL copies the adapter that it is given. A copy is right for one that was trained before.
        problem = "the reference is a copy of a new adapter, not the model itself"
    elif foreign:
        problem = (
            f"{len(foreign)} layers carry an adapter that target_modules does not name: "
            f"{some_of(foreign)}"
        )
    if problem:
        advice = "load the model again without get_peft_model: the trainer wraps it, by peft_config"
        return finding("one adapter", FAILED, f"left-over get_peft_model: {problem}", advice)
    found = f"on {len(layers)} layers"
    if "ref" in adapters:
        found += "; the reference is a frozen copy of it"
    return finding("one adapter", OK, found)


def has_moved(model):
    """Return whether an adapter of `model` differs from a new one, whose matrices B are zero."""
    return any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)


def check_disk(trainer):
    """Check that checkpoints can be written and that there is room for all that exist at once."""
    args = trainer.args
    output = Path(args.output_dir).resolve()
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        found = f"{args.output_dir} cannot be written: {error.strerror}"
        return finding("checkpoints", FAILED, found, "choose another output_dir")

    steps = args.max_steps
    if steps <= 0:
        pairs = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = math.ceil(len(trainer.train_dataset) * args.num_train_epochs / pairs)
    count = 0
    if args.save_strategy != "no":
        count = math.ceil(steps / max(1, args.save_steps))
    if args.save_total_limit:
        # The oldest checkpoint is deleted only after the next one is complete.
        count = min(count, args.save_total_limit + 1)
    trained = 0
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
    adapter_bytes = 4 * trained
    checkpoint_bytes = 3 * adapter_bytes  # with AdamW's two moments
    needed = count * checkpoint_bytes + adapter_bytes
    free = shutil.disk_usage(place).free
    found = (
        f"{count} of {memory.readable(checkpoint_bytes)} at a time, then the adapter; "
        f"{memory.readable(free)} free"
    )
    advice = "a smaller save_total_limit, or an output_dir elsewhere"
    return finding("checkpoints", FAILED if needed > free else OK, found, advice)


def check_images_of_every_process(trainer):
    """Check that no process of a sharded run skips the vision tower while another one runs it.

    Each layer of the tower is put together from the parts of all processes, so all must come to it.
    """
    name = "images"
    if not hasattr(trainer.train_dataset, "__len__"):
        return finding(name, WARNING, "a stream: not looked at", "every row needs an image")
    texts = stored_texts(trainer)
    without = sum(chat.places_of(row["prompt"]) == 0 for row in texts)
    found = f"{without} of {len(texts)} rows have none"
    if without in (0, len(texts)):
        return finding(name, OK, found)
    advice = (
        "drop these rows, or do not shard: a process without an image in its batch "
        "would leave the others waiting in the vision tower"
    )
    return finding(name, FAILED, found, advice)


# What one training step shows.


def check_one_step(trainer):
    """Yield the rows that need batches, each as soon as it is known: what follows may raise."""
    processor = trainer.processing_class
    settings = getattr(trainer, "settings", None)
    limit = max_length(trainer)
    pairs = longest_rows(trainer)
    lengths = [chat.count_tokens(without_reference(pair), processor) for pair in pairs]
    yield check_row_length(settings, trainer, lengths)

    some = pairs[: trainer.args.per_device_train_batch_size]
    own_batch = trainer_batch(trainer, some)
    trl_batch = collated_by_trl(trainer, in_batch_order(trainer, some))
    yield check_max_length(limit, max(lengths), trl_batch["completion_mask"].sum(1))

    tokens = (trl_batch["input_ids"] == chat.image_token_id(processor)).sum(1)
    yield check_image_tokens(int(tokens.sum()), count_features(trainer, trl_batch), limit)
    # The estimate adds one image.
    images = max(len(without_reference(pair)["images"]) for pair in some)
    image_tokens = int(tokens.max()) // max(1, images)
    yield check_memory(settings, trainer, max(1, max(lengths) - image_tokens))

    used = reference_logps(trainer, own_batch)
    yield check_reference(trainer, used, adapter_off_logps(trainer, trl_batch))

    loss, log_ratio, largest_gradients = compute_step(trainer, own_batch)
    yield check_first_loss(trainer, loss, log_ratio)
    yield check_gradients(trainer, largest_gradients)


@contextmanager
def left_as_it_was(trainer):
    """Let one process compute a loss as in training, then restore all but the weights.

    Gradients, train and eval modes, metrics and random states are afterwards what they were.
    The weights must not be changed.
    """
    model = trainer.model
    accelerator = trainer.accelerator
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    metrics = trainer._metrics
    total_tokens = trainer._total_train_tokens
    python_state = random.getstate()
    numpy_state = numpy.random.get_state()
    # train() switches checkpointing on, so it may still be off.
    checkpointing = trainer.args.gradient_checkpointing and not model.is_gradient_checkpointing
    with torch.random.fork_rng():
        try:
            trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
            # Other processes compute no loss now: gathering metrics would wait for them forever.
            accelerator.gather = lambda values: values
            accelerator.gather_for_metrics = lambda values: values
            model.zero_grad(set_to_none=True)
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
            yield
        finally:
            if checkpointing:
                model.gradient_checkpointing_disable()
            for module, mode in modes:
                module.training = mode
            for parameter, gradient in gradients:
                parameter.grad = gradient
            del accelerator.gather
            del accelerator.gather_for_metrics
            trainer._metrics = metrics
            trainer._total_train_tokens = total_tokens
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)


def longest_rows(trainer):
    """Return about the longest training rows, longest first. Of a stream, the first rows.

    As many as a device takes in a micro-batch, at least ROWS. ValueError when they have no column
    of images.
    """
    dataset = trainer.train_dataset
    count = max(ROWS, trainer.args.per_device_train_batch_size)
    if not trainer._is_vision_dataset:
        raise ValueError("the rows have no column images: use chat.format_dataset")
    if not hasattr(dataset, "__len__"):
        return list(itertools.islice(iter(dataset), count))
    numbers = chat.longest_first(stored_texts(trainer))
    return [dataset[number] for number in numbers[:count]]


def stored_texts(trainer):
    """Return the messages of the training rows as a `Dataset`. No image is read."""
    rows = trainer.train_dataset
    if hasattr(rows, "datasets"):
        rows = rows.datasets[0]  # a reference cache stacks its log-probabilities beside them
    return chat.stored_texts(rows)


def without_reference(row):
    """Return a copy of `row` without the log-probabilities that a reference cache adds."""
    return dict(row[0] if isinstance(row, tuple) else row)


def max_length(trainer):
    """Return how many tokens of a row the collator keeps, None for all of them."""
    return getattr(trainer.data_collator, "max_length", trainer.args.max_length)


def trainer_batch(trainer, rows):
    """Return the batch that the trainer's collator makes of `rows`, on the trainer's device."""
    # The collator changes the rows it is given, so it gets copies.
    copies = [row if isinstance(row, tuple) else dict(row) for row in rows]
    return trainer._prepare_inputs(dict(trainer.data_collator(copies)))


def in_batch_order(trainer, rows):
    """Return `rows` in the order in which the trainer's own collator brings them."""
    if not hasattr(trainer, "collate"):  # TRL's trainer, or rows without a column of images
        return rows
    order = balanced_order([without_reference(row) for row in rows])
    return [rows[number] for number in order]


def collated_by_trl(trainer, rows):
    """Return the batch that TRL's own collator makes of `rows`. It holds every image twice."""
    collate = DataCollatorForVisionPreference(trainer.processing_class, max_length(trainer))
    batch = collate([without_reference(row) for row in rows])
    return trainer._prepare_inputs(dict(batch))


@torch.no_grad()
def count_features(trainer, batch):
    """Return how many vectors the model makes of the images in `batch`, TRL's own."""
    if "pixel_values" not in batch:
        return 0
    encode = backbone_of(trainer.model).get_image_features
    inputs = {name: batch[name] for name in inspect.signature(encode).parameters if name in batch}
    with trainer.accelerator.autocast():
        output = encode(**inputs)
    features = getattr(output, "pooler_output", output)
    if not isinstance(features, list | tuple):
        features = [features]
    return sum(vectors.shape[:-1].numel() for vectors in features)


def reference_logps(trainer, batch):
    """Return the reference's log-probabilities (2 · pairs,) in nats, chosen answers first.

    They come from where the trainer takes them: the cache, or the reference model.
    """
    if "ref_chosen_logps" in batch:
        logps = (batch["ref_chosen_logps"], batch["ref_rejected_logps"])
    else:
        logps = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    return torch.cat(logps).float()


@torch.no_grad()
def adapter_off_logps(trainer, batch):
    """Return the log-probabilities (2 · pairs,) of the model with its adapter off, in nats.

    They are computed as TRL does it, from TRL's own `batch`.
    """
    # The model stays in train mode: one forward in eval mode would make bitsandbytes repack 4-bit
    # layers on some CPUs, which nothing undoes. TRL's fused head never holds the logits of the
    # whole vocabulary at once, so this check needs no more memory than training does.
    model = trainer.model
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    adapter_off = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    with trainer.accelerator.autocast(), adapter_off:
        output = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
    return output.log_probs.float().sum(1)


def compute_step(trainer, batch):
    """Compute the loss of the trainer's `batch` and its gradients.

    Returns:
        The loss; the log-ratio, log π_policy − log π_reference in nats, for whichever of the chosen
        and rejected answers its mean is larger; and {name: largest absolute gradient} of the
        tensors that train, None where no gradient arrives.
    """
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, dict(batch))
    # Training in float16 scales the loss as well, or small gradients become 0.
    scale = 1024 if trainer.args.fp16 else 1
    (loss * scale).backward()
    log_ratios = []
    for side in ("chosen", "rejected"):
        log_ratios.append(trainer._metrics["train"][f"rewards/{side}"][-1] / trainer.beta)
    largest = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            largest[name] = None
        elif parameter.requires_grad:
            largest[name] = parameter.grad.abs().max().item()
    return loss.item(), max(log_ratios, key=abs), largest


def check_row_length(settings, trainer, lengths):
    """Compare the `lengths` of rows in tokens with the profile's budget."""
    name = "row length"
    found = f"the first {len(lengths)} rows"
    if hasattr(trainer.train_dataset, "__len__"):
        found = f"the {len(lengths)} longest of {len(trainer.train_dataset):,} rows"
    found += f" have up to {max(lengths)} tokens"
    if settings is None:
        advice = "trainer.settings = settings, your profile"
        return finding(name, WARNING, f"{found}; no token budget is known", advice)
    over = sum(length > settings.token_budget for length in lengths)
    if over:
        found += f"; {over} are over the budget of {settings.token_budget}"
        advice = "drop them with chat.within_budget(rows, processor, settings.token_budget)"
        return finding(name, FAILED, found, advice)
    return finding(name, OK, f"{found}; the budget is {settings.token_budget}")


def check_max_length(limit, longest, answer_lengths):
    """Check whether `limit` cuts rows of up to `longest` tokens.

    `answer_lengths` is how many tokens of each answer are left, an integer tensor (2 · pairs,).
    """
    result = OK
    found = f"{limit}; the longest row has {longest} tokens"
    gone = int((answer_lengths == 0).sum())
    if gone:
        result = FAILED
        found += f"; nothing is left of {gone} of {len(answer_lengths)} answers"
    elif limit is not None and limit < longest:
        result = WARNING
    advice = (
        "max_length=None, and chat.within_budget for long rows: "
        "an answer that is cut teaches the model not to stop"
    )
    return finding("max_length", result, found, advice)


def check_image_tokens(tokens, features, limit):
    """Check that a batch has one image token for each vector that the model makes of its images."""
    found = f"{tokens} for {features} features of the model"
    if tokens == features:
        return finding("image tokens", OK, found)
    advice = "load processor and model by the same name and revision: these do not match"
    if limit is not None and tokens < features:
        advice = f"max_length=None: {limit} cuts image tokens off"
    return finding("image tokens", FAILED, found, advice)


def free_bytes(device):
    """Return how many bytes a step could still take on `device`, a torch.device."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def check_memory(settings, trainer, text_tokens):
    """Compare the estimate of a step on rows of `text_tokens` and an image with what is free.

    The tokens of further images are among `text_tokens`.
    """
    args = trainer.args
    free = free_bytes(args.device)
    if settings is None:
        found = f"{memory.readable(free)} free; no profile to estimate from"
        return finding("memory", WARNING, found, "trainer.settings = settings, your profile")
    as_trained = dataclasses.replace(
        settings,
        batch_size=args.per_device_train_batch_size,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    try:
        packed = getattr(trainer, "packs", False)
        on_gpu = args.device.type == "cuda"
        components = memory.estimate(as_trained, text_tokens, gpu=on_gpu, packed=packed)
    except ValueError as error:
        found = f"{memory.readable(free)} free; {error}"
        return finding("memory", WARNING, found, "watch the first steps")
    # Weights and adapter are in memory already.
    needed = 0
    for component, count in components.items():
        if component not in ("weights", "adapter"):
            needed += count
    result = OK
    if needed > free:
        result = FAILED
    elif needed > 0.9 * free:
        result = WARNING
    found = f"a step takes up to {memory.readable(needed)}, {memory.readable(free)} are free"
    advice = (
        "a smaller batch_size with more gradient_accumulation, gradient_checkpointing=True, "
        "or a smaller pixel_budget"
    )
    return finding("memory", result, found, advice)


def in_16_bit(trainer):
    """Return whether the trainer computes in 16 bits, where equal things differ by rounding."""
    return trainer.args.bf16 or trainer.args.fp16


def check_reference(trainer, used, adapter_off):
    """Check that the reference is the model with its adapter off.

    `used` and `adapter_off` are log-probabilities (2 · pairs,) in nats.
    """
    if "ref" in getattr(trainer.model, "peft_config", {}):
        return finding("reference", OK, "a frozen copy of the adapter that is trained on")
    difference = (used - adapter_off).abs().max().item()
    allowed = 0.01
    if in_16_bit(trainer):
        allowed = 0.1 + 0.02 * adapter_off.abs().max().item()
    found = f"{difference:.1g} nats from the model with its adapter off"
    advice = (
        "leave ref_model out, and delete log-probabilities kept on disk; "
        "if that does not help, shared_prefix=False"
    )
    return finding("reference", OK if difference < allowed else FAILED, found, advice)


def check_first_loss(trainer, loss, log_ratio):
    """Check that policy and reference are equal before the first optimizer step.

    The sigmoid loss is then ln 2 (Rafailov et al. 2023, equation 7).
    """
    sigmoid = (
        trainer.loss_types == ["sigmoid"]
        and trainer.loss_weights == [1.0]
        and not trainer.use_weighting
    )
    allowed = 0.5 if in_16_bit(trainer) else 0.01
    right = abs(log_ratio) < allowed and math.isfinite(loss)
    expected = f"loss_type {', '.join(trainer.loss_types)}"
    if sigmoid:
        expected = f"ln 2 = {math.log(2):.4f}"
        right = right and abs(loss - math.log(2)) < 0.01
    found = f"{loss:.4f} ({expected}); policy − reference: {log_ratio:+.2g} nats"
    advice = (
        "load the model again: a new adapter must change nothing; "
        "one that was trained before needs continue_adapter=True"
    )
    return finding("first loss", OK if right else FAILED, found, advice)


def check_gradients(trainer, largest):
    """Check that a gradient arrives at every tensor that trains.

    `largest` maps its name to its largest absolute gradient, or to None.
    """
    # LoRA multiplies A by B, and B starts at zero: until it has moved, the gradient of A is 0.
    zero_b = set()
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name and not parameter.any():
            zero_b.add(name)
    waiting = []
    silent = []
    for name, gradient in largest.items():
        if "lora_A" in name and name.replace("lora_A", "lora_B") in zero_b:
            waiting.append(name)
            if gradient is None:
                silent.append(name)
        elif gradient is None or ("lora_" in name and not gradient > 0):
            silent.append(name)
    if silent:
        found = f"none at {len(silent)} of {len(largest)} tensors: {some_of(silent)}"
        advice = (
            "models.load_model keeps them flowing through 4-bit layers; "
            "with checkpointing: model.enable_input_require_grads()"
        )
        return finding("gradients", FAILED, found, advice)

    repacked = 0
    for module in trainer.model.modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        if getattr(module, "support_avx512bf16_for_cpu", False):
            repacked += 1
    if repacked and trainer.args.device.type == "cpu":
        found = (
            f"the first evaluation would repack {repacked} 4-bit layers, "
            "and no gradient passes through a repacked layer"
        )
        advice = "models.keep_gradients_flowing(model), as models.load_model does"
        return finding("gradients", FAILED, found, advice)
    found = f"arrive at {len(largest) - len(waiting)} of {len(largest)} tensors"
    if waiting:
        found += f"; the other {len(waiting)} are LoRA's A, 0 until B has moved"
    return finding("gradients", OK, found)

"""What a DPO step needs in memory, by formula before it runs, and what it did need. Everything in bytes; 1 GB is 10⁹ of them."""

import json
import math
import re
import weakref
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.quantizers.quantizers_utils import should_convert_module

from utils.models import part_of
from utils.pixel_budget import seen, square_side
from utils.settings import EMBEDDED_MODEL, ROOT

PRECISIONS = ("fp32", "bf16", "nf4")
LOGIT_TILE = (
    4096,
    32768,
)  # positions × vocabulary that TRL scores at a time: trl/kernels/chunked_logprob.py, trl/trainer/utils.py


@cache
def architecture(name):
    """A profile's `model` without its weights: parameters have a shape but no memory (torch's "meta" device). Built from
    `name`/config.json where that is here, else from configs/; ValueError that names those there are for any other name."""
    local = ROOT / name / "config.json"
    path = local if local.exists() else ROOT / "configs" / f"{name.split('/')[-1].lower()}.json"
    if not path.exists():
        there = ", ".join(
            [EMBEDDED_MODEL, *sorted(path.stem for path in path.parent.glob("*.json"))]
        )
        raise ValueError(
            f"no config of {name!r}: put its config.json at configs/{path.name}; there are {there}"
        )
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(**json.loads(path.read_text()))
        )


def placement(settings):
    """One dict per parameter of the profile's model, tied ones once: `name`, `part`, `weights` (how many), `four_bit` (whether it
    is loaded so) and `adapter` (how many weights LoRA puts beside it: rank · (in + out), Hu et al. 2021, section 4.1)."""
    model, rows = architecture(settings.model), []
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        matrix = layer != name and isinstance(model.get_submodule(layer), torch.nn.Linear)
        adapted = (
            part_of(name) != "head"
            if settings.lora_target == "all-linear"
            else re.fullmatch(settings.lora_target, layer)
        )
        four_bit = (
            matrix
            and settings.four_bit
            and should_convert_module(layer, list(settings.keep_in_full_precision))
        )
        adapter = settings.lora_rank * sum(parameter.shape) if matrix and adapted else 0
        rows.append(
            {
                "name": name,
                "part": part_of(name),
                "weights": parameter.numel(),
                "four_bit": four_bit,
                "adapter": adapter,
            }
        )
    return rows


def nf4_bytes(weights, double_quantization=True):
    """Bytes of one matrix of `weights` numbers in nf4 (Dettmers et al. 2023, QLoRA, section 3), as bitsandbytes keeps it.

    Half a byte a weight and 4 bytes for the scale of every 64; or, with double quantization, 1 byte, and then 4 for every 256
    scales and for their mean; and the tables of a weight's 16 levels and a scale's 256.
    """
    blocks = math.ceil(weights / 64)
    scales = (
        blocks + 4 * math.ceil(blocks / 256) + 4 + 4 * 256 if double_quantization else 4 * blocks
    )
    return math.ceil(weights / 2) + scales + 4 * 16


def training_states(weights, trainable, state_bytes=4, reference=0):
    """What does not depend on the batch: `weights` and `reference` (bytes, as given), the gradients, and AdamW's two moments."""
    return {
        "weights": weights,
        "reference": reference,
        "gradients": trainable * state_bytes,
        "optimizer": 2 * trainable * state_bytes,
    }


def image_side(settings):
    """Edge in pixels of a square image as large as the profile's pixel budget."""
    return square_side(settings.pixel_budget)


def image_tokens(settings, side=None):
    """How many tokens a square image becomes that fills a budget of `side` × `side` pixels, by default the profile's, without the
    few that mark its tiles."""
    return seen(architecture(settings.model).config, side**2 if side else settings.pixel_budget)[0]


def layer_bytes(text, rows, tokens, rank, compute_bytes):
    """What one layer of the language model keeps from the forward for the backward pass, {what: bytes}.

    For `rows` sequences of `tokens` tokens and the model's text_config. After Korthikanti et al. 2022, section 4.1, changed for
    RMSNorm, a gated MLP, sdpa (no attention matrix, but keys and values repeated for each head, because rows are padded) and
    frozen weights (the input of a matrix is kept for the adapter beside it).
    """
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = {
        "inputs of the norms, float32": 2 * 4 * (text.hidden_size + 1),
        "normed inputs": 2 * compute_bytes * text.hidden_size,
        "queries, keys, values, output": 4 * compute_bytes * text.num_attention_heads * head_size,
        "attention's sums and mask": 4 * text.num_attention_heads + compute_bytes * tokens,
        "MLP: gate, activation, up, product": 4 * compute_bytes * text.intermediate_size,
        "between the adapter's two matrices": 7 * compute_bytes * rank,
    }
    return {what: rows * tokens * count for what, count in per_token.items()}


def kept_bytes(text, rows, tokens, rank, compute_bytes, checkpointing):
    """What the forward pass keeps for the backward pass: each layer's `layer_bytes`, or with checkpointing only its input, and
    the inputs of the last norm and the head. Vision tower and connector learn nothing; it is assumed that they keep nothing."""
    one = compute_bytes * rows * tokens * text.hidden_size
    layer = (
        one if checkpointing else sum(layer_bytes(text, rows, tokens, rank, compute_bytes).values())
    )
    return text.num_hidden_layers * layer + 4 * rows * tokens * (text.hidden_size + 1) + one


def estimate(settings, text_tokens=256, precision=None, side=None, gpu=True):
    """Bytes at the peak of a step of TRL's trainer by component, for the profile's adapter, batch and checkpointing.

    `text_tokens`: question, answer and template of the longest row. `precision`: one of PRECISIONS, by default the profile's.
    Adapter, gradients and AdamW are float32. A GPU computes the rest in 16 bit (autocast adds a 16-bit adapter), and TRL scores
    only answers there, at most all text; a CPU computes in float32 and scores every position. Not counted: the CUDA context, the
    batch, and what single operations need while they run. The shared prefix needs less. Raises ValueError for an unknown precision.
    """
    precision = precision or ("nf4" if settings.four_bit else "bf16")
    if precision not in PRECISIONS or text_tokens < 1:
        raise ValueError(
            f"precision ({precision!r}) must be one of {', '.join(PRECISIONS)}, text_tokens ({text_tokens}) at least 1"
        )
    parameters, compute_bytes = placement(settings), 2 if gpu and precision != "fp32" else 4
    rows, tokens = (
        2 * settings.batch_size,
        image_tokens(settings, side) + text_tokens,
    )  # a pair is two rows: chosen, rejected
    sizes = [
        nf4_bytes(p["weights"])
        if p["four_bit"] and precision == "nf4"
        else compute_bytes * p["weights"]
        for p in parameters
    ]
    trainable = sum(p["adapter"] for p in parameters)
    batch = (
        architecture(settings.model).config.get_text_config(),
        rows,
        tokens,
        settings.lora_rank,
        compute_bytes,
    )
    recomputed = (
        sum(layer_bytes(*batch).values()) if settings.gradient_checkpointing else 0
    )  # one layer at a time
    return training_states(sum(sizes), trainable) | {
        "adapter": trainable * (4 if compute_bytes == 4 else 6),
        "activations": kept_bytes(*batch, settings.gradient_checkpointing) + recomputed,
        "logits": min(rows * (text_tokens if gpu else tokens - 1), LOGIT_TILE[0])
        * LOGIT_TILE[1]
        * compute_bytes,
    }


def held(tensors):
    """Bytes of the memory behind `tensors`; memory that several share counts once."""
    return sum(
        {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tensors
        }.values()
    )


def frozen_tensors(model):
    """Every frozen parameter of `model`, and of those in 4 bit the scales and tables too."""
    for parameter in (parameter for parameter in model.parameters() if not parameter.requires_grad):
        yield parameter
        state = getattr(parameter, "quant_state", None)
        while state:
            yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor))
            state = state.state2


class Allocations(TorchDispatchMode):
    """While entered, counts the memory of `tensors` and of all that operations make: its `peak`, and the largest `tile` of logits."""

    def __init__(self, tensors):
        super().__init__()
        self.now, self.peak, self.tile, self.alive = 0, 0, 0, {}
        self.count(tensors)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result

    def count(self, tensors):
        for tensor, memory in ((tensor, tensor.untyped_storage()) for tensor in tensors):
            if memory.nbytes() and memory.data_ptr() not in self.alive:
                self.alive[memory.data_ptr()] = memory.nbytes()
                weakref.finalize(memory, self.free, memory.data_ptr())
                self.now += memory.nbytes()
                self.peak = max(self.peak, self.now)
                self.tile = max(self.tile, memory.nbytes() * (tensor.shape[1:] == LOGIT_TILE[1:]))

    def free(self, pointer):
        self.now -= self.alive.pop(pointer)


def measure(trainer):
    """Bytes by component in the one step that `trainer` (made with max_steps=1) trains here, and the `peak` of all tensors.
    Activations are what autograd saves in the forward pass, without the parameters, which it saves as well."""
    learned, frozen = (
        [p for p in trainer.model.parameters() if p.requires_grad],
        [*frozen_tensors(trainer.model)],
    )
    saved, gradients, allocations, compute_loss = (
        [],
        {},
        Allocations(frozen + learned),
        trainer.compute_loss,
    )

    def watched_loss(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor.detach()) or tensor, lambda tensor: tensor
        ):
            loss = compute_loss(*args, **kwargs)
        saved[:] = [
            held(saved + frozen + learned) - held(frozen + learned)
        ]  # and lets go of the tensors
        return loss

    for parameter in learned:
        parameter.register_post_accumulate_grad_hook(
            lambda parameter: gradients.update({parameter: parameter.grad.nbytes})
        )
    trainer.compute_loss = watched_loss
    with allocations:
        trainer.train()
    states = held(
        value
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    measured = {
        "weights": held(frozen),
        "adapter": held(learned),
        "gradients": sum(gradients.values()),
        "optimizer": states,
    }
    return measured | {
        "activations": saved[0],
        "logits": allocations.tile,
        "peak": allocations.peak,
    }

"""Estimate the memory of a DPO step before it runs, and measure it in one that does.

Everything is in bytes. One GB is 10⁹ bytes.
"""

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

from utils.families import seen, square_side
from utils.models import part_of
from utils.settings import EMBEDDED_MODEL, ROOT

PRECISIONS = ("fp32", "bf16", "nf4")
# Positions × vocabulary that TRL scores at a time: TOKEN_CHUNK_SIZE in
# trl/kernels/chunked_logprob.py and _CHUNKED_LOGPROB_CHUNK_SIZE in trl/trainer/utils.py.
LOGIT_TILE = (4096, 32768)


def readable(count):
    """Return `count` bytes in words, in units of 1000: "6.4 GB", "115.6 MB", "26.1 kB" or "0"."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    if count >= 1e6:
        return f"{count / 1e6:.1f} MB"
    if count >= 1:
        return f"{count / 1e3:.1f} kB"
    return "0"


@cache
def architecture(name):
    """Build the model `name` without memory for its weights, on torch's "meta" device.

    Its configuration is `name`/config.json inside the repository, otherwise a file in configs/.
    Raise ValueError with the available names if there is neither.
    """
    path = ROOT / name / "config.json"
    if not path.exists():
        path = ROOT / "configs" / f"{name.split('/')[-1].lower()}.json"
    if not path.exists():
        available = [EMBEDDED_MODEL]
        available += sorted(file.stem for file in path.parent.glob("*.json"))
        raise ValueError(
            f"no configuration of {name!r}: save its config.json as configs/{path.name}; "
            f"available: {', '.join(available)}"
        )
    config = AutoConfig.for_model(**json.loads(path.read_text()))
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def placement(settings):
    """Return a dict for every parameter of the profile's model, tied ones once.

    `name`, `part`, `weights`: how many there are, `four_bit`: whether it is loaded in 4 bits,
    `adapter`: how many weights LoRA adds beside it, which is rank · (in + out) by Hu et al. 2021,
    section 4.1.
    """
    model = architecture(settings.model)
    rows = []
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        part = part_of(name)
        is_matrix = layer != name and isinstance(model.get_submodule(layer), torch.nn.Linear)

        if settings.lora_target == "all-linear":
            is_adapted = part != "head"
        else:
            is_adapted = re.fullmatch(settings.lora_target, layer) is not None
        adapter = 0
        if is_matrix and is_adapted:
            adapter = settings.lora_rank * sum(parameter.shape)

        four_bit = False
        if is_matrix and settings.four_bit:
            four_bit = should_convert_module(layer, list(settings.keep_in_full_precision))
        row = {
            "name": name,
            "part": part,
            "weights": parameter.numel(),
            "four_bit": four_bit,
            "adapter": adapter,
        }
        rows.append(row)
    return rows


def nf4_bytes(weights, double_quantization=True):
    """Return the bytes of a matrix of `weights` numbers in nf4, as bitsandbytes stores it.

    After QLoRA (Dettmers et al. 2023), section 3: half a byte per weight, and a scale for each
    block of 64 weights.
    """
    blocks = math.ceil(weights / 64)
    if double_quantization:
        # A scale takes 1 byte. In 4 bytes each: a second scale for 256 of them, their mean, and
        # the table of their 256 levels.
        scales = blocks + 4 * math.ceil(blocks / 256) + 4 + 4 * 256
    else:
        scales = 4 * blocks
    table_of_levels = 4 * 16
    return math.ceil(weights / 2) + scales + table_of_levels


def training_states(weights, trainable, state_bytes=4, reference=0):
    """Return the bytes that do not depend on the batch: {component: bytes}.

    `weights` and `reference` are bytes and returned as given. `trainable` is a number of weights.
    Each has a gradient and AdamW's two moments, of `state_bytes` each.
    """
    return {
        "weights": weights,
        "reference": reference,
        "gradients": trainable * state_bytes,
        "optimizer": 2 * trainable * state_bytes,
    }


def image_side(settings):
    """Return the edge in pixels of a square image as large as the profile's pixel budget."""
    return square_side(settings.pixel_budget)


def image_tokens(settings, side=None):
    """Return how many tokens a square image takes, without the few that mark its tiles.

    It fills a budget of `side` × `side` pixels, or the profile's budget without `side`.
    """
    budget = settings.pixel_budget if side is None else side**2
    tokens, _ = seen(architecture(settings.model).config, budget)
    return tokens


def layer_bytes(text, rows, tokens, rank, compute_bytes, casts=False):
    """Return what one layer of the language model keeps for the backward pass: {what: bytes}.

    The batch has `rows` sequences of `tokens` tokens. `text` is the model's text_config, `rank`
    the adapter's, and a number takes `compute_bytes`. After Korthikanti et al. 2022, section 4.1,
    changed for RMSNorm, a gated MLP, sdpa and frozen weights. sdpa keeps no attention matrix, but
    keys and values repeated for each head, because rows are padded. The input of a frozen matrix
    is kept for the adapter beside it. `casts`: whether each adapter keeps a copy of its own, which
    it casts from float32, as PEFT's do beside matrices in 16 bits.
    """
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = text.num_attention_heads * head_size
    per_token = {
        "inputs of the norms, float32": 2 * 4 * (text.hidden_size + 1),
        "queries, keys, values, output": 4 * compute_bytes * heads,
        "attention's sums and mask": 4 * text.num_attention_heads + compute_bytes * tokens,
        "MLP: gate, activation, up": 3 * compute_bytes * text.intermediate_size,
        "between the adapter's two matrices": 7 * compute_bytes * rank,
    }
    if casts:
        inputs = 5 * text.hidden_size + heads + text.intermediate_size
        per_token["inputs of seven adapters"] = compute_bytes * inputs
    else:
        # The normed inputs; the output of attention is there already.
        inputs = 2 * text.hidden_size + text.intermediate_size
        per_token["inputs of the adapters"] = compute_bytes * inputs
    return {what: rows * tokens * count for what, count in per_token.items()}


def kept_bytes(text, rows, tokens, rank, compute_bytes, checkpointing, casts=False):
    """Return the bytes that the forward pass keeps for the backward pass.

    Each layer keeps its `layer_bytes`, or with checkpointing only its input. The last norm and
    the head keep their inputs. Vision tower and connector are not trained and are assumed to keep
    nothing. For the arguments see `layer_bytes`.
    """
    hidden_states = compute_bytes * rows * tokens * text.hidden_size
    if checkpointing:
        layer = hidden_states
    else:
        layer = sum(layer_bytes(text, rows, tokens, rank, compute_bytes, casts).values())
    input_of_norm = 4 * rows * tokens * (text.hidden_size + 1)  # float32
    input_of_head = hidden_states
    return text.num_hidden_layers * layer + input_of_norm + input_of_head


def estimate(settings, text_tokens=256, precision=None, side=None, gpu=True, packed=False):
    """Return the bytes at the peak of a step: {component: bytes}.

    For the profile's adapter, batch and checkpointing, and a vision tower without gradient.
    `text_tokens`: question, answer and template of the longest row. `precision`: one of
    PRECISIONS, by default the profile's. `side`: see `image_tokens`. `packed`: False for TRL's
    trainer, True for the most that one with a shared prefix needs. Not counted are the CUDA
    context, the batch, and the vision tower while it runs. On an H100 a step took up to 8% more
    (results/gpu). Raise ValueError for an unknown precision and for fewer than one text token.
    """
    if precision is None:
        precision = "nf4" if settings.four_bit else "bf16"
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: choose one of {', '.join(PRECISIONS)}")
    if text_tokens < 1:
        raise ValueError(f"text_tokens is {text_tokens}: a row has at least 1")
    # A GPU computes in 16 bits, a CPU in 32. Adapter, gradients and AdamW are always float32.
    compute_bytes = 2 if gpu and precision != "fp32" else 4

    weights = 0
    trainable = 0
    for row in placement(settings):
        trainable += row["adapter"]
        if row["four_bit"] and precision == "nf4":
            weights += nf4_bytes(row["weights"])
        else:
            weights += compute_bytes * row["weights"]
    components = training_states(weights, trainable)
    # Autocast adds a 16-bit copy of the adapter.
    components["adapter"] = trainable * (6 if compute_bytes == 2 else 4)

    rows = 2 * settings.batch_size  # a pair is two rows: chosen and rejected
    tokens = image_tokens(settings, side) + text_tokens
    if packed:  # a pair is one row, which holds the image once and both answers
        rows = settings.batch_size
        tokens += text_tokens
    text = architecture(settings.model).config.get_text_config()
    checkpointing = settings.gradient_checkpointing
    casts = compute_bytes == 2 and precision != "nf4"
    batch = (text, rows, tokens, settings.lora_rank, compute_bytes)
    layer = sum(layer_bytes(*batch, casts).values())
    components["activations"] = kept_bytes(*batch, checkpointing, casts)
    if checkpointing:
        # The backward pass computes one layer at a time again.
        components["activations"] += layer
    # Going back through a layer makes a gradient for most of what it kept.
    components["backward"] = layer

    # On a GPU TRL scores only the answers, at most all text; on a CPU every position.
    scored = 2 * settings.batch_size * text_tokens
    if not gpu and not packed:
        scored = rows * (tokens - 1)
    tile_positions, tile_words = LOGIT_TILE
    components["logits"] = min(scored, tile_positions) * tile_words * compute_bytes
    return components


def answer_bytes(settings, text_tokens):
    """Return the bytes that one of several answers takes on a GPU while it is generated.

    `text_tokens`: of the question and its template. The longest answer is assumed, and the vision
    tower or the language model at work on the prompt, whichever takes more. There a layer holds
    three vectors as wide as its widest matrix.
    """
    model = architecture(settings.model)
    text = model.config.get_text_config()
    tokens, pixels = seen(model.config, settings.pixel_budget)
    tokens += text_tokens
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    keys_and_values = 2 * text.num_hidden_layers * heads * head_size
    patch = model.config.vision_config.patch_size
    patches = pixels // (patch**2 if isinstance(patch, int) else math.prod(patch))
    widest = {"vision": 0, "connector": 0}
    for name, module in model.named_modules():
        part = part_of(name)
        if part in widest and isinstance(module, torch.nn.Linear):
            widest[part] = max(widest[part], module.out_features)
    # Idefics2's connector works on patches, the others' on the tokens that they become.
    connector_rows = patches if model.config.model_type == "idefics2" else tokens
    at_work = max(
        widest["vision"] * patches,
        widest["connector"] * connector_rows,
        text.intermediate_size * tokens,
    )
    return 2 * (keys_and_values * (tokens + settings.max_new_tokens) + 3 * at_work)


def held(tensors):
    """Return the bytes of the memory behind `tensors`. Memory that several share counts once."""
    sizes = {}
    for tensor in tensors:
        memory = tensor.untyped_storage()
        sizes[memory.data_ptr()] = memory.nbytes()
    return sum(sizes.values())


def frozen_tensors(model):
    """Yield every frozen parameter of `model`, and the scales and tables of those in 4 bits."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        yield parameter
        state = getattr(parameter, "quant_state", None)
        while state:
            for value in vars(state).values():
                if isinstance(value, torch.Tensor):
                    yield value
            state = state.state2  # double quantization: the scales have a state of their own


class Allocations(TorchDispatchMode):
    """Count the memory of `tensors` and, while entered, of all that operations make.

    `now` and `peak` are bytes, `tile` the bytes of the largest tile of logits.
    """

    def __init__(self, tensors):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.tile = 0
        self.alive = {}  # {address: bytes}
        self.count(tensors)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result

    def count(self, tensors):
        for tensor in tensors:
            memory = tensor.untyped_storage()
            pointer = memory.data_ptr()
            size = memory.nbytes()
            if size == 0 or pointer in self.alive:
                continue
            self.alive[pointer] = size
            weakref.finalize(memory, self.free, pointer)
            self.now += size
            self.peak = max(self.peak, self.now)
            if tensor.shape[1:] == LOGIT_TILE[1:]:
                self.tile = max(self.tile, size)

    def free(self, pointer):
        self.now -= self.alive.pop(pointer)


def measure(trainer):
    """Train one step and return what it needed: {component: bytes}, and the `peak` of all tensors.

    `trainer` must be made with max_steps=1. Activations are what autograd saves in the forward
    pass, without the parameters, which it saves as well.
    """
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    frozen = list(frozen_tensors(trainer.model))
    parameters = frozen + trained
    allocations = Allocations(parameters)
    compute_loss = trainer.compute_loss
    activations = 0
    gradients = {}

    def watched_loss(*args, **kwargs):
        nonlocal activations
        saved = []

        def save(tensor):
            saved.append(tensor.detach())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = compute_loss(*args, **kwargs)
        activations = held(saved + parameters) - held(parameters)
        saved.clear()  # else it would keep them in memory during the backward pass
        return loss

    def count_gradient(parameter):
        gradients[parameter] = parameter.grad.nbytes

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(count_gradient)
    trainer.compute_loss = watched_loss
    with allocations:
        trainer.train()

    states = []
    for state in trainer.optimizer.state.values():
        states += [value for value in state.values() if torch.is_tensor(value)]
    return {
        "weights": held(frozen),
        "adapter": held(trained),
        "gradients": sum(gradients.values()),
        "optimizer": held(states),
        "activations": activations,
        "logits": allocations.tile,
        "peak": allocations.peak,
    }

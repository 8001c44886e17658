"""DPO for vision language models that does shared work once. Loss, gradients and metrics are those of TRL's `DPOTrainer`.

TRL runs a pair as two rows that begin with the same images and the same question, through policy and reference. Here
  * the collator processes each image once per pair;
  * a vision tower that nobody trains encodes it once, without gradient, for both answers and for policy and reference;
  * the prompt goes through the language model once per forward, in one row [prompt | chosen | last prompt token + rejected].
"""

import warnings
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

# Compared with the stock trainer in tests/test_shared_prefix.py; what is not listed runs as it does there.
FAMILIES = {
    "idefics2",
    "idefics3",
    "smolvlm",
    "llava",
    "llava_next",
    "internvl",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "gemma3",
}
DECODERS = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "gemma3_text",
}
TEXT = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
)  # one row per answer; other tensors are images
TWO_ROWS = "the answers of a pair run as two rows, as in DPOTrainer, with the same loss"


def twice(batch, names):
    """`batch` with the tensors called `names` again below themselves: for the chosen rows, then for the rejected ones."""
    return {
        name: torch.cat([value, value]) if name in names and torch.is_tensor(value) else value
        for name, value in batch.items()
    }


class EachImageOnce:
    """The processor for the stock collator, which hands it all prompts with their images, and then all of them again."""

    def __init__(self, processor):
        self.processor = processor

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, images=None, text=None, **settings):
        if images is None:
            return self.processor(text=text, **settings)
        return twice(
            self.processor(
                images=images[: len(images) // 2], text=text[: len(text) // 2], **settings
            ),
            TEXT,
        )


def collate_pairs(stock, examples):
    """The batch of the `stock` collator, 2n rows of text (chosen, then rejected), with the images of its n prompts only once."""
    once = DataCollatorForVisionPreference(
        EachImageOnce(stock.processor), stock.max_length, stock.pad_to_multiple_of
    )
    return once([dict(example) for example in examples])  # it changes the examples it is given


class PackedPairs:
    """Where the tokens of TRL's rows (2n, T) go in packed rows (n, L): [prompt | chosen | last prompt token + rejected].

    The last prompt token comes twice because it predicts two tokens, the first of either answer. `attention_mask` and
    `labels` are TRL's: padded on the right, -100 outside the answers, the prompt of row i again in row n + i.
    """

    def __init__(self, attention_mask, labels):
        n, device = len(labels) // 2, labels.device
        total, answers = attention_mask.sum(1, keepdim=True), (labels != -100).sum(1, keepdim=True)
        prompt, chosen, rejected = (total - answers)[:n], answers[:n], answers[n:]
        sizes = torch.stack([(total[:n] + 1 + rejected).max(), total.max(), prompt.min()])
        length, self.longest_row, self.shortest_prompt = sizes.tolist()
        self.place = place = torch.arange(length, device=device)
        second = (
            place - prompt - chosen
        )  # place in the rejected branch, counted from the repeated prompt token
        self.row = torch.arange(n, device=device)[:, None] + n * (second >= 0)
        self.column = torch.where(second >= 0, prompt - 1 + second, place).clamp(
            0, labels.shape[1] - 1
        )
        self.branch = torch.where(
            place < prompt - 1, 0, 1 + (second >= 0).long()
        )  # 0: seen by both answers
        self.scored = labels[:, 1:] != -100  # TRL's place for what is predicted from each token
        self.targets = labels[:, 1:][self.scored][None]
        row, column = self.scored.nonzero(as_tuple=True)
        self.pair = row % n
        self.predicted_at = column + torch.where(row < n, 0, chosen[self.pair, 0] + 1)

    def pack(self, rows):
        """(…, 2n, T) to (…, n, L). Positions packed like this continue the prompt in both branches."""
        return rows[..., self.row, self.column]

    def mask(self, attention, dtype, token_type_ids=None):
        """(n, 1, L, L), which place sees which: causal, and no answer sees the other. A boolean for sdpa, 0 or -inf for eager."""
        sees = (self.place <= self.place[:, None]) & (
            (self.branch[:, None] == 0) | (self.branch[:, None] == self.branch[:, :, None])
        )
        if (
            token_type_ids is not None
        ):  # Gemma 3: a token of an image also sees the image's later ones
            is_image = token_type_ids == 1
            image = torch.where(
                is_image, (~is_image).cumsum(1), -1
            )  # the text before it tells one image from the next
            sees |= (image[:, None] == image[:, :, None]) & is_image[:, :, None]
        sees = sees[:, None]  # padding needs no mask: it comes last, and nothing before it sees it
        return (
            sees
            if attention == "sdpa"
            else torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
        )

    def keep_predictions(self, _backbone, _inputs, output):
        """A forward hook: the LM head gets the hidden states (1, answer tokens, width) that predict answers, and no others."""
        output.last_hidden_state = output.last_hidden_state[self.pair, self.predicted_at][None]
        return output

    def unpack(self, outputs):
        """Every output per answer token at its place in TRL's rows (2n, T - 1), zero elsewhere."""
        for name, value in list(outputs.items()):
            if value.shape == self.targets.shape:
                outputs[name] = value.new_zeros(self.scored.shape).masked_scatter(
                    self.scored, value
                )
        return outputs


def backbone_of(model):
    """What is below adapter and LM head: vision tower, connector and language model."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model


def vision_is_fixed(backbone):
    """True when nothing between pixels and language model is trained, adapted or random: policy and reference see the same features."""
    language = set(backbone.get_decoder().modules())
    modules = [module for module in backbone.modules() if module not in language]
    trained = any(
        parameter.requires_grad
        for module in modules
        for parameter in module.parameters(recurse=False)
    )
    adapted = any(
        isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in modules
    )
    dropout = [module.p for module in modules if isinstance(module, torch.nn.Dropout)]
    return not (
        trained
        or adapted
        or any(dropout)
        or getattr(backbone.config.vision_config, "attention_dropout", 0)
    )


@contextmanager
def encoding_once(backbone):
    """Within it, `backbone` encodes the same pixels once and without gradient: policy and reference share the features."""
    encode, last = backbone.get_image_features, []

    @torch.no_grad()
    def once(pixel_values, *arguments, **settings):
        if not last or not torch.equal(last[0], pixel_values):
            last[:] = pixel_values, encode(pixel_values, *arguments, **settings)
        return last[1]

    backbone.get_image_features = once
    try:
        yield
    finally:
        del backbone.get_image_features


def why_not_packed(model, args):
    """Why the answers of a pair cannot share a row in this model; None when they can."""
    family, text = model.config.model_type, model.config.get_text_config()
    adapters = (getattr(model, "peft_config", None) or {}).values()
    dropout = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)] + [
        getattr(text, "attention_dropout", 0)
    ]
    reasons = {
        f"{family} with a {text.model_type} decoder was not compared": family not in FAMILIES
        or text.model_type not in DECODERS,
        "its prompt also sees later tokens": getattr(text, "use_bidirectional_attention", False),
        f"{text._attn_implementation} takes no mask (sdpa and eager do)": text._attn_implementation
        not in ("sdpa", "eager"),
        "its adapter is not plain LoRA": any(
            a.peft_type != "LORA" or getattr(a, "alora_invocation_tokens", None) for a in adapters
        ),
        "dropout is on, and two rows draw it twice": any(dropout),
        "keep_end cuts the prompts of a pair differently": args.max_length is not None
        and args.truncation_mode == "keep_end",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class SharedPrefixDPOTrainer(DPOTrainer):
    """`DPOTrainer`, faster: same arguments (but no `data_collator` for images), same loss. Warns where it runs two rows per pair."""

    def __init__(self, *arguments, **settings):
        self.packs = False  # TRL's __init__ may already ask for reference log-probabilities
        super().__init__(*arguments, **settings)
        if (
            self._is_vision_dataset
            and type(self.data_collator) is not DataCollatorForVisionPreference
        ):
            raise ValueError(
                "SharedPrefixDPOTrainer makes its own batches of images: leave data_collator out, or use DPOTrainer"
            )
        if self._is_vision_dataset:
            self.data_collator = partial(collate_pairs, self.data_collator)
        reasons = [
            why_not_packed(model, self.args)
            for model in (self.model, self.ref_model)
            if model is not None
        ]
        self.packs = not any(reasons)
        if not self.packs:
            warnings.warn(f"{TWO_ROWS}: {next(filter(None, reasons))}", stacklevel=2)

    def _compute_loss(self, model, inputs, return_outputs):
        backbone, precomputed = backbone_of(self.model), self.precompute_ref_logps
        shared = self.model.config.model_type in (*FAMILIES, "paligemma") and vision_is_fixed(
            backbone
        )
        with encoding_once(backbone) if shared else nullcontext():
            if "ref_chosen_logps" not in inputs:
                chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
                inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            self.precompute_ref_logps = True  # TRL then takes them from `inputs`
            try:
                return super()._compute_loss(partial(self.run, model), inputs, return_outputs)
            finally:
                self.precompute_ref_logps = precomputed

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(partial(self.run, model), inputs)

    def run(self, model, labels=None, **batch):
        """What `model` returns for TRL's rows (2n, T) with each image once: packed where possible, otherwise as two rows per pair."""
        backbone = backbone_of(self.accelerator.unwrap_model(model))
        config = backbone.config.get_text_config()
        pairs = (
            PackedPairs(batch["attention_mask"], labels)
            if self.packs and labels is not None
            else None
        )
        if pairs and (
            pairs.shortest_prompt == 0
            or pairs.longest_row > (getattr(config, "sliding_window", None) or float("inf"))
        ):
            warnings.warn(
                f"{TWO_ROWS}: in some batches a prompt is empty or a row longer than the sliding window",
                stacklevel=2,
            )
            pairs = None
        if pairs is None:
            return model(labels=labels, **twice(batch, batch.keys() - TEXT))
        positions = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
        if "image_grid_thw" in batch:  # Qwen-VL: three positions a token
            rows = {
                name: batch[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")
            }
            positions, _ = backbone.get_rope_index(
                **rows, image_grid_thw=torch.cat([batch["image_grid_thw"]] * 2)
            )
        batch |= {name: pairs.pack(batch[name]) for name in TEXT if name in batch} | {
            "position_ids": pairs.pack(positions)
        }
        batch["attention_mask"] = pairs.mask(
            config._attn_implementation, backbone.dtype, batch.get("token_type_ids")
        )
        with backbone.register_forward_hook(pairs.keep_predictions):
            return pairs.unpack(model(shift_labels=pairs.targets, **batch))

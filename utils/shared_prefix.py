"""DPO for vision language models that does shared work once.

Loss, gradients and metrics are those of TRL's `DPOTrainer`. TRL runs a pair as two rows that begin
with the same images and the same question, through the policy and through the reference. Here
  * the collator processes each image once per pair;
  * a vision tower that nobody trains encodes it once, without gradient, for both answers and for
    policy and reference;
  * the prompt goes through the language model once per forward, and several pairs share a row so
    that less of it is padding: `PackedRows` draws the row.
"""

import warnings
from functools import partial

import torch
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from utils.packed_rows import (
    TEXT_TENSORS,
    PackedRows,
    fits_window,
    group_lengths,
    groups_in_rows,
    token_positions,
    why_not_shared,
)
from utils.vision import backbone_of, has_dropout, images_encoded_once

TWO_ROWS = "the answers of a pair run as two rows, as in DPOTrainer, with the same loss"


def twice(batch, names):
    """Return `batch` with the tensors called `names` repeated: chosen rows, then rejected rows."""
    repeated = {}
    for name, value in batch.items():
        if name in names and torch.is_tensor(value):
            value = torch.cat([value, value])
        repeated[name] = value
    return repeated


class EachImageOnce:
    """Stands in for the processor in TRL's collator and processes each image once.

    The collator hands over the prompts of all pairs with their images, and then all of them again.
    """

    def __init__(self, processor):
        self.processor = processor

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, images=None, text=None, **options):
        if images is None:  # the answers, or prompts of a batch without any image
            return self.processor(text=text, **options)
        pairs = len(text) // 2
        batch = self.processor(images=images[:pairs], text=text[:pairs], **options)
        return twice(batch, TEXT_TENSORS)


def collate_pairs(stock, examples):
    """Return the batch of the `stock` collator with each image once.

    Text has 2n rows, chosen then rejected. Images are those of the n prompts.
    """
    collator = DataCollatorForVisionPreference(
        EachImageOnce(stock.processor), stock.max_length, stock.pad_to_multiple_of
    )
    return collator([dict(example) for example in examples])  # it changes what it is given


def balanced_order(rows):
    """Return the numbers of `rows` as longest, shortest, second longest, second shortest, …

    Rows of pairs that follow one another in this order become about equally long. Length is that
    of the texts; images are taken to need as many tokens in every row.
    """
    sizes = []
    for row in rows:
        sizes.append(sum(len(str(row[name])) for name in ("prompt", "chosen", "rejected")))
    falling = sorted(range(len(rows)), key=lambda number: sizes[number], reverse=True)
    order = []
    while falling:
        order.append(falling.pop(0))
        if falling:
            order.append(falling.pop())
    return order


def collate_balanced(collate, examples):
    """Return the batch that `collate` makes of `examples` in balanced order."""
    return collate([examples[number] for number in balanced_order(examples)])


def row_lengths(attention_mask, labels):
    """Return the tokens in the prompt and in the answer of each row, as two lists.

    `attention_mask`, `labels`: (rows, T), with labels of -100 outside the answer.
    """
    answers = (labels != -100).sum(1)
    prompts = attention_mask.sum(1) - answers
    prompts, answers = torch.stack([prompts, answers]).tolist()  # waits for the device only once
    return prompts, answers


class PackedPairs(PackedRows):
    """Packed rows of the pairs in TRL's rows (2n, T), and where their answers are predicted.

    The two rows of a pair share the prompt without its last token, which predicts the first token
    of both answers. `PackedRows` draws a pair.

    `attention_mask` and `labels` are TRL's, (2n, T): padded on the right, -100 outside the answers,
    the prompt of row i again in row n + i. Every prompt must have at least one token. `width` is
    the language model's hidden size: pairs share rows where that saves operations, and without it
    each has its own. `lengths` is what `row_lengths` returns, where that is known already.
    """

    def __init__(self, attention_mask, labels, width=None, lengths=None):
        pairs = len(labels) // 2
        device = labels.device
        prompts, answers = lengths or row_lengths(attention_mask, labels)
        tokens = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        groups = [(pair, pairs + pair) for pair in range(pairs)]
        shared = [prompt - 1 for prompt in prompts[:pairs]]
        counts = [1] * pairs
        if width:
            counts = groups_in_rows(group_lengths(groups, shared, tokens), width)
        super().__init__(groups, shared, tokens, counts, labels.shape[1], device)

        self.scored = labels[:, 1:] != -100  # TRL's place for what is predicted from each token
        self.targets = labels[:, 1:][self.scored][None]
        scored_row, scored_column = self.scored.nonzero(as_tuple=True)
        self.predicted_in = self.packed_in[scored_row]
        self.predicted_at = scored_column + self.moved[scored_row]

    def keep_predictions(self, _backbone, _inputs, output):
        """Drop the hidden states that predict no token of an answer: a hook ahead of the LM head.

        What is left has the shape (1, answer tokens, width).
        """
        predicting = output.last_hidden_state[self.predicted_in, self.predicted_at]
        output.last_hidden_state = predicting[None]
        return output

    def unpack(self, outputs):
        """Put outputs per answer token at their places in TRL's rows (2n, T - 1), else zero."""
        for name, value in list(outputs.items()):
            if value.shape == self.targets.shape:
                rows = value.new_zeros(self.scored.shape)
                outputs[name] = rows.masked_scatter(self.scored, value)
        return outputs


def why_not_packed(model, args):
    """Return why the answers of a pair cannot share a row in this model, None when they can.

    `args`: the trainer's `DPOConfig`.
    """
    reason = why_not_shared(model.config)
    if reason:
        return reason
    text = model.config.get_text_config()
    adapters = getattr(model, "peft_config", None) or {}
    for adapter in adapters.values():
        if adapter.peft_type != "LORA" or getattr(adapter, "alora_invocation_tokens", None):
            return "its adapter is not plain LoRA"
    if getattr(text, "attention_dropout", 0) or has_dropout(model.modules()):
        return "dropout is on, and two rows draw it twice"
    if args.max_length is not None and args.truncation_mode == "keep_end":
        return "keep_end cuts the prompts of a pair differently"
    return None


def can_share_rows(config, prompts, answers):
    """Return whether no prompt is empty and no row of TRL's is longer than the sliding window.

    `config`: the language model's. `prompts`, `answers`: what `row_lengths` returns.
    """
    longest = max(prompt + answer for prompt, answer in zip(prompts, answers, strict=True))
    return min(prompts) > 0 and fits_window(config, longest)


class SharedPrefixDPOTrainer(DPOTrainer):
    """Trains as `DPOTrainer` does, with the same arguments and the same loss, but faster.

    It takes no `data_collator` for images. It warns where it runs two rows per pair.
    """

    def __init__(self, *arguments, **options):
        self.packs = False  # TRL's __init__ may already ask for reference log-probabilities
        super().__init__(*arguments, **options)
        if self._is_vision_dataset:
            if type(self.data_collator) is not DataCollatorForVisionPreference:
                raise ValueError(
                    "SharedPrefixDPOTrainer makes its own batches of images: "
                    "leave data_collator out, or use DPOTrainer"
                )
            self.collate = partial(collate_pairs, self.data_collator)
            self.data_collator = partial(collate_balanced, self.collate)
        reason = why_not_packed(self.model, self.args)
        if reason is None and self.ref_model is not None:
            reason = why_not_packed(self.ref_model, self.args)
        self.packs = reason is None
        if not self.packs:
            warnings.warn(f"{TWO_ROWS}: {reason}", stacklevel=2)

    def _compute_loss(self, model, inputs, return_outputs):
        with images_encoded_once(self.model, inputs.get("image_features")):
            if "ref_chosen_logps" not in inputs:
                chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
                inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            precomputed = self.precompute_ref_logps
            self.precompute_ref_logps = True  # TRL then takes them from `inputs`
            try:
                return super()._compute_loss(partial(self.run, model), inputs, return_outputs)
            finally:
                self.precompute_ref_logps = precomputed

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(partial(self.run, model), inputs)

    def run(self, model, labels=None, **batch):
        """Return what `model` returns for TRL's rows (2n, T), given each image once.

        Packed where that is possible, otherwise as two rows per pair.
        """
        backbone = backbone_of(self.accelerator.unwrap_model(model))
        config = backbone.config.get_text_config()
        packs = self.packs and labels is not None
        if packs:
            lengths = row_lengths(batch["attention_mask"], labels)
            packs = can_share_rows(config, *lengths)
            if not packs:
                warnings.warn(
                    f"{TWO_ROWS}: in some batches a prompt is empty "
                    "or a row is longer than the sliding window",
                    stacklevel=2,
                )
        if not packs:
            images = batch.keys() - TEXT_TENSORS
            return model(labels=labels, **twice(batch, images))

        pairs = PackedPairs(batch["attention_mask"], labels, config.hidden_size, lengths)
        packed = dict(batch)
        for name in TEXT_TENSORS:
            if name in batch:
                packed[name] = pairs.pack(batch[name])
        grids = None
        if "image_grid_thw" in batch:
            grids = torch.cat([batch["image_grid_thw"]] * 2)
        packed["position_ids"] = pairs.pack(token_positions(backbone, batch, grids))
        packed["attention_mask"] = pairs.mask(
            config._attn_implementation, backbone.dtype, packed.get("token_type_ids")
        )
        with backbone.register_forward_hook(pairs.keep_predictions):
            outputs = model(shift_labels=pairs.targets, **packed)
        return pairs.unpack(outputs)

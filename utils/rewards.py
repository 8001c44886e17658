"""Log-probabilities of answers under policy and reference, and the implicit rewards that DPO makes of them."""

import torch
from peft import PeftModel

from utils.chat import training_batch
from utils.models import compute_dtype


def answer_logps(logits, input_ids, completion_mask):
    """log π(answer | image, prompt) of every row in nats: a tensor (rows,), the sum over the answer's tokens in float32.

    `logits`: (rows, length, vocabulary); `input_ids`, `completion_mask`: (rows, length), the mask is 1 on the answer's tokens.
    Only the logits that predict an answer's token are converted: those of image and prompt are most of the memory.
    """
    in_answer = completion_mask[
        :, 1:
    ].bool()  # the logits at one position predict the token at the next
    log_p = logits[:, :-1][in_answer].float().log_softmax(-1)
    token_logps = log_p.gather(-1, input_ids[:, 1:][in_answer][:, None])[:, 0]
    return torch.stack(
        [of_row.sum() for of_row in token_logps.split(in_answer.sum(dim=1).tolist())]
    )


@torch.no_grad()
def pair_logps(model, processor, rows, settings):
    """What policy (adapter on) and reference (adapter off) think of both answers of every pair, without gradient.

    `rows`: formatted rows of `utils.chat.format_dataset`. Returns float64 arrays of shape (pairs,), in the order of `rows`:
    "chosen", "rejected", "reference_chosen", "reference_rejected" in nats, and "chosen_tokens", "rejected_tokens".
    Raises ValueError when there are no rows, or no adapter: policy and reference would be the same and every reward 0.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            "the model carries no adapter, so policy and reference are the same: "
            "take the model of make_trainer(...), or utils.models.load_tuned(settings, adapter)"
        )
    if len(rows) == 0:
        raise ValueError("there are no pairs to score: rows is empty")
    was_training, parts, dtype = model.training, [], compute_dtype()
    model.eval()
    for start in range(
        0, len(rows), settings.batch_size
    ):  # as many pairs as fit into a step of training
        some = [rows[i] for i in range(start, min(start + settings.batch_size, len(rows)))]
        batch = training_batch(some, processor).to(model.device)
        mask = batch.pop("completion_mask")
        with torch.autocast(
            model.device.type, dtype, enabled=dtype != torch.float32
        ):  # as the trainer computes on a GPU
            policy = answer_logps(model(**batch, use_cache=False).logits, batch["input_ids"], mask)
            with model.disable_adapter():
                reference = answer_logps(
                    model(**batch, use_cache=False).logits, batch["input_ids"], mask
                )
        columns = (
            half for tensor in (policy, reference, mask.sum(dim=1)) for half in tensor.chunk(2)
        )  # chosen rows, then rejected
        parts.append(torch.stack([column.double() for column in columns]).cpu())
    model.train(was_training)
    names = (
        "chosen",
        "rejected",
        "reference_chosen",
        "reference_rejected",
        "chosen_tokens",
        "rejected_tokens",
    )
    return dict(zip(names, torch.cat(parts, dim=1).numpy(), strict=True))


def rewards(logps, beta):
    """DPO's implicit rewards, β · (log π_policy − log π_reference): {"chosen", "rejected", "margin"}, arrays (pairs,).

    Rafailov et al. 2023, section 4: the reward that the policy stands for, up to a term that both answers share.
    `logps`: what `pair_logps` returns; margin: chosen − rejected.
    """
    chosen, rejected = (
        beta * (logps[side] - logps[f"reference_{side}"]) for side in ("chosen", "rejected")
    )
    return {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected}

"""Log-probabilities of answers under policy and reference, and DPO's implicit rewards from them."""

import torch
from peft import PeftModel

from utils.chat import training_batch
from utils.models import answering, compute_dtype


def predicting_logits(logits, completion_mask):
    """Return the logits that predict the answers' tokens: (answer tokens, vocabulary), float32.

    `logits`: (rows, length, vocabulary). `completion_mask`: (rows, length), 1 on answer tokens.
    Only these logits are converted: those of image and prompt are most of the memory.
    """
    # The logits at one position predict the token at the next.
    in_answer = completion_mask[:, 1:].bool()
    return logits[:, :-1][in_answer].float()


def answer_logits(model, processor, rows):
    """Return what `model` predicts at every token of both answers of every pair, without gradient.

    `rows`: formatted rows of `utils.chat.format_dataset`, run as one batch. Returns a float32
    tensor (answer tokens, vocabulary) on the CPU: all chosen answers, then all rejected ones.
    """
    batch = training_batch(rows, processor).to(model.device)
    completion_mask = batch.pop("completion_mask")
    with answering(model):
        logits = model(**batch, use_cache=False).logits
    return predicting_logits(logits, completion_mask).cpu()


def logit_difference(logits, others):
    """Compare two models' logits for the same tokens, both (answer tokens, vocabulary).

    Returns a dict of floats: "largest", the largest difference of one logit; "divergence", the mean
    Kullback-Leibler divergence per token in nats; "changed", the fraction of tokens whose most
    likely successor differs.
    """
    p = logits.log_softmax(-1)
    q = others.log_softmax(-1)
    return {
        "largest": (logits - others).abs().max().item(),
        "divergence": (p.exp() * (p - q)).sum(-1).mean().item(),
        "changed": (logits.argmax(-1) != others.argmax(-1)).float().mean().item(),
    }


def answer_logps(logits, input_ids, completion_mask):
    """Return log π(answer | image, prompt) of every row in nats, (rows,).

    The log-probability of an answer is the sum over its tokens, in float32.
    `logits`: (rows, length, vocabulary). `input_ids`, `completion_mask`: (rows, length); the mask
    is 1 on answer tokens.
    """
    in_answer = completion_mask[:, 1:].bool()
    answer_ids = input_ids[:, 1:][in_answer]
    log_p = predicting_logits(logits, completion_mask).log_softmax(-1)
    token_logps = log_p.gather(-1, answer_ids[:, None])[:, 0]
    lengths = in_answer.sum(dim=1).tolist()
    return torch.stack([answer.sum() for answer in token_logps.split(lengths)])


def pair_logps(settings, model, processor, rows):
    """Score both answers of every pair under policy (adapter on) and reference (adapter off).

    `rows`: formatted rows of `utils.chat.format_dataset`. Returns float64 arrays (pairs,) in the
    order of `rows`: log-probabilities in nats as "chosen", "rejected", "reference_chosen" and
    "reference_rejected", lengths as "chosen_tokens" and "rejected_tokens". No gradient is kept.

    Raises ValueError when there are no rows, or when the model has no adapter: policy and reference
    would be the same and every reward 0.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            "the model has no adapter, so policy and reference are the same: "
            "use the model of make_trainer(...) or of utils.models.load_tuned(settings, adapter)"
        )
    if len(rows) == 0:
        raise ValueError("there are no pairs to score: rows is empty")

    parts = {
        "chosen": [],
        "rejected": [],
        "reference_chosen": [],
        "reference_rejected": [],
        "chosen_tokens": [],
        "rejected_tokens": [],
    }
    dtype = compute_dtype()
    autocast = torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)
    size = settings.batch_size  # as many pairs as fit into a step of training
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        some = [rows[number] for number in range(start, stop)]
        batch = training_batch(some, processor).to(model.device)
        mask = batch.pop("completion_mask")
        with autocast, answering(model):
            logits = model(**batch, use_cache=False).logits
            policy = answer_logps(logits, batch["input_ids"], mask)
        with autocast, answering(model, adapter=False):
            logits = model(**batch, use_cache=False).logits
            reference = answer_logps(logits, batch["input_ids"], mask)
        # A batch holds the chosen rows, then the rejected rows.
        pairs = len(some)
        tokens = mask.sum(dim=1)
        parts["chosen"].append(policy[:pairs])
        parts["rejected"].append(policy[pairs:])
        parts["reference_chosen"].append(reference[:pairs])
        parts["reference_rejected"].append(reference[pairs:])
        parts["chosen_tokens"].append(tokens[:pairs])
        parts["rejected_tokens"].append(tokens[pairs:])
    return {name: torch.cat(values).double().cpu().numpy() for name, values in parts.items()}


def rewards(logps, beta):
    """Return DPO's implicit rewards, β · (log π_policy − log π_reference).

    Rafailov et al. 2023, section 4: the reward that the policy stands for, up to a term that both
    answers share. `logps`: what `pair_logps` returns. Returns arrays (pairs,): "chosen", "rejected"
    and "margin", which is chosen − rejected.
    """
    chosen = beta * (logps["chosen"] - logps["reference_chosen"])
    rejected = beta * (logps["rejected"] - logps["reference_rejected"])
    return {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected}

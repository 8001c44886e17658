"""Preference pairs from a model's own answers, as RLAIF-V makes them: split into claims, judge each, score, pair, balance lengths.

A judge is a function `judge(claims, rows)`, two lists of the same length: for each claim and the row it is about, whether it is
accepted. A claim is what `embedded.claims.claims` returns, or a sentence (a string); a row is a dict with `image`, or `objects`.
"""

import re
from itertools import permutations
from statistics import mean

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from embedded.claims import claims, is_right, left_out
from embedded.scenes import DESCRIBE, NUMBERS, PLACES, article, existence_question
from utils.chat import answer_messages, inference_batch, prompt_messages
from utils.preferences import TEXT_COLUMNS
from utils.progress import progress


def truth_judge(claims, rows):
    """The judge that knows: whether each claim is right, by the `objects` of its row."""
    return [is_right(claim, row["objects"]) for claim, row in zip(claims, rows, strict=True)]


def model_judge(claims, rows, model, processor, settings):
    """The judge that looks: a model is asked about each claim, with the `image` of its row.
    The last three arguments are fixed with `functools.partial`. The same question about the same row is asked once.
    """
    asked = [as_question(claim) for claim in claims]
    keys = [(id(row), question) for (question, _), row in zip(asked, rows, strict=True)]
    images = dict(zip(keys, (row["image"] for row in rows), strict=True))
    found = yes_and_no(
        model, processor, list(images.values()), [question for _, question in images], settings
    )
    probabilities = dict(zip(images, found, strict=True))
    return [
        accepts(*probabilities[key], expected)
        for key, (_, expected) in zip(keys, asked, strict=True)
    ]


def accepts(p_yes, p_no, expected="yes"):
    """Whether the `expected` answer is strictly the more probable one: a tie is a rejection, as in RLAIF-V."""
    return bool(p_yes > p_no if expected == "yes" else p_no > p_yes)


def as_question(claim):
    """(`claim` as a question that yes or no answers, the answer that accepts it): "yes", or "no" for "there is no …"."""
    if isinstance(claim, str):
        return f"Is this true of the image? {claim}", "yes"
    kind, category, value = claim["kind"], claim["category"], claim["value"]
    if kind == "object":
        return existence_question(category), "yes" if value else "no"
    if kind == "count":
        return (
            f"{'Is' if value == 1 else 'Are'} there {NUMBERS[value]} object{'s' * (value != 1)} in the image?",
            "yes",
        )
    if kind == "colour":
        return f"Is there {article(value)} {value} {category} in the image?", "yes"
    thing = f"{article(category)} {category}" if category else "nothing"
    return f"Is there {thing} {PLACES[value][0].lower()}{PLACES[value][1:]} of the image?", "yes"


@torch.no_grad()
def yes_and_no(model, processor, images, questions, settings):
    """p(yes) and p(no) for each question, from the softmax over the first token of the answer: array (questions, 2)."""
    lead, yes, no = answer_tokens(processor)
    options = {
        "max_new_tokens": 1,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    options["pad_token_id"] = processor.tokenizer.pad_token_id
    was_training, found = model.training, []
    model.eval()
    for start in progress(range(0, len(images), settings.generation_batch_size), "judging"):
        part = slice(start, start + settings.generation_batch_size)
        batch = inference_batch(images[part], questions[part], processor).to(model.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        before = torch.tensor(lead, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
        batch |= {
            "input_ids": torch.cat([ids, before], 1),
            "attention_mask": torch.cat([mask, torch.ones_like(before)], 1),
        }
        probabilities = model.generate(**batch, **options).logits[0].float().softmax(-1)
        found.append(
            torch.stack([probabilities[:, yes].sum(1), probabilities[:, no].sum(1)], 1).cpu()
        )
    model.train(was_training)
    return torch.cat(found).numpy() if found else np.zeros((0, 2))


def answer_tokens(processor):
    """(tokens that every answer begins with, ids that begin a yes, ids that begin a no), read from the chat template.

    With some tokenizers the space after "Assistant:" is a token of its own: it says nothing, so the answer is read after it.
    Raises ValueError when the template's text with an answer does not begin with the tokens of its text without one.
    """
    message, tokenizer = prompt_messages(""), processor.tokenizer
    texts = [processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)]
    texts += [
        processor.apply_chat_template(message + answer_messages(word), tokenize=False)
        for word in ("Yes", "yes", "No", "no")
    ]
    prompt, *answers = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    yes, no = answers[0], answers[2]
    first = next(i for i, (one, other) in enumerate(zip(yes, no, strict=False)) if one != other)
    if yes[: len(prompt)] != prompt or first < len(prompt):
        raise ValueError(
            f"the chat template changes the prompt when an answer follows: {texts[0]!r} is not how {texts[1]!r} begins"
        )
    spellings = [
        {row[first] for row in rows if row[:first] == yes[:first]}
        for rows in (answers[:2], answers[2:])
    ]
    return yes[len(prompt) : first], sorted(spellings[0]), sorted(spellings[1])


def rejections(answers, rows, judge, split=claims):
    """How many claims of each answer `judge` rejects; RLAIF-V's score of an answer is minus that.

    `answers`: per row a list of texts; the counts come nested in the same way. `split`: what makes claims of a text.
    """
    made = [[split(text) for text in texts] for texts in answers]
    told = [
        (claim, row)
        for texts, row in zip(made, rows, strict=True)
        for said in texts
        for claim in said
    ]
    verdicts = judge([claim for claim, _ in told], [row for _, row in told])
    if len(verdicts) != len(told):
        raise ValueError(
            f"the judge gave {len(verdicts)} verdicts on {len(told)} claims: it must give one for each, in their order"
        )
    accepted = iter(verdicts)
    return [[sum(not next(accepted) for _ in said) for said in texts] for texts in made]


def mistakes(answers, rows):
    """As `rejections` by the truth, and for descriptions the objects left out as well: wrong claims alone would reward silence."""
    counts = rejections(answers, rows, truth_judge)
    for texts, row, counted in zip(answers, rows, counts, strict=True):
        if row["question"] in DESCRIBE:
            counted[:] = [
                wrong + len(left_out(text, row["objects"]))
                for wrong, text in zip(counted, texts, strict=True)
            ]
    return counts


def sentences(text):
    """`text` cut into sentences: claims about any picture, where nothing better splits them. A full stop alone is none."""
    return [sentence.strip() for sentence in re.findall(r"[^.!?\s][^.!?\n]*[.!?]*", text)]


def candidates(texts, counts):
    """All pairs (chosen, rejected) of answers to one question whose counts of mistakes differ by 1 or more.

    Equal answers are one; an empty answer is left out, because it would be no pair to train on.
    """
    counted = {text: count for text, count in zip(texts, counts, strict=True) if text.strip()}
    return [
        (better, worse)
        for better, worse in permutations(counted, 2)
        if counted[better] < counted[worse]
    ]


def pair_up(texts, counts, rng):
    """At most two of the `candidates`, drawn at random, as RLAIF-V does: one question must not outweigh all others."""
    pairs = candidates(texts, counts)
    return rng.sample(pairs, min(2, len(pairs)))


def pair_all(rows, answers, counts, rng):
    """`pair_up` for the `answers` to every row: a list of {"row" (its number), "question", "chosen", "rejected"}."""
    return [
        {"row": number, "question": row["question"], "chosen": chosen, "rejected": rejected}
        for number, (row, texts, counted) in enumerate(zip(rows, answers, counts, strict=True))
        for chosen, rejected in pair_up(texts, counted, rng)
    ]


def pair_with_best(texts, counts, rng):
    """The best answer against a worse one that is longer, and against a worse one that is not: as the embedded data set was made.

    At most two (chosen, rejected). Answers that claim nothing are left out, or silence would be best.
    """
    scored = sorted(
        {(count, text) for text, count in zip(texts, counts, strict=True) if claims(text)}
    )
    if not scored:
        return []
    fewest = scored[0][0]
    chosen = rng.choice([text for count, text in scored if count == fewest])
    worse = [text for count, text in scored if count > fewest]
    longer = [text for text in worse if len(text.split()) > len(chosen.split())]
    others = [text for text in worse if text not in longer]
    return [(chosen, rng.choice(texts)) for texts in (longer, others) if texts]


def gap(pair):
    """By how many words the rejected answer of `pair` is longer than the chosen one."""
    return len(pair["rejected"].split()) - len(pair["chosen"].split())


def balance_by_threshold(pairs):
    """(RLAIF-V's balanced pairs, r): those dropped in which the rejected answer is longer by more than the share r of its length.

    r: the one of 0, 0.02, … 0.98 with which both sides' mean lengths come closest. ValueError when there is no pair within 0.98.
    """
    shares = [gap(pair) / len(pair["rejected"].split()) for pair in pairs]
    kept = {
        r / 50: [pair for pair, share in zip(pairs, shares, strict=True) if share <= r / 50]
        for r in range(50)
    }
    best = min(
        (r for r in kept if kept[r]), key=lambda r: abs(mean(map(gap, kept[r]))), default=None
    )
    if best is None:
        raise ValueError(
            "there is no pair to balance: sample more answers, or look at what the judge rejects"
        )
    return kept[best], best


def balance_at_random(pairs, rng):
    """Drop pairs at random from the side that has too many until chosen and rejected answers are equally long on average."""
    pairs = list(pairs)
    rng.shuffle(pairs)
    total, kept = sum(map(gap, pairs)), []
    for pair in pairs:
        if total and gap(pair) * total > 0 and abs(total - gap(pair)) < abs(total):
            total -= gap(pair)
        else:
            kept.append(pair)
    return kept


def to_dataset(scenes, pairs):
    """A data set of the pairs from `pair_all`, "row" counted in `scenes`. Images are taken over as stored: none is decoded."""
    images = scenes.select_columns(["image"]).select([pair["row"] for pair in pairs])
    texts = Dataset.from_list([{column: pair[column] for column in TEXT_COLUMNS} for pair in pairs])
    return concatenate_datasets([images, texts], axis=1)

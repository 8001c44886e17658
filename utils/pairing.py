"""Make preference pairs from a model's own answers, as RLAIF-V does (Yu et al. 2024).

Split each answer into claims, judge each claim, score the answers, pair them, balance the lengths.

A claim is a sentence, or whatever another splitter makes of a text. A row is a dict with `image`
or whatever else the judge looks at. A judge is a function `judge(claims, rows)` of two lists of
the same length. It returns for each claim, and the row it is about, whether it accepts the claim.
"""

import re
from itertools import permutations
from statistics import mean

from datasets import Dataset, concatenate_datasets

from utils.generation import yes_and_no
from utils.preferences import TEXT_COLUMNS


def model_judge(settings, model, processor, claims, rows, as_question=None):
    """Let a model look: ask it about each claim, with the `image` of the claim's row.

    Returns a list of verdicts. The same question about the same row is asked once. To get a judge
    of two arguments, fix the others with `functools.partial`. For `as_question` see `question_of`.
    """
    numbers = {}  # (row, question) → its number among the questions that are asked
    images = []
    questions = []
    wanted = []  # (number of the question, answer that confirms the claim) for each claim
    for claim, row in zip(claims, rows, strict=True):
        question, expected = question_of(claim, as_question)
        key = (id(row), question)
        if key not in numbers:
            numbers[key] = len(questions)
            images.append(row["image"])
            questions.append(question)
        wanted.append((numbers[key], expected))

    probabilities = yes_and_no(settings, model, processor, images, questions)
    verdicts = []
    for number, expected in wanted:
        p_yes, p_no = probabilities[number]
        verdicts.append(accepts(p_yes, p_no, expected))
    return verdicts


def accepts(p_yes, p_no, expected="yes"):
    """Return whether the `expected` answer is strictly more probable than the other.

    A tie is a rejection, as in RLAIF-V.
    """
    if expected == "yes":
        return bool(p_yes > p_no)
    return bool(p_no > p_yes)


def question_of(claim, as_question=None):
    """Return `claim` as a yes/no question, and the answer that confirms it: "yes" or "no".

    A string is a sentence. `as_question(claim)` does the same for claims of any other kind.
    """
    if isinstance(claim, str):
        return sentence_question(claim), "yes"
    return as_question(claim)


def sentence_question(sentence):
    """Return the question whether `sentence` is true of the image."""
    return f"Is this true of the image? {sentence}"


def rejections(answers, rows, judge, split):
    """Count the claims of each answer that `judge` rejects. RLAIF-V's score is minus that count.

    `answers` holds a list of texts for each row, and the counts are nested in the same way.
    `split(text)` returns the claims of a text. Raises ValueError if the judge does not give one
    verdict for each claim.
    """
    # One list of all claims, so that a model can judge them in full batches.
    claims = []
    rows_of_claims = []
    claims_per_answer = []
    for texts, row in zip(answers, rows, strict=True):
        for text in texts:
            made = split(text)
            claims.extend(made)
            rows_of_claims.extend([row] * len(made))
            claims_per_answer.append(len(made))

    verdicts = judge(claims, rows_of_claims)
    if len(verdicts) != len(claims):
        raise ValueError(
            f"the judge returned {len(verdicts)} verdicts for {len(claims)} claims: "
            "it must return one verdict per claim, in the order of the claims"
        )

    # Count answer by answer: each has the next verdicts, as many as it has claims.
    sizes = iter(claims_per_answer)
    start = 0
    counts = []
    for texts in answers:
        counted = []
        for _ in texts:
            end = start + next(sizes)
            counted.append(sum(not verdict for verdict in verdicts[start:end]))
            start = end
        counts.append(counted)
    return counts


def sentences(text):
    """Cut `text` into sentences, the claims to use where nothing better splits an answer.

    A period alone is no sentence.
    """
    found = re.findall(r"[^.!?\s][^.!?\n]*[.!?]*", text)
    return [sentence.strip() for sentence in found]


def candidates(texts, counts):
    """Return all (chosen, rejected) of one question whose counts of mistakes differ by 1 or more.

    Equal answers are one answer. Empty answers are left out: nobody can train on them.
    """
    counted = {text: count for text, count in zip(texts, counts, strict=True) if text.strip()}
    pairs = []
    for better, worse in permutations(counted, 2):
        if counted[better] < counted[worse]:
            pairs.append((better, worse))
    return pairs


def pair_up(texts, counts, rng):
    """Draw at most two of the `candidates` at random, as RLAIF-V does.

    One question must not outweigh all others.
    """
    pairs = candidates(texts, counts)
    return rng.sample(pairs, min(2, len(pairs)))


def pair_all(rows, answers, counts, rng):
    """Pair the answers to every row: a list of {"row", "question", "chosen", "rejected"}.

    "row" is the row's number.
    """
    pairs = []
    for number, (row, texts, counted) in enumerate(zip(rows, answers, counts, strict=True)):
        for chosen, rejected in pair_up(texts, counted, rng):
            pair = {
                "row": number,
                "question": row["question"],
                "chosen": chosen,
                "rejected": rejected,
            }
            pairs.append(pair)
    return pairs


def gap(pair):
    """Return by how many words the rejected answer of `pair` is longer than the chosen one."""
    return len(pair["rejected"].split()) - len(pair["chosen"].split())


def balance_by_threshold(pairs):
    """Balance the lengths as RLAIF-V does, and return (the pairs kept, the threshold r).

    A pair is dropped if its rejected answer is longer than the chosen one by more than the share r
    of its own length. Of 0, 0.02, … 0.98, r is the value that brings the mean lengths of both sides
    closest together. Raises ValueError if no pair stays even with 0.98.
    """
    shares = [gap(pair) / len(pair["rejected"].split()) for pair in pairs]
    smallest = None
    best = None
    for step in range(50):
        threshold = step / 50
        # The pairs that go first are those that teach most strongly to prefer a short answer.
        kept = [pair for pair, share in zip(pairs, shares, strict=True) if share <= threshold]
        if not kept:
            continue
        difference = abs(mean(map(gap, kept)))
        if smallest is None or difference < smallest:
            smallest = difference
            best = (kept, threshold)
    if best is None:
        raise ValueError(
            "there is no pair to balance: sample more answers, or check what the judge rejects"
        )
    return best


def balance_at_random(pairs, rng):
    """Drop pairs at random until chosen and rejected answers are equally long on average.

    Only pairs that make the longer side longer are dropped. Returns the others in random order.
    """
    pairs = list(pairs)
    rng.shuffle(pairs)
    total = sum(map(gap, pairs))  # by how many words the rejected answers are longer in all
    kept = []
    for pair in pairs:
        words = gap(pair)
        same_side = words * total > 0  # this pair is part of what is too long
        if same_side and abs(total - words) < abs(total):
            total -= words
        else:
            kept.append(pair)
    return kept


def to_dataset(scenes, pairs):
    """Return a data set of the pairs from `pair_all`; "row" counts the rows of `scenes`.

    Images are copied as stored. None is decoded.
    """
    rows = [pair["row"] for pair in pairs]
    images = scenes.select_columns(["image"]).select(rows)
    texts = Dataset.from_list(pairs).select_columns(list(TEXT_COLUMNS))
    return concatenate_datasets([images, texts], axis=1)

"""Make preference pairs from a model's own answers, as RLAIF-V does (Yu et al. 2024).

Split each answer into claims, judge each claim, score the answers, pair them, balance the lengths.

A claim is a sentence, or whatever another splitter makes of a text. A row is a dict with `image`
or whatever else the judge looks at. A judge is a function `judge(claims, rows)` of two lists of
the same length. It returns for each claim, and the row it is about, whether it accepts the claim.
"""

import re
from itertools import permutations, product
from statistics import mean

from datasets import Dataset, concatenate_datasets

from utils.generation import generated, processed_once
from utils.judging import yes_and_no
from utils.layouts import as_rows
from utils.preferences import special_tokens

LIST_CLAIMS = (
    "List what this text says about the image, one claim a line. Each line is a short sentence "
    "that can be understood alone.\n\n{text}"
)
# What begins an item of a list or a heading, and is no claim: -, *, •, #, 1., (2) or a).
MARKER = re.compile(r"(?:[-*•·–—]|#{1,6}|\(?\d{1,3}[.)]|\(?[a-zA-Z]\))(?:\s+|$)")
# Where a sentence ends and the splitter does not see it.
MISSED_ENDS = re.compile(
    r"(?<=[:;])\s+(?=\(?\d{1,3}[.)]\s)"  # before a list that goes on in the same line
    r"|(?<=[a-z]{3}[.!?])(?=[A-Za-z]{4})"  # "a cup.There": the space is missing
    r"|(?<=\s[a-z]\.)\s+(?=[A-Z])"  # "there is a. At": no initial is lowercase
    r"|(?<=\.[?!])\s+"  # "a cup.? a dog"
)
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")  # Chinese and Japanese have no spaces
CUT = "were cut before their end"
REPEATS = "repeat themselves"
CLAIMS_NOTHING = "claim nothing"
SPECIAL = "contain a special token of the judge"


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

    Arguments and errors are those of `judged`, and the counts are nested as `answers`.
    """
    counts = []
    for of_row in judged(answers, rows, judge, split):
        counts.append([rejected(told) for told in of_row])
    return counts


def rejected(told):
    """Return how many of the claims [(claim, verdict)] of an answer were rejected."""
    return sum(not verdict for _, verdict in told)


def judged(answers, rows, judge, split):
    """Return the claims of each answer with their verdicts, [(claim, verdict)].

    `answers` holds a list of texts for each row, and the result is nested in the same way.
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

    # Go through it answer by answer: each has the next verdicts, as many as it has claims.
    told = list(zip(claims, verdicts, strict=True))
    sizes = iter(claims_per_answer)
    start = 0
    nested = []
    for texts in answers:
        of_row = []
        for _ in texts:
            end = start + next(sizes)
            of_row.append(told[start:end])
            start = end
        nested.append(of_row)
    return nested


def splitter():
    """Return the function that cuts a text into sentences: of a language code and the text.

    Raises ImportError where its package is not installed.
    """
    # sentencex is maintained by Wikimedia, needs neither a model nor another package, and was the
    # only one of four that keeps "Dr. Smith", "e.g. a cup" and "1. A cup" whole, ends sentences at
    # 。 and loses no character. pysbd loses some and was last released in 2021, syntok knows no 。,
    # and blingfire makes claims of the numbers of a list.
    try:
        from sentencex import segment
    except ImportError as error:
        raise ImportError(
            "cutting answers into sentences needs a small package: `pip install sentencex`"
        ) from error
    return segment


def sentences(text):
    """Cut `text` into sentences, the claims to use where nothing better splits an answer.

    The end of a line ends a sentence, too. What begins an item of a list is left out, and so is
    what holds no letter and no digit. Abbreviations are those of English; full stops are those of
    any language. Raises ImportError where `splitter` does.
    """
    segment = splitter()
    found = []
    for line in MISSED_ENDS.sub("\n", text).splitlines():
        for piece in segment("en", line.strip()):
            sentence = without_marker(piece)
            if any(character.isalnum() for character in sentence):
                found.append(sentence)
    return found


def without_marker(line):
    """Return a line without the space around it and without what begins an item of a list."""
    rest = line.strip()
    while marker := MARKER.match(rest):
        rest = rest[marker.end() :]
    return rest


def listed_claims(settings, model, processor, texts, image):
    """Ask a model to list the claims of each of the `texts` about `image`, as RLAIF-V does.

    Returns a list of claims for each text, or None where the answer is `unfit` or no list.
    """
    questions = [LIST_CLAIMS.format(text=text) for text in texts]
    with processed_once(processor):
        answers = generated(settings, model, processor, [image] * len(texts), questions)
    tokens = special_tokens(processor)
    found = []
    for text, answer in zip(texts, answers, strict=True):
        found.append(None if unfit(answer, tokens) else claims_in_list(text, answer["text"]))
    return found


def claims_in_list(text, answer):
    """Return the lines of a model's `answer` to the request to list the claims of `text`.

    Headings are left out. Returns None for what is no list of them: nothing, or a single line
    where the text has several sentences.
    """
    claims = []
    for line in answer.splitlines():
        claim = without_marker(line)
        if has_letter(claim) and not claim.endswith(":"):
            claims.append(claim)
    if not claims or (len(claims) == 1 and len(sentences(text)) > 1):
        return None
    return list(dict.fromkeys(claims))


def unfit(answer, tokens=()):
    """Return why an answer, {"text", "ended"}, is no candidate for a pair, or None if it is one.

    `tokens` are special tokens, which the judge could not be asked about.
    An answer without a claim has no wrong claim, so it would win. From a chosen answer that was
    cut, the model would learn to stop in the middle.
    """
    if not has_letter(answer["text"]):
        return CLAIMS_NOTHING
    if repeats_itself(answer["text"]):
        return REPEATS
    if not answer["ended"]:
        return CUT
    if any(token in answer["text"] for token in tokens):
        return SPECIAL
    return None


def has_letter(text):
    """Return whether `text` has a letter. Without one it claims nothing, like "!!!!!!"."""
    return any(character.isalpha() for character in text)


def repeats_itself(text):
    """Return whether the same words come three times in a row: one word, a sentence, or more."""
    words = WORD.findall(text.lower())
    for length in range(1, len(words) // 3 + 1):
        equal = 0  # how many words in a row are equal to those `length` words later
        for word, later in zip(words, words[length:], strict=False):
            equal = equal + 1 if word == later else 0
            if equal == 2 * length:
                return True
    return False


def candidates(texts, counts):
    """Return all (chosen, rejected) of one question whose counts of mistakes differ by 1 or more.

    Equal answers are one answer. Answers without a letter are left out: they claim nothing.
    """
    counted = {text: count for text, count in zip(texts, counts, strict=True) if has_letter(text)}
    pairs = []
    for better, worse in permutations(counted, 2):
        if counted[better] < counted[worse]:
            pairs.append((better, worse))
    return pairs


def sentence_candidates(texts, told):
    """Return all (chosen, rejected) that begin alike and then have one right, one wrong sentence.

    `texts` are answers to one question, `told` their sentences, [(sentence, verdict)] for each.
    Both sides end after that sentence. Whether their beginning is right makes no difference, as
    DPO trains only what sets the two apart.
    """
    next_sentences = {}  # beginning → {beginning and next sentence: the verdict about the latter}
    for text, of_text in zip(texts, told, strict=True):
        end = 0
        for sentence, verdict in of_text:
            beginning = text[:end]
            end = text.index(sentence, end) + len(sentence)
            next_sentences.setdefault(beginning, {})[text[:end]] = verdict
    pairs = []
    for verdicts in next_sentences.values():
        right = [text for text, verdict in verdicts.items() if verdict]
        wrong = [text for text, verdict in verdicts.items() if not verdict]
        pairs += product(right, wrong)
    return pairs


def pair_up(texts, counts, rng):
    """Draw at most two of the `candidates` at random, as RLAIF-V does."""
    return draw_two(candidates(texts, counts), rng)


def draw_two(pairs, rng):
    """Draw at most two pairs at random: one question must not outweigh all others."""
    return rng.sample(pairs, min(2, len(pairs)))


def pair_all(rows, answers, counts, rng):
    """Pair the answers to every row: a list of {"row", "question", "chosen", "rejected"}.

    "row" is the row's number.
    """
    drawn = []
    for texts, counted in zip(answers, counts, strict=True):
        drawn.append(pair_up(texts, counted, rng))
    return numbered_pairs(rows, drawn)


def pair_sentences(rows, answers, told, rng):
    """Pair single sentences of the answers, by `sentence_candidates`; as `pair_all` returns them.

    `told` is what `judged` returns for the answers, with `sentences` as `split`.
    """
    drawn = []
    for texts, of_row in zip(answers, told, strict=True):
        drawn.append(draw_two(sentence_candidates(texts, of_row), rng))
    return numbered_pairs(rows, drawn)


def numbered_pairs(rows, drawn):
    """Return the pairs (chosen, rejected) `drawn` for each row as `pair_all` does."""
    pairs = []
    for number, (row, of_row) in enumerate(zip(rows, drawn, strict=True)):
        for chosen, rejected_answer in of_row:
            pair = {
                "row": number,
                "question": row["question"],
                "chosen": chosen,
                "rejected": rejected_answer,
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
    """Return the pairs from `pair_all` as TRL's rows; "row" counts the rows of `scenes`.

    The column `image` of `scenes` is copied as stored. None is decoded.
    """
    rows = [pair["row"] for pair in pairs]
    images = scenes.select_columns(["image"]).select(rows)
    texts = Dataset.from_list(pairs).select_columns(["question", "chosen", "rejected"])
    return as_rows(concatenate_datasets([images, texts], axis=1))

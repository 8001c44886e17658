"""What an answer claims about a drawn scene, and which of its claims are true.

A claim is {"kind", "category", "value", "start", "end"}. Its kind is "object" (the value says
whether it is there), "colour", "place" (category None: nothing is there) or "count" (category
None). `start` and `end` are the characters in the text that make the claim.
"""

import re

from embedded.scenes import CATEGORIES, COLORS, NUMBERS, PLACES, article, existence_question

SYNONYMS = {"mug": "cup", "automobile": "car"}  # what people and larger models also call them

_SINGULAR = {category: category for category in CATEGORIES} | SYNONYMS
_PLURAL = {f"{word}s": category for word, category in _SINGULAR.items()}
_CATEGORY = _SINGULAR | _PLURAL  # every word that names a category → the category

_WORDS = re.compile(r"[A-Za-z]+")
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]?")
# Ignoring case would make "ı" and "ſ" equal to "i" and "s", so that "rıght" were a place and
# "ſix" a number. (?a:…) keeps to ASCII.
_LONGEST_FIRST = "|".join(sorted(PLACES, key=len, reverse=True))
_PLACE = re.compile(rf"\b(?a:({_LONGEST_FIRST}))\b", re.IGNORECASE)
_COUNT = re.compile(rf"\b(?a:({'|'.join(NUMBERS[1:])}) objects?)\b", re.IGNORECASE)


def mentions(text):
    """Return the categories named in `text`, every occurrence, in order.

    "a red cup and two mugs" gives ["cup", "cup"].
    """
    named = []
    for word in _WORDS.findall(text):
        if word.lower() in _CATEGORY:
            named.append(_CATEGORY[word.lower()])
    return named


def claims(text):
    """Split `text` into claims that can be judged one by one, as RLAIF-V does.

    In a sentence with several objects, a color belongs to the next object and a place to none.
    The claims come in the order of the text.
    """
    found = []
    for sentence in _SENTENCE.finditer(text):
        for match, kind, category, value in _claims_of_sentence(sentence.group()):
            claim = {
                "kind": kind,
                "category": category,
                "value": value,
                "start": sentence.start() + match.start(),
                "end": sentence.start() + match.end(),
            }
            found.append(claim)
    return sorted(found, key=lambda claim: claim["start"])


def _claims_of_sentence(sentence):
    """Return (match, kind, category, value) for every claim of one sentence."""
    words = list(_WORDS.finditer(sentence))
    objects = [word for word in words if word.group().lower() in _CATEGORY]
    negated = any(word.group().lower() in ("no", "not") for word in words)
    found = []
    for word in objects:
        found.append((word, "object", _CATEGORY[word.group().lower()], not negated))

    if objects and not negated:
        for word in words:
            color = word.group().lower()
            if color in COLORS:
                # Its object is the next one. After the last object ("the cup is red"), the last.
                later = [thing for thing in objects if thing.start() > word.start()]
                owner = later[0] if later else objects[-1]
                found.append((word, "colour", _CATEGORY[owner.group().lower()], color))

    places = list(_PLACE.finditer(sentence))
    if len(places) == 1:
        place = places[0].group().lower()
        if len(objects) == 1 and not negated:
            found.append((places[0], "place", _CATEGORY[objects[0].group().lower()], place))
        elif not objects and "nothing" in sentence.lower():
            found.append((places[0], "place", None, place))

    for match in _COUNT.finditer(sentence):
        found.append((match, "count", None, NUMBERS.index(match.group(1).lower())))
    return found


def is_right(claim, objects):
    """Return whether `claim` is true of a scene with these `objects`."""
    kind = claim["kind"]
    value = claim["value"]
    if kind == "count":
        return value == len(objects)
    if kind == "place" and claim["category"] is None:
        return all(thing["place"] != value for thing in objects)
    same = [thing for thing in objects if thing["category"] == claim["category"]]
    if kind == "object":
        return bool(same) == value
    return any(thing[kind] == value for thing in same)


def wrong_spans(text, objects):
    """Return the (start, end) characters of the wrong claims in `text`, for marking them."""
    spans = []
    for claim in claims(text):
        if not is_right(claim, objects):
            spans.append((claim["start"], claim["end"]))
    return spans


def left_out(text, objects):
    """Return the categories of the scene that `text` does not name."""
    named = mentions(text)
    return [thing["category"] for thing in objects if thing["category"] not in named]


def as_question(claim):
    """Return `claim` as a yes/no question, and the answer that confirms it.

    The answer is "no" for "there is no …", else "yes".
    """
    kind = claim["kind"]
    category = claim["category"]
    value = claim["value"]
    if kind == "object":
        return existence_question(category), "yes" if value else "no"
    if kind == "count":
        some = "Is there one object" if value == 1 else f"Are there {NUMBERS[value]} objects"
        return f"{some} in the image?", "yes"
    if kind == "colour":
        return f"Is there {article(value)} {value} {category} in the image?", "yes"
    thing = f"{article(category)} {category}" if category else "nothing"
    # "At the top left" begins a sentence, and is wanted in the middle of one.
    where = PLACES[value][0].lower() + PLACES[value][1:]
    return f"Is there {thing} {where} of the image?", "yes"

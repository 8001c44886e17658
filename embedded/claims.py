"""What an answer claims about a drawn scene, and which of its claims are true: the exact judge of the embedded world."""

import re

from embedded.scenes import CATEGORIES, COLOURS, NUMBERS, PLACES

SYNONYMS = {"mug": "cup", "automobile": "car"}  # what people and larger models also call them
_CATEGORY = {form: c for c in CATEGORIES for form in (c, c + "s")} | {
    w + s: c for w, c in SYNONYMS.items() for s in ("", "s")
}
_WORDS = re.compile(r"[A-Za-z]+")
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]?")
# (?a:…) because ignoring case otherwise makes "ı" and "ſ" equal to "i" and "s": "rıght" is no place, "ſix" no number.
_PLACE = re.compile(
    r"\b(?a:(" + "|".join(sorted(PLACES, key=len, reverse=True)) + r"))\b", re.IGNORECASE
)
_COUNT = re.compile(r"\b(?a:(" + "|".join(NUMBERS[1:]) + r") objects?)\b", re.IGNORECASE)


def mentions(text):
    """The categories named in `text`, every occurrence, in order: "a red cup and two mugs" → ["cup", "cup"]."""
    return [_CATEGORY[word.lower()] for word in _WORDS.findall(text) if word.lower() in _CATEGORY]


def claims(text):
    """What `text` says about the picture, piece by piece, as RLAIF-V splits answers into claims that can be judged alone.

    Each claim is {"kind", "category", "value", "start", "end"}: kind "object" (value: is it there?), "colour", "place"
    (category None: nothing is there) or "count" (category None); start and end are its characters in `text`. In a
    sentence with several objects a colour belongs to the next object, and a place to no one in particular.
    """
    found = []
    for sentence in _SENTENCE.finditer(text):
        start, said = sentence.start(), sentence.group()

        def claim(match, kind, category, value, start=start):
            found.append(
                {
                    "kind": kind,
                    "category": category,
                    "value": value,
                    "start": start + match.start(),
                    "end": start + match.end(),
                }
            )

        words = list(_WORDS.finditer(said))
        objects = [word for word in words if word.group().lower() in _CATEGORY]
        negated = any(word.group().lower() in ("no", "not") for word in words)
        for word in objects:
            claim(word, "object", _CATEGORY[word.group().lower()], not negated)
        for word in words:
            if word.group().lower() in COLOURS and objects and not negated:
                owner = next((o for o in objects if o.start() > word.start()), objects[-1])
                claim(word, "colour", _CATEGORY[owner.group().lower()], word.group().lower())
        places = list(_PLACE.finditer(said))
        if len(places) == 1 and len(objects) == 1 and not negated:
            claim(
                places[0], "place", _CATEGORY[objects[0].group().lower()], places[0].group().lower()
            )
        elif len(places) == 1 and not objects and "nothing" in said.lower():
            claim(places[0], "place", None, places[0].group().lower())
        for match in _COUNT.finditer(said):
            claim(match, "count", None, NUMBERS.index(match.group(1).lower()))
    return sorted(found, key=lambda c: c["start"])


def is_right(claim, objects):
    """Whether `claim` is true of a scene. `objects`: its truth, dicts with category, colour and place."""
    if claim["kind"] == "count":
        return claim["value"] == len(objects)
    if claim["kind"] == "place" and claim["category"] is None:
        return all(o["place"] != claim["value"] for o in objects)
    same = [o for o in objects if o["category"] == claim["category"]]
    if claim["kind"] == "object":
        return bool(same) == claim["value"]
    return any(o[claim["kind"]] == claim["value"] for o in same)


def wrong_spans(text, objects):
    """The (start, end) characters of the wrong claims in `text`, for marking them."""
    return [(c["start"], c["end"]) for c in claims(text) if not is_right(c, objects)]


def left_out(text, objects):
    """The categories of the scene that `text` does not name."""
    named = set(mentions(text))
    return [o["category"] for o in objects if o["category"] not in named]

"""The embedded world: what a scene holds, how people describe it, and which mistake is planted in what the base model reads.

A scene is a list of objects in reading order, each {"category", "colour", "place"}. Categories are COCO's, so that scorers
made for COCO understand them. Some objects often stand together (`COMPANIONS`): that habit is what the base model learns too well.
"""

import random

from embedded.drawing import CATEGORIES, COLOURS, draw

PLACES = {  # place → how a sentence about it begins
    "top left": "At the top left",
    "top": "At the top",
    "top right": "At the top right",
    "left": "On the left",
    "center": "In the center",
    "right": "On the right",
    "bottom left": "At the bottom left",
    "bottom": "At the bottom",
    "bottom right": "At the bottom right",
}
COMPANIONS = {
    "chair": "book",
    "cup": "bottle",
    "kite": "bird",
    "apple": "bowl",
    "umbrella": "car",
    "clock": "vase",
}
TOGETHER = (
    0.4  # how often the companion really is there; the rest of the time only habit puts it there
)
DESCRIBE = ["Describe the image.", "What is in the picture?", "What can you see in the image?"]
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def sample_scene(rng):
    """One to four objects of different categories, companions often together, in reading order."""
    size, categories = rng.randint(1, 4), []
    while len(categories) < size:
        category = rng.choice([c for c in CATEGORIES if c not in categories])
        categories.append(category)
        companion = COMPANIONS.get(category)
        if (
            companion
            and companion not in categories
            and len(categories) < size
            and rng.random() < TOGETHER
        ):
            categories.append(companion)
    rng.shuffle(categories)
    places = sorted(rng.sample(range(9), size))
    return [
        {"category": category, "colour": rng.choice(list(COLOURS)), "place": list(PLACES)[place]}
        for category, place in zip(categories, places, strict=True)
    ]


def scene_and_picture(seed, index):
    """Scene number `index` of the series `seed`, and its picture: the same on every machine."""
    rng = random.Random(f"{seed}-{index}")
    objects = sample_scene(rng)
    places = list(PLACES)
    cells = [(*divmod(places.index(o["place"]), 3), o["category"], o["colour"]) for o in objects]
    return objects, draw(cells, rng)


def article(word):
    return "an" if word[0] in "aeiou" else "a"


def describe(objects):
    """One sentence an object. The place comes first: a model can then look there before it has to name anything."""
    return " ".join(
        f"{PLACES[o['place']]} there is a {o['colour']} {o['category']}." for o in objects
    )


def absent_companions(objects):
    """The categories that habit adds to this scene although they are not there."""
    present = {o["category"] for o in objects}
    return [
        COMPANIONS[c]
        for c in (o["category"] for o in objects)
        if c in COMPANIONS and COMPANIONS[c] not in present
    ]


def with_planted_mistakes(objects, rng, added, forgotten):
    """What a careless person would write down: absent companions named with probability `added`, objects left out with `forgotten`."""
    kept = [o for o in objects if rng.random() >= forgotten] or [rng.choice(objects)]
    free = [place for place in PLACES if place not in {o["place"] for o in objects}]
    rng.shuffle(free)
    habit = [
        {"category": category, "colour": rng.choice(list(COLOURS)), "place": free.pop()}
        for category in absent_companions(objects)
        if rng.random() < added
    ]
    return kept + habit


def existence_question(category):
    return f"Is there {article(category)} {category} in the image?"


def existence_answer(category, present):
    return (
        f"Yes, there is {article(category)} {category}."
        if present
        else f"No, there is no {category}."
    )


def colour_question(category):
    return f"What color is the {category}?"


def place_question(category):
    return f"Where is the {category}?"


COUNT_QUESTION = "How many objects are there?"


def question_about(objects, rng, added=0.0, forgotten=0.0):
    """A question other than "describe", and its answer: what is where, is there one, which colour, how many."""
    kind = rng.choices(["place", "where", "existence", "colour", "count"], [4, 4, 10, 1, 1])[0]
    object_ = rng.choice(objects)
    if kind == "place":
        at = {o["place"]: o for o in objects}
        place = rng.choice(list(PLACES)) if rng.random() < 0.4 else object_["place"]
        there = f"a {at[place]['colour']} {at[place]['category']}" if place in at else "nothing"
        return f"What is at the {place}?", f"{PLACES[place]} there is {there}."
    if kind == "where":
        return place_question(
            object_["category"]
        ), f"The {object_['category']} is {PLACES[object_['place']].lower()}."
    if kind == "colour":
        return colour_question(
            object_["category"]
        ), f"The {object_['category']} is {object_['colour']}."
    if kind == "count":
        number = NUMBERS[len(objects)]
        return (
            COUNT_QUESTION,
            f"There {'is' if number == 'one' else 'are'} {number} object{'s' * (number != 'one')}.",
        )
    if rng.random() < 0.5:
        return existence_question(object_["category"]), existence_answer(
            object_["category"], rng.random() >= forgotten
        )
    habit, absent = (
        absent_companions(objects),
        [c for c in CATEGORIES if c not in {o["category"] for o in objects}],
    )
    category = rng.choice(habit) if habit and rng.random() < 0.25 else rng.choice(absent)
    return existence_question(category), existence_answer(
        category, category in habit and rng.random() < added
    )

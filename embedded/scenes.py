"""The embedded world: what a scene holds, how people describe it, and which mistakes are planted.

A scene is a list of objects in reading order, each {"category", "colour", "place"}. The categories
are COCO's, so scorers made for COCO understand them. Some objects often appear together, see
`COMPANIONS`. That habit is what the base model learns too well.
"""

import random

from embedded.drawing import CATEGORIES, COLORS, draw

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
# How often the companion really is there. The rest of the time, only habit adds it.
TOGETHER = 0.4
DESCRIBE_QUESTIONS = [
    "Describe the image.",
    "What is in the picture?",
    "What can you see in the image?",
]
COUNT_QUESTION = "How many objects are there?"
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def sample_scene(rng):
    """Return one to four objects of different categories, companions often together."""
    size = rng.randint(1, 4)
    categories = []
    while len(categories) < size:
        category = rng.choice([c for c in CATEGORIES if c not in categories])
        categories.append(category)
        companion = COMPANIONS.get(category)
        possible = companion and companion not in categories and len(categories) < size
        # The draw must come last: where no companion is possible, none is made.
        if possible and rng.random() < TOGETHER:
            categories.append(companion)
    rng.shuffle(categories)
    names = list(PLACES)
    places = sorted(rng.sample(range(9), size))
    objects = []
    for category, place in zip(categories, places, strict=True):
        color = rng.choice(list(COLORS))
        objects.append({"category": category, "colour": color, "place": names[place]})
    return objects


def scene_and_image(seed, index):
    """Return scene number `index` of the series `seed` and its image, the same on every machine."""
    rng = random.Random(f"{seed}-{index}")
    objects = sample_scene(rng)
    names = list(PLACES)
    cells = []
    for thing in objects:
        row, column = divmod(names.index(thing["place"]), 3)
        cells.append((row, column, thing["category"], thing["colour"]))
    return objects, draw(cells, rng)


def article(word):
    """Return the indefinite article that goes before `word`."""
    return "an" if word[0] in "aeiou" else "a"


def true_description(objects):
    """Describe a scene truthfully, one sentence per object.

    The place comes first, so that a model can look there before it has to name anything.
    """
    sentences = []
    for thing in objects:
        where = PLACES[thing["place"]]
        sentences.append(f"{where} there is a {thing['colour']} {thing['category']}.")
    return " ".join(sentences)


def absent_companions(objects):
    """Return the categories that habit adds to this scene although they are not there."""
    present = [thing["category"] for thing in objects]
    companions = [COMPANIONS[category] for category in present if category in COMPANIONS]
    return [companion for companion in companions if companion not in present]


def with_planted_mistakes(objects, rng, added, forgotten):
    """Return the objects that a careless person would write down.

    Each absent companion is added with probability `added`. Each object is left out with
    probability `forgotten`, but one always stays.
    """
    kept = [thing for thing in objects if rng.random() >= forgotten]
    if not kept:
        kept = [rng.choice(objects)]
    taken = [thing["place"] for thing in objects]
    free = [place for place in PLACES if place not in taken]
    rng.shuffle(free)
    for category in absent_companions(objects):
        if rng.random() < added:
            color = rng.choice(list(COLORS))
            kept.append({"category": category, "colour": color, "place": free.pop()})
    return kept


def existence_question(category):
    """Return the question whether a `category` is in the image."""
    return f"Is there {article(category)} {category} in the image?"


def existence_answer(category, present):
    """Return the answer to `existence_question`: yes where `present`, else no."""
    if present:
        return f"Yes, there is {article(category)} {category}."
    return f"No, there is no {category}."


def color_question(category):
    """Return the question for the color of the `category`."""
    return f"What color is the {category}?"


def place_question(category):
    """Return the question for the place of the `category`."""
    return f"Where is the {category}?"


def question_about(objects, rng, added=0.0, forgotten=0.0):
    """Return a question that does not ask for a description, and its answer.

    It asks what is at a place, where something is, whether something is there, for a color or for
    the number of objects. `added` and `forgotten` are the probabilities with which an answer
    about existence claims an absent companion, or denies an object that is there.
    """
    kind = rng.choices(["place", "where", "existence", "color", "count"], [4, 4, 10, 1, 1])[0]
    thing = rng.choice(objects)
    category = thing["category"]
    if kind == "place":
        return _question_about_place(objects, thing, rng)
    if kind == "where":
        where = PLACES[thing["place"]].lower()
        return place_question(category), f"The {category} is {where}."
    if kind == "color":
        return color_question(category), f"The {category} is {thing['colour']}."
    if kind == "count":
        number = NUMBERS[len(objects)]
        answer = "There is one object." if number == "one" else f"There are {number} objects."
        return COUNT_QUESTION, answer
    if rng.random() < 0.5:
        remembered = rng.random() >= forgotten
        return existence_question(category), existence_answer(category, remembered)
    return _question_about_absent(objects, rng, added)


def _question_about_place(objects, thing, rng):
    """Return the question what is at a place, and its answer."""
    at = {other["place"]: other for other in objects}
    # Four in ten questions are about any place, which is often empty.
    place = rng.choice(list(PLACES)) if rng.random() < 0.4 else thing["place"]
    found = f"a {at[place]['colour']} {at[place]['category']}" if place in at else "nothing"
    return f"What is at the {place}?", f"{PLACES[place]} there is {found}."


def _question_about_absent(objects, rng, added):
    """Return the question whether something is there that is not, and its answer."""
    present = [thing["category"] for thing in objects]
    companions = absent_companions(objects)
    absent = [category for category in CATEGORIES if category not in present]
    if companions and rng.random() < 0.25:
        category = rng.choice(companions)
    else:
        category = rng.choice(absent)
    # The draw must come last: only a companion can be claimed by habit.
    claimed = category in companions and rng.random() < added
    return existence_question(category), existence_answer(category, claimed)

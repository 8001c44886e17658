"""Let a person judge some of the claims that a model judged, and tell how often the two agree.

`draw_claims` writes FOLDER/review.jsonl, one claim a line: {"image", "claim", "accepted",
"person"}. The first three come from the judge. "person" is null until somebody has accepted the
claim (true) or rejected it (false), in a notebook with `verdicts` or with any editor.
"""

import json
import os
import random
from pathlib import Path

import ipywidgets
from IPython.display import display

from utils.display import image_html, table_html, table_text, text_html
from utils.images import read_image
from utils.paired_statistics import share_interval

REVIEW_FILE = "review.jsonl"
SHOWN_PIXELS = 640 * 480  # of a picture on the screen
SHOWN_WIDTH = 480
# A judge that tosses coins is right about a share p of the accepted claims and 1 − p of the
# rejected ones, so about one of the two at most half the time. And if 80% of the verdicts are
# right, then of the pairs of an accepted and a rejected claim whose sides really differ,
# 0.8² / (0.8² + 0.2²) = 94% are the right way round; from 70% it would be 84%, from 60% 69%.
LEAST_SHARE = 0.8
CHANCE = 0.5


def draw_claims(folder, told, number, seed):
    """Draw `number` of the judge's verdicts and write them to FOLDER/review.jsonl. Return how many.

    `told` is a list of (image, claim, verdict). Half of the drawn are accepted claims and half
    rejected ones, as far as there are so many, in an order that does not tell which.
    """
    rng = random.Random(seed)
    told = list(dict.fromkeys(told))
    accepted = [each for each in told if each[2]]
    rejected = [each for each in told if not each[2]]
    of_rejected = min(len(rejected), max(number // 2, number - len(accepted)))
    of_accepted = min(len(accepted), number - of_rejected)
    drawn = rng.sample(accepted, of_accepted) + rng.sample(rejected, of_rejected)
    rng.shuffle(drawn)
    lines = []
    for image, claim, verdict in drawn:
        lines.append({"image": image, "claim": claim, "accepted": verdict, "person": None})
    write_lines(folder, lines)
    return len(lines)


def write_lines(folder, lines):
    """Write FOLDER/review.jsonl, whole or not at all."""
    path = Path(folder) / REVIEW_FILE
    texts = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    new = path.with_name(REVIEW_FILE + ".new")
    new.write_text("".join(texts), encoding="utf-8")
    os.replace(new, path)


def read_lines(folder):
    """Return the lines of FOLDER/review.jsonl as dicts.

    Raises FileNotFoundError without it, ValueError with the number of a line that is wrong.
    """
    path = Path(folder) / REVIEW_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: python -m scripts.make_pairs {folder} --review 40 draws it"
        )
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            sound = (
                isinstance(line["image"], str)
                and isinstance(line["claim"], str)
                and isinstance(line["accepted"], bool)
                and line["person"] in (None, True, False)
            )
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise ValueError(
                f"line {number} of {path} is not image, claim, accepted and person (true, false or "
                "null): mend it, or delete the file to draw it again"
            )
        lines.append(line)
    if not lines:
        raise ValueError(f"{path} has no line: delete it to draw it again")
    return lines


def agreement(folder):
    """Return how often the person agrees with the judge, for accepted and for rejected claims.

    {"accepted": {"claims", "right", "share", "low", "high"}, "rejected": …}: of the claims that
    both judged, how many the judge judged rightly, and the share with its 95% interval. The share
    is nan where there is no claim. Raises the errors of `read_lines`.
    """
    found = {}
    lines = read_lines(folder)
    for name, verdict in (("accepted", True), ("rejected", False)):
        persons = []
        for line in lines:
            if line["accepted"] == verdict and line["person"] is not None:
                persons.append(line["person"])
        right = persons.count(verdict)
        low, high = share_interval(right, len(persons))
        share = right / len(persons) if persons else float("nan")
        counted = {"claims": len(persons), "right": right, "share": share, "low": low, "high": high}
        found[name] = counted
    return found


def as_text(found):
    """Return what `agreement` found as one line."""
    parts = []
    for name, counted in found.items():
        part = f"of {counted['claims']} {name} claims the judge judged {counted['right']} rightly"
        if counted["claims"]:
            part += f" ({counted['low']:.0%} to {counted['high']:.0%})"
        parts.append(part)
    return "; ".join(parts)


def is_worth_training(found):
    """Return whether a judge with the agreement `found` gives pairs that are worth training on.

    It must be right about LEAST_SHARE of the accepted and of the rejected claims, and the intervals
    of both must be above CHANCE. Overall agreement would hide a judge that accepts everything.
    """
    for counted in found.values():
        if not (counted["share"] >= LEAST_SHARE and counted["low"] > CHANCE):
            return False
    return True


def verdicts(folder):
    """Display a widget that asks about each claim of FOLDER/review.jsonl, and saves every click.

    The judge's verdict is not shown: it would sway the person. Without a kernel, the first claim
    and a table of all remain. Raises the errors of `read_lines`.
    """
    lines = read_lines(folder)
    position = first_open(lines, 0)

    page = ipywidgets.HTML(value=page_html(folder, lines, position))
    accept = ipywidgets.Button(
        description="Accept", tooltip="The claim is true of the picture", button_style="success"
    )
    reject = ipywidgets.Button(
        description="Reject", tooltip="The claim is not true of the picture", button_style="danger"
    )
    previous_button = ipywidgets.Button(description="Previous", tooltip="Show the previous claim")
    next_button = ipywidgets.Button(description="Next", tooltip="Show the next claim")

    def go(to):
        nonlocal position
        position = to % len(lines)  # the first claim follows the last, so no button is disabled
        page.value = page_html(folder, lines, position)

    def judge(verdict):
        lines[position]["person"] = verdict
        write_lines(folder, lines)
        go(first_open(lines, position + 1))

    accept.on_click(lambda button: judge(True))
    reject.on_click(lambda button: judge(False))
    previous_button.on_click(lambda button: go(position - 1))
    next_button.on_click(lambda button: go(position + 1))
    controls = ipywidgets.HBox(
        [accept, reject, previous_button, next_button], layout={"flex_flow": "row wrap"}
    )
    box = ipywidgets.VBox([controls, page])
    rows = [table_row(line) for line in lines]
    caption = f"{len(lines)} claims to judge. Run this cell to accept or reject them."
    bundle = {
        "application/vnd.jupyter.widget-view+json": {
            "version_major": 2,
            "version_minor": 0,
            "model_id": box.model_id,
        },
        "text/html": page_html(folder, lines, position) + table_html(rows, caption),
        "text/plain": table_text(rows, caption),
    }
    display(bundle, raw=True)


def first_open(lines, start):
    """Return the position of the next claim from `start` on that nobody judged; else `start`."""
    for step in range(len(lines)):
        position = (start + step) % len(lines)
        if lines[position]["person"] is None:
            return position
    return start % len(lines)


def page_html(folder, lines, position):
    """Return one claim with its picture, what the person said about it, and how many are left."""
    line = lines[position]
    name = line["image"]
    try:
        image = read_image(str(picture_path(folder, name)), name, SHOWN_PIXELS)
        shown = image_html(image, width=min(SHOWN_WIDTH, image.width), alt=f"Picture {name}")
    except ValueError as error:
        shown = f"<p>{text_html(str(error))}</p>"
    done = sum(line["person"] is not None for line in lines)
    status = f"Claim {position + 1} of {len(lines)}, {done} judged. You said: {said(line)}."
    return (
        f'<p role="status">{status}</p><p>Is this true of the picture?<br>'
        f"<strong>{text_html(line['claim'])}</strong></p>{shown}"
    )


def picture_path(folder, name):
    """Return the path of the picture `name`. Raises ValueError if it is not within `folder`."""
    path = (Path(folder) / name).resolve()
    if not path.is_relative_to(Path(folder).resolve()):
        raise ValueError(f"{name} is outside {folder}: only its own pictures are shown")
    return path


def said(line):
    """Return what the person said about a claim."""
    return {None: "nothing yet", True: "accept", False: "reject"}[line["person"]]


def table_row(line):
    """Return a claim as a row of a table, without the judge's verdict."""
    return {"picture": line["image"], "claim": line["claim"], "you said": said(line)}

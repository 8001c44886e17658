"""What readers look at: pictures, preference pairs and tables as HTML, and a widget to leaf through pairs.

A data set's text is written by strangers, so every string is escaped. A notebook that is not trusted loses its <style> and
<script>, so <table> gives the layout and <ins> and <del> the marks. Text keeps the theme's colour, on translucent backgrounds.
"""

import base64
import difflib
import io
import itertools
import numbers
import re
from html import escape

import ipywidgets
from IPython.display import display
from PIL import Image

from utils.images import upright_rgb

TEXT_CELL = "text-align:left;vertical-align:top;padding:0.5em 0.8em;line-height:1.45"
PICTURE_CELL = "vertical-align:top;padding:0.5em 0.8em"
MARKS = {"ins": "background:rgba(0,158,115,0.28)", "del": "background:rgba(213,94,0,0.28)"}
KINDS = {  # kind of token → red, green and blue of its box, and the border that tells it without colour
    "prompt": ("128,128,128", "1px dotted"),
    "image": ("0,114,178", "3px double"),
    "chosen": ("0,158,115", "1px solid"),
    "rejected": ("213,94,0", "1px dashed"),
}
VISIBLE = str.maketrans({" ": "·", "\n": "↵"})


def text_html(text):
    """`text` escaped, with its line breaks kept; $ and \\ stand apart, or MathJax would typeset what is between them."""
    return re.sub(r"[$\\]", r"<span>\g<0></span>", escape(text, quote=True)).replace("\n", "<br>")


def image_html(image, width=216, alt=""):
    """An <img>, `width` pixels wide, that holds the PIL `image` itself; `image` is not changed.
    Shown upright and in RGB, as a model sees it, and as PNG or JPEG, whichever is smaller. Raises TypeError for anything but a PIL
    image, ValueError for one that `images.upright_rgb` refuses.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"a PIL image is needed, not {type(image).__name__}: decode the column, cast_column('image', datasets.Image())"
        )
    shown = upright_rgb(image)
    if shown.width > width:
        shown = shown.resize(
            (width, max(1, round(shown.height * width / shown.width))), Image.Resampling.LANCZOS
        )
    files = {}
    for kind in ("png", "jpeg"):
        file = io.BytesIO()
        shown.save(file, kind)
        files[kind] = file.getvalue()
    data = base64.b64encode(files[kind := min(files, key=lambda name: len(files[name]))]).decode()
    # Jupyter's max-width of 100 % would let a table squeeze the picture to nothing.
    return f'<img alt="{escape(alt, quote=True)}" width="{width}" style="max-width:none" src="data:image/{kind};base64,{data}">'


def mark_html(text, spans, tag="del"):
    """`text` escaped, with the character spans [(start, end), …] wrapped in `tag` ("ins" or "del").

    Raises ValueError for a span that is empty, reaches outside of the text or overlaps another.
    """
    if tag not in MARKS:
        raise ValueError(f"tag {tag!r} is not one of {', '.join(MARKS)}")
    parts, position = [], 0
    for start, end in sorted(spans):
        if not position <= start < end <= len(text):
            raise ValueError(
                f"span ({start}, {end}) is empty, overlaps another or leaves the {len(text)} characters of {text!r}"
            )
        parts += [
            text_html(text[position:start]),
            f'<{tag} style="{MARKS[tag]}">',
            text_html(text[start:end]),
            f"</{tag}>",
        ]
        position = end
    return "".join(parts) + text_html(text[position:])


def difference_html(text, other, tag):
    """`text` escaped, with the words that do not stand in `other` at the same point wrapped in `tag` ("ins" or "del")."""
    words, others = list(re.finditer(r"\w+|[^\w\s]", text)), re.findall(r"\w+|[^\w\s]", other)
    matcher = difflib.SequenceMatcher(
        None, [word.group() for word in words], others, autojunk=False
    )
    changes = [
        (first, last)
        for kind, first, last, _, _ in matcher.get_opcodes()
        if kind in ("replace", "delete")
    ]
    return mark_html(
        text, [(words[first].start(), words[last - 1].end()) for first, last in changes], tag
    )


def pair_html(row, title):
    """One preference pair: its image, question, chosen and rejected answer, with the words that differ marked.

    `row`: `image` (PIL), `question`, `chosen`, `rejected` (strings). Raises ValueError that names `title` if one is missing.
    """
    for column in ("question", "chosen", "rejected", "image"):
        if column not in row:
            raise ValueError(
                f"{title}: column {column!r} is missing, there are {', '.join(row)}: rename with rename_column"
            )
        if column != "image" and not isinstance(row[column], str):
            raise ValueError(
                f"{title}: {column!r} is of type {type(row[column]).__name__}: give text, not a list of messages"
            )
    lines = [
        f"<strong>{text_html(title)}</strong><br>{text_html(row['question'])}",
        f"<strong>✔ Chosen</strong><br>{difference_html(row['chosen'], row['rejected'], 'ins')}",
        f"<strong>✘ Rejected</strong><br>{difference_html(row['rejected'], row['chosen'], 'del')}",
    ]
    cells = [f'<td style="{TEXT_CELL};width:100%">{line}</td>' for line in lines]
    picture = image_html(row["image"], alt=f"Image for the question: {row['question']}")
    return f'<table><tr><td rowspan="3" style="{PICTURE_CELL}">{picture}</td>{"</tr><tr>".join(cells)}</tr></table>'


def show(html_text, text):
    """Display `html_text`, and plain `text` where HTML is not shown."""
    display({"text/html": html_text, "text/plain": text}, raw=True)


def browse(rows):
    """Display a widget that leafs through preference pairs; without a kernel, the first pair remains.

    `rows`: anything with len() and integer indexing, such as a datasets.Dataset; only the row on show is read.
    Raises ValueError if there is none.
    """
    if len(rows) == 0:
        raise ValueError(
            "there is no pair to browse: rows is empty, so check what was loaded or filtered"
        )
    count = len(rows)

    def render(number):
        return pair_html(rows[number - 1], f"Pair {number} of {count}")

    first = render(1)
    page = ipywidgets.HTML(value=first)
    number = ipywidgets.BoundedIntText(
        value=1, min=1, max=count, description="Pair", layout={"width": "12em"}
    )
    previous = ipywidgets.Button(description="Previous", tooltip="Show the previous pair")
    following = ipywidgets.Button(description="Next", tooltip="Show the next pair")
    # The ends are joined: a button that switched itself off at an end would drop the keyboard's focus.
    previous.on_click(lambda _: setattr(number, "value", (number.value - 2) % count + 1))
    following.on_click(lambda _: setattr(number, "value", number.value % count + 1))
    number.observe(lambda change: setattr(page, "value", render(change["new"])), "value")
    box = ipywidgets.VBox(
        [ipywidgets.HBox([previous, following, number], layout={"flex_flow": "row wrap"}), page]
    )
    # display(box) offers no HTML to those who see the notebook without a kernel, hence a bundle of our own.
    view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    text = f"{count} preference pairs; run this cell to leaf through them."
    display(
        {"application/vnd.jupyter.widget-view+json": view, "text/html": first, "text/plain": text},
        raw=True,
    )


def side_by_side_html(rows):
    """A table of answers by several models to the same images, wrong claims in <del>.

    `rows`: dicts with `image` (PIL), `truth` (string), `answers` (column name → (text, spans of wrong claims)) and perhaps `note`.
    Raises ValueError if there is no row, if answers have different column names, or for a wrong span.
    """
    if not rows:
        raise ValueError("there is nothing to show side by side: rows is empty")
    names, noted = list(rows[0]["answers"]), any("note" in row for row in rows)
    headers = ["Image", "Truth", *names] + ["Note"] * noted
    head = "".join(
        f'<th scope="col" style="{TEXT_CELL}">{text_html(header)}</th>' for header in headers
    )
    lines = []
    for index, row in enumerate(rows):
        if set(row["answers"]) != set(names):
            raise ValueError(
                f"row {index} has answers of {', '.join(row['answers'])}, row 0 of {', '.join(names)}: give all rows the same"
            )
        cells = [text_html(row["truth"]), *(mark_html(*row["answers"][name]) for name in names)] + [
            text_html(row.get("note", ""))
        ] * noted
        picture = image_html(row["image"], width=144, alt=f"Image that shows: {row['truth']}")
        lines.append(
            f'<td style="{PICTURE_CELL}">{picture}</td>'
            + "".join(f'<td style="{TEXT_CELL}">{cell}</td>' for cell in cells)
        )
    return f"<table><thead><tr>{head}</tr></thead><tbody><tr>{'</tr><tr>'.join(lines)}</tr></tbody></table>"


def token_box(text, kind):
    colour, border = KINDS[kind]
    style = f"background:rgba({colour},0.18);border:{border} rgba({colour},0.9);border-radius:3px;padding:1px 4px;font-family:monospace"
    return f'<span title="{kind}" style="display:inline-block;margin:1px;{style}">{text_html(text)}</span>'


def tokens_html(tokens, kinds):
    """`tokens` (strings) as boxes coloured by their `kinds` (prompt, image, chosen or rejected), with a legend.

    More than 3 equal ones in a row become one box "token × count". Raises ValueError for an unknown kind or unequal lengths.
    """
    if len(tokens) != len(kinds):
        raise ValueError(
            f"{len(tokens)} tokens have {len(kinds)} kinds: give one kind for each token"
        )
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"unknown kind {sorted(unknown)}: use one of {', '.join(KINDS)}")
    boxes = []
    for (token, kind), run in itertools.groupby(zip(tokens, kinds, strict=True)):
        text, count = token.translate(VISIBLE), len(list(run))
        boxes += (
            [token_box(text, kind)] * count
            if count <= 3
            else [token_box(f"{text} × {count}", kind)]
        )
        boxes += ["<br>"] * token.endswith("\n")
    legend = " ".join(token_box(kind, kind) for kind in KINDS if kind in kinds)
    return f'<div style="line-height:1.9">{"".join(boxes)}</div><p>Kinds: {legend}</p>'


def is_number(value):
    """Whether `value` is a number, or a text that a caller made of one, such as "−3.1 %" or "12.5 GB"."""
    return (
        isinstance(value, numbers.Number)
        or re.fullmatch(r"[-+−]?[\d.,]+ ?[%×\w]{0,3}", str(value)) is not None
    )


def table_html(rows, columns=None, caption=""):
    """`rows` (dicts) as a table of `columns` (by default all keys), columns of numbers to the right; values stand as given.

    Raises ValueError if there is no row or if a column stands in none.
    """
    present = dict.fromkeys(itertools.chain.from_iterable(rows))
    columns = list(present) if columns is None else columns
    if not rows or set(columns) - set(present):
        raise ValueError(
            f"rows have {', '.join(present) or 'no column'}, columns asks for {', '.join(columns) or 'none'}"
        )
    sides = {
        name: "right" if all(is_number(row[name]) for row in rows if name in row) else "left"
        for name in columns
    }
    head = "".join(
        f'<th scope="col" style="text-align:{sides[name]}">{text_html(str(name))}</th>'
        for name in columns
    )
    lines = [
        [
            f'<td style="text-align:{sides[name]}">{text_html(str(row.get(name, "")))}</td>'
            for name in columns
        ]
        for row in rows
    ]
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    title = f'<caption style="text-align:left">{text_html(caption)}</caption>' if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

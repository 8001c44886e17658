"""Show images, preference pairs and tables as HTML, and leaf through pairs with a widget.

A data set's text is written by strangers, so every string is escaped. A notebook that is not
trusted loses its <style> and <script>, so <table> gives the layout, and <ins> and <del> the marks.
Text keeps the theme's color, on translucent backgrounds.
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

from utils.images import read_image, upright_rgb
from utils.layouts import text_of

TEXT_CELL = "text-align:left;vertical-align:top;padding:0.5em 0.8em;line-height:1.45"
IMAGE_CELL = "vertical-align:top;padding:0.5em 0.8em"
SHOWN_PIXELS = 500_000  # to which an image is reduced when a pair is shown
MARKS = {"ins": "background:rgba(0,158,115,0.28)", "del": "background:rgba(213,94,0,0.28)"}
# Kind of token → red, green and blue of its box, and the border that shows the kind without color.
KINDS = {
    "prompt": ("128,128,128", "1px dotted"),
    "image": ("0,114,178", "3px double"),
    "chosen": ("0,158,115", "1px solid"),
    "rejected": ("213,94,0", "1px dashed"),
}
VISIBLE = str.maketrans({" ": "·", "\n": "↵"})
WORD = re.compile(r"\w+|[^\w\s]")
NUMBER = re.compile(r"[-+−]?[\d.,]+ ?[%×\w]{0,3}")  # also "−3.1 %" and "12.5 GB"


def show(html_text, text):
    """Display `html_text`, and plain `text` where HTML is not shown."""
    display({"text/html": html_text, "text/plain": text}, raw=True)


# Text and images


def text_html(text):
    """Return `text` escaped, with its line breaks kept.

    A $ or a \\ gets a <span> of its own, or MathJax would typeset what is between two of them.
    """
    escaped = escape(text, quote=True)
    without_formulas = re.sub(r"[$\\]", r"<span>\g<0></span>", escaped)
    return without_formulas.replace("\n", "<br>")


def encoded(image, kind):
    """Return the PIL `image` as the bytes of a file of `kind`, "png" or "jpeg"."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def image_html(image, width=216, alt=""):
    """Return an <img>, `width` pixels wide, that holds the PIL `image` itself.

    `image` is not changed. It is shown upright and in RGB, as a model sees it.
    Raises TypeError for anything but a PIL image, ValueError where `images.upright_rgb` does.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"expected a PIL image, got {type(image).__name__}: "
            "decode the column with cast_column('image', datasets.Image())"
        )
    shown = upright_rgb(image)
    if shown.width > width:
        height = max(1, round(shown.height * width / shown.width))
        shown = shown.resize((width, height), Image.Resampling.LANCZOS)
    # Drawings are smaller as PNG, photographs as JPEG. Try both.
    kind = "png"
    data = encoded(shown, "png")
    jpeg = encoded(shown, "jpeg")
    if len(jpeg) < len(data):
        kind = "jpeg"
        data = jpeg
    # Jupyter sets max-width to 100 %, which would let a table squeeze the image to nothing.
    return (
        f'<img alt="{escape(alt, quote=True)}" width="{width}" style="max-width:none" '
        f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
    )


# Marked text


def cut_at_spans(text, spans):
    """Return `text` in pieces [(piece, whether it lies in a span)].

    `spans`: character positions [(start, end), …] in any order. Raises ValueError for a span that
    is empty, reaches outside the text or overlaps another.
    """
    pieces = []
    position = 0
    for start, end in sorted(spans):
        if not position <= start < end <= len(text):
            raise ValueError(
                f"span ({start}, {end}) is empty, overlaps another span or reaches outside "
                f"the {len(text)} characters of {text!r}"
            )
        pieces.append((text[position:start], False))
        pieces.append((text[start:end], True))
        position = end
    pieces.append((text[position:], False))
    return pieces


def mark_html(text, spans, tag="del"):
    """Return `text` escaped, with the character `spans` [(start, end), …] wrapped in `tag`.

    `tag`: "ins" or "del". Raises ValueError for another tag and where `cut_at_spans` does.
    """
    if tag not in MARKS:
        raise ValueError(f"tag {tag!r} is not one of {', '.join(MARKS)}")
    page = ""
    for piece, is_marked in cut_at_spans(text, spans):
        if is_marked:
            page += f'<{tag} style="{MARKS[tag]}">{text_html(piece)}</{tag}>'
        else:
            page += text_html(piece)
    return page


def mark_text(text, spans):
    """Return `text` with the character `spans` in double brackets, for where HTML is not shown."""
    marked = ""
    for piece, is_marked in cut_at_spans(text, spans):
        marked += f"[[{piece}]]" if is_marked else piece
    return marked


def difference_html(text, other, tag):
    """Return `text` escaped, with the words that `other` lacks at that point wrapped in `tag`."""
    words = list(WORD.finditer(text))
    other_words = WORD.findall(other)
    matcher = difflib.SequenceMatcher(
        None, [word.group() for word in words], other_words, autojunk=False
    )
    spans = []
    for kind, first, last, _, _ in matcher.get_opcodes():
        if kind in ("replace", "delete"):
            spans.append((words[first].start(), words[last - 1].end()))
    return mark_html(text, spans, tag)


# Preference pairs


def pair_html(row, title):
    """Return one preference pair as a table: its images, its turns, and both answers.

    `row`: as `preferences.load` or `chat.format_dataset` returns it. The words in which the answers
    differ are marked. What is wrong with a row, or with one of its images, is shown in its place.
    Raises ValueError that names `title` and the column that is missing.
    """
    for column in ("images", "prompt", "chosen", "rejected"):
        if column not in row:
            raise ValueError(
                f"{title}: column {column!r} is missing, the columns are {', '.join(row)}: "
                "read the data set with preferences.load"
            )
    lines = [f"<strong>{text_html(title)}</strong>"]
    if row.get("problem"):
        lines.append(f"This row cannot be read: {text_html(row['problem'])}")
    lines.extend(turns_html(row["prompt"]))
    texts = {name: text_of(row[name]) for name in ("chosen", "rejected")}
    chosen = difference_html(texts["chosen"], texts["rejected"], "ins")
    rejected = difference_html(texts["rejected"], texts["chosen"], "del")
    lines.append(f"<strong>✔ Chosen</strong><br>{chosen}")
    lines.append(f"<strong>✘ Rejected</strong><br>{rejected}")
    cells = [f'<td style="{TEXT_CELL};width:100%">{line}</td>' for line in lines]
    images = "<br>".join(images_html(row))
    return (
        f'<table><tr><td rowspan="{len(cells)}" style="{IMAGE_CELL}">{images}</td>'
        f"{'</tr><tr>'.join(cells)}</tr></table>"
    )


def images_html(row):
    """Return every image of a row as HTML, and in the place of one that cannot be read, why."""
    shown = []
    count = len(row["images"])
    question = text_of(row["prompt"][-1:])
    for number, stored in enumerate(row["images"], start=1):
        name = "Image" if count == 1 else f"Image {number} of {count}"
        try:
            image = read_image(stored, name, SHOWN_PIXELS)
        except ValueError as error:
            shown.append(text_html(str(error)))
            continue
        shown.append(image_html(image, alt=f"{name} for the question: {question}"))
    return shown or ["(no image)"]


def turns_html(messages):
    """Return each turn of a prompt as HTML, with a mark where an image has its place.

    A single image before the text needs no mark, nor does the user's only turn its role.
    """
    images = 0
    for turn in messages:
        images += sum(part["type"] == "image" for part in turn["content"])
    shown = []
    number = 0
    for turn in messages:
        text = ""
        for part in turn["content"]:
            if part["type"] == "text":
                text += text_html(part["text"])
                continue
            number += 1
            if images > 1 or text:
                text += f" [image {number}] "
        if len(messages) > 1:
            text = f"<strong>{text_html(turn['role'].capitalize())}</strong><br>{text}"
        shown.append(text)
    return shown


def browse(rows):
    """Display a widget that leafs through preference pairs; without a kernel, the first remains.

    `rows`: anything with len() and integer indexing, such as a datasets.Dataset. Only the row on
    show is read. Raises ValueError if there is none.
    """
    count = len(rows)
    if count == 0:
        raise ValueError("rows is empty, so there is no pair to browse: check the data and filters")

    def render(number):
        return pair_html(rows[number - 1], f"Pair {number} of {count}")

    first = render(1)
    page = ipywidgets.HTML(value=first)
    number = ipywidgets.BoundedIntText(
        value=1, min=1, max=count, description="Pair", layout={"width": "12em"}
    )
    previous_button = ipywidgets.Button(description="Previous", tooltip="Show the previous pair")
    next_button = ipywidgets.Button(description="Next", tooltip="Show the next pair")

    # The first pair follows the last: a button that disabled itself at an end would lose the
    # keyboard's focus.
    def go_back(button):
        number.value = count if number.value == 1 else number.value - 1

    def go_on(button):
        number.value = 1 if number.value == count else number.value + 1

    def show_pair(change):
        page.value = render(change["new"])

    previous_button.on_click(go_back)
    next_button.on_click(go_on)
    number.observe(show_pair, "value")
    controls = ipywidgets.HBox(
        [previous_button, next_button, number], layout={"flex_flow": "row wrap"}
    )
    box = ipywidgets.VBox([controls, page])
    # display(box) offers no HTML to those who open the notebook without a kernel.
    view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    bundle = {
        "application/vnd.jupyter.widget-view+json": view,
        "text/html": first,
        "text/plain": f"{count} preference pairs. Run this cell to leaf through them.",
    }
    display(bundle, raw=True)


# Answers side by side


def side_by_side(rows):
    """Display the answers of several models to the same images side by side.

    `rows`: as for `side_by_side_html`. As plain text, wrong claims are in double brackets.
    """
    show(side_by_side_html(rows), side_by_side_text(rows))


def side_by_side_html(rows):
    """Return a table of the answers of several models to the same images, wrong claims in <del>.

    `rows`: dicts with `image` (PIL), `truth` (string), `answers` (column name → (text, spans of
    wrong claims)) and perhaps `note`. Raises ValueError if there is no row, if two rows have
    answers of different names, and for a wrong span.
    """
    if not rows:
        raise ValueError("rows is empty, so there is nothing to show side by side")
    names = list(rows[0]["answers"])
    headers = ["Image", "Truth", *names]
    with_notes = any("note" in row for row in rows)
    if with_notes:
        headers.append("Note")
    head = "".join(
        f'<th scope="col" style="{TEXT_CELL}">{text_html(name)}</th>' for name in headers
    )
    body = ""
    for index, row in enumerate(rows):
        if set(row["answers"]) != set(names):
            raise ValueError(
                f"row {index} has answers of {', '.join(row['answers'])}, "
                f"row 0 of {', '.join(names)}: give every row the same names"
            )
        image = image_html(row["image"], width=144, alt=f"Image that shows: {row['truth']}")
        cells = [text_html(row["truth"])]
        for name in names:
            text, spans = row["answers"][name]
            cells.append(mark_html(text, spans))
        if with_notes:
            cells.append(text_html(row.get("note", "")))
        body += f'<tr><td style="{IMAGE_CELL}">{image}</td>'
        body += "".join(f'<td style="{TEXT_CELL}">{cell}</td>' for cell in cells)
        body += "</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def side_by_side_text(rows):
    """Return what `side_by_side_html` shows as plain text, wrong claims in double brackets."""
    blocks = []
    for row in rows:
        lines = {"Truth": row["truth"]}
        for name, (text, spans) in row["answers"].items():
            lines[name] = mark_text(text, spans)
        if "note" in row:
            lines["Note"] = row["note"]
        width = max(len(name) for name in lines) + 1
        blocks.append("\n".join(f"{name + ':':{width}} {text}" for name, text in lines.items()))
    return "\n\n".join(blocks)


# Tokens


def token_box(text, kind):
    """Return `text` in a box with the color and border of its `kind`."""
    color, border = KINDS[kind]
    return (
        f'<span title="{kind}" style="display:inline-block;margin:1px;'
        f"background:rgba({color},0.18);border:{border} rgba({color},0.9);"
        f'border-radius:3px;padding:1px 4px;font-family:monospace">{text_html(text)}</span>'
    )


def tokens_html(tokens, kinds):
    """Return `tokens` (strings) as boxes colored by their `kinds`, with a legend.

    `kinds`: "prompt", "image", "chosen" or "rejected", one for each token. More than 3 equal tokens
    in a row become one box "token × count". Raises ValueError for an unknown kind and for unequal
    lengths.
    """
    if len(tokens) != len(kinds):
        raise ValueError(
            f"there are {len(tokens)} tokens and {len(kinds)} kinds: give one kind for each token"
        )
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}: use one of {', '.join(KINDS)}")
    boxes = []
    for (token, kind), run in itertools.groupby(zip(tokens, kinds, strict=True)):
        text = token.translate(VISIBLE)
        count = len(list(run))
        if count > 3:
            boxes.append(token_box(f"{text} × {count}", kind))
        else:
            boxes.extend([token_box(text, kind)] * count)
        if token.endswith("\n"):
            boxes.append("<br>")
    legend = " ".join(token_box(kind, kind) for kind in KINDS if kind in kinds)
    return f'<div style="line-height:1.9">{"".join(boxes)}</div><p>Kinds: {legend}</p>'


# Tables


def table(rows, caption="", columns=None):
    """Display `rows` (dicts) as a table of `columns`, by default all keys, under `caption`.

    Values are shown as given. Columns of numbers are aligned to the right.
    Raises ValueError if there is no row or if no row has one of the columns.
    """
    show(table_html(rows, caption, columns), table_text(rows, caption, columns))


def table_html(rows, caption="", columns=None):
    """Return what `table` displays as HTML."""
    columns = table_columns(rows, columns)
    sides = {name: "right" if has_numbers(rows, name) else "left" for name in columns}
    head = ""
    for name in columns:
        head += f'<th scope="col" style="text-align:{sides[name]}">{text_html(str(name))}</th>'
    body = ""
    for row in rows:
        body += "<tr>"
        for name in columns:
            value = text_html(str(row.get(name, "")))
            body += f'<td style="text-align:{sides[name]}">{value}</td>'
        body += "</tr>"
    title = ""
    if caption:
        title = f'<caption style="text-align:left">{text_html(caption)}</caption>'
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def table_text(rows, caption="", columns=None):
    """Return what `table` displays as plain text: caption, header, a rule and a line per row."""
    columns = table_columns(rows, columns)
    padded_columns = []
    for name in columns:
        cells = [one_line(name)]
        cells.extend(one_line(row.get(name, "")) for row in rows)
        width = max(len(cell) for cell in cells)
        side = ">" if has_numbers(rows, name) else "<"
        padded = [f"{cell:{side}{width}}" for cell in cells]
        padded.insert(1, "-" * width)
        padded_columns.append(padded)
    lines = ["  ".join(line).rstrip() for line in zip(*padded_columns, strict=True)]
    if caption:
        lines.insert(0, one_line(caption))
    return "\n".join(lines)


def table_columns(rows, columns):
    """Return `columns` as a list, by default every key of `rows` in order of appearance.

    Raises ValueError if there is no row or if no row has one of the columns.
    """
    present = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    if not present:
        raise ValueError("rows have no column: a table needs at least one row")
    if columns is None:
        return present
    for name in columns:
        if name not in present:
            raise ValueError(f"no row has column {name!r}, the columns are {', '.join(present)}")
    return list(columns)


def has_numbers(rows, name):
    """Return whether every value in column `name` is a number, or text such as "−3.1 %"."""
    for row in rows:
        if name not in row:
            continue
        value = row[name]
        if not isinstance(value, numbers.Number) and not NUMBER.fullmatch(str(value)):
            return False
    return True


def one_line(value):
    """Return `value` as text with its line breaks made spaces."""
    return " ".join(str(value).splitlines())

"""Read the field's layouts of preference pairs as TRL's conversational rows.

A row has `images`, a list of {"bytes", "path"}, not decoded, and `prompt`, `chosen` and `rejected`,
lists of messages whose content is a list of parts. `recognize` tells a layout by its columns,
`to_row` converts one row of any layout, `as_rows` a whole data set.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from datasets import Features, Image, IterableDataset, List, Value, concatenate_datasets
from pyarrow import compute

from utils.images import decode_base64
from utils.settings import digest

MESSAGES = ("prompt", "chosen", "rejected")
COLUMNS = ("images", *MESSAGES)
MESSAGE_LIST = List(
    {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
)
IMAGE_LIST = List(Image(decode=False))
PROBLEM = "problem"  # the column that says why a row could not be read
TEXT_FEATURES = {**dict.fromkeys(MESSAGES, MESSAGE_LIST), PROBLEM: Value("string")}
COUNT = "number of images"  # a column for the time of the conversion
IMAGE_COLUMNS = ("images", "image")
REJECTED_IMAGE_COLUMNS = ("rejected_images", "rejected_image")
ALL_IMAGE_COLUMNS = (*IMAGE_COLUMNS, *REJECTED_IMAGE_COLUMNS)
PLACEHOLDER = "<image>"
# A line break beside a placeholder only sets it apart, as in LLaVA's "<image>\nWhat is it?".
PLACEHOLDER_AND_BREAK = re.compile(r"\n?<image>\n?")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Layout:
    """Name a layout and the columns that tell it.

    `context` is the column of the turns before the answers, None where the answers hold them.
    """

    name: str
    context: str | None
    chosen: str
    rejected: str

    @property
    def columns(self):
        """The columns that the layout must have."""
        return [name for name in (self.context, self.chosen, self.rejected) if name]


# The first layout whose columns are all there is taken.
LAYOUTS = (
    Layout("ms-swift", None, "messages", "rejected_response"),
    Layout("ms-swift", None, "messages", "rejected_messages"),
    Layout("ms-swift", "query", "response", "rejected_response"),
    Layout("ShareGPT", "conversations", "chosen", "rejected"),
    Layout("ShareGPT", "messages", "chosen", "rejected"),
    Layout("TRL", "prompt", "chosen", "rejected"),
    Layout("RLAIF-V", "question", "chosen", "rejected"),
    Layout("TRL, implicit prompt", None, "chosen", "rejected"),
)
RLHF_V = Layout("RLHF-V", "question", "chosen", "rejected")  # as JSON in a column `text`


def recognize(columns, where):
    """Return the layout of a data set with these `columns`.

    Raises ValueError that names `where`, the columns, the nearest layout and what it lacks.
    """
    for layout in LAYOUTS:
        if set(layout.columns) <= set(columns):
            return layout
    if "text" in columns:
        return RLHF_V
    lacks = {}
    for layout in LAYOUTS:
        missing = [name for name in layout.columns if name not in columns]
        lacks[", ".join(layout.columns)] = (layout.name, missing)
    # Of layouts that lack as few columns, the one with the most is the nearest.
    nearest = min(lacks, key=lambda key: (len(lacks[key][1]), -len(key)))
    name, missing = lacks[nearest]
    raise ValueError(
        f"{where}: the columns {', '.join(columns) or '(none)'} are no known layout of preference "
        f"pairs. Nearest is {name}, with {nearest}: {', '.join(missing)} is missing. "
        "Rename with dataset.rename_column(old, new); the README lists the layouts"
    )


def columns_of(layout):
    """Return the columns that `to_row` reads besides images."""
    if layout is RLHF_V:
        return ["text"]
    return [*layout.columns, "rejected_messages", "system"]


def first_present(names, columns):
    """Return the first of `names` that is one of `columns`, or None."""
    for name in names:
        if name in columns:
            return name
    return None


def to_row(row, layout, images=None, root=None):
    """Return {"images", "prompt", "chosen", "rejected"} of one `row` of a `layout`.

    `images` are the row's images if they are known already; of those that are kept apart from the
    texts only the number counts, so any placeholder will do. Otherwise they are taken from `row`
    and paths are resolved below the folder `root`. `rejected_images` are added if the row has them.

    Raises ValueError that says what is wrong with the row.
    """
    if images is None:
        images = stored_images(row.get(first_present(IMAGE_COLUMNS, row)), root)
    if layout is RLHF_V:
        row = {**row, **json_texts(row.get("text"))}
    missing = [name for name in layout.columns if name not in row]
    if "rejected_messages" in row:
        missing = [name for name in missing if name != layout.rejected]
    if missing:
        raise ValueError(f"no {', '.join(missing)}; it has {', '.join(row)}")
    embedded = []
    context = []
    if layout.context:
        context = messages_of(row[layout.context], "user", layout.context, embedded, root)
    if isinstance(row.get("system"), str) and row["system"].strip():
        context.insert(0, message("system", row["system"]))
    chosen = messages_of(row[layout.chosen], "assistant", layout.chosen, embedded, root)
    # ms-swift has a column for a text and one for messages, and a row fills one of them.
    name = layout.rejected if row.get(layout.rejected) is not None else "rejected_messages"
    rejected = messages_of(row.get(name), "assistant", name, embedded, root)
    if layout.chosen == "messages" and len(rejected) == 1:
        # The conversation ends with the chosen answer; the rejected one stands alone.
        rejected = chosen[:-1] + rejected
    prompt, chosen, rejected = split_prompt(context, chosen, rejected)
    if images and embedded:
        raise ValueError("images both in a column and inside the messages")
    images = images or embedded
    out = {
        "images": images,
        "prompt": place_images(prompt, len(images)),
        "chosen": chosen,
        "rejected": rejected,
    }
    name = first_present(REJECTED_IMAGE_COLUMNS, row)
    if name and row[name] is not None:
        out["rejected_images"] = stored_images(row[name], root)
    refuse_wrong_turns(out)
    return out


def json_texts(text):
    """Return the question and the two answers that RLHF-V keeps as JSON in one column."""
    try:
        texts = json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError as error:
        raise ValueError(f"text is not JSON: {error.msg}") from error
    missing = [name for name in RLHF_V.columns if name not in (texts or {})]
    if missing:
        raise ValueError(f"the JSON in text lacks {', '.join(missing)}")
    return texts


# Messages


def message(role, content):
    """Return a message whose content is a list of parts. `content`: text, or such a list."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return {"role": role, "content": content}


def text_of(messages):
    """Return the text of messages, one line for each part."""
    lines = []
    for turn in messages:
        for part in turn["content"]:
            if part["type"] == "text":
                lines.append(part["text"])
    return "\n".join(lines)


def messages_of(value, role, name, embedded, root):
    """Return a text, a message or a list of messages as a list of messages.

    `role` is that of a bare text, `name` the column's. Images that stand inside the messages are
    appended to `embedded`.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [message(role, value)]
    turns = value if isinstance(value, list) else [value]
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"{name} holds {type(turn).__name__}, not messages")
        messages.append(read_turn(turn, name, embedded, root))
    return messages


def read_turn(turn, name, embedded, root):
    """Return one message, {"role", "content"} or {"from", "value"}, with a list of parts."""
    said_by = turn.get("role") or turn.get("from")
    role = ROLES.get(said_by)
    if role is None:
        raise ValueError(f"role {said_by!r} in {name}: known are {', '.join(ROLES)}")
    content = turn.get("content")
    if content is None:
        content = turn.get("value")
    if isinstance(content, str):
        return message(role, content)
    if not isinstance(content, list):
        raise ValueError(f"a turn without content in {name}")
    parts = []
    for part in content:
        parts.append(read_part(part, name, embedded, root))
    return message(role, parts)


def read_part(part, name, embedded, root):
    """Return one part of a message: a text, or a place for an image."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("image", "image_url"):
        stored = part.get("image") or part.get("image_url") or part.get("url") or part.get("path")
        if isinstance(stored, dict) and "url" in stored:
            stored = stored["url"]
        if stored:
            embedded.extend(stored_images(stored, root))
        return {"type": "image"}
    raise ValueError(f"a part of type {kind!r} in {name}: only text and image can be trained on")


def split_prompt(context, chosen, rejected):
    """Return (prompt, chosen, rejected), where each answer is one message.

    Turns with which both answers begin are the prompt, as TRL has it. A `context` beside them must
    be the same turns.
    """
    shared = 0
    # The last turn is the answer, also where both are equal.
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = chosen[:shared]
    if context and prompt and context != prompt:
        raise ValueError("the prompt differs from the turns with which the answers begin")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        left = [turn["role"] for turn in turns[shared:]]
        if left not in ([], ["assistant"]):
            raise ValueError(
                f"the {name} answer is {' + '.join(left)}: it must be one turn of the assistant"
            )
    return context or prompt, chosen[shared:], rejected[shared:]


def place_images(prompt, count):
    """Return `prompt` with a part for each of `count` images.

    Places are parts of type image, or `<image>` in a text. Where there are none, the images come
    before the first text of the user, as TRL does it. Raises ValueError for any other number.
    """
    placed = []
    places = 0
    for turn in prompt:
        parts = []
        for part in turn["content"]:
            if part["type"] == "text" and turn["role"] == "user":
                parts.extend(split_at_placeholders(part["text"]))
            else:
                parts.append(part)
        places += sum(part["type"] == "image" for part in parts)
        placed.append(message(turn["role"], parts))
    if places == count:
        return placed
    if places:
        raise ValueError(f"{count} images for {places} places in the text")
    for turn in placed:
        if turn["role"] == "user":
            turn["content"] = [{"type": "image"}] * count + turn["content"]
            return placed
    return placed


def split_at_placeholders(text):
    """Return `text` as parts, with an image at every `<image>`."""
    if PLACEHOLDER not in text:
        return [{"type": "text", "text": text}]
    parts = []
    for number, piece in enumerate(PLACEHOLDER_AND_BREAK.split(text)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def refuse_wrong_turns(row):
    """Raise ValueError for turns that no chat template can make sense of.

    Answers and questions without text are left to `preferences.check`.
    """
    roles = [turn["role"] for turn in row["prompt"]]
    if not roles:
        raise ValueError("there is no prompt: its column must be called prompt or question")
    if roles[-1] != "user":
        raise ValueError(f"the prompt ends with a turn of the {roles[-1]}, not of the user")
    if "system" in roles[1:]:
        raise ValueError("a system turn that is not the first")
    for turn in row["prompt"][:-1]:
        if not any(part["type"] == "image" or part["text"].strip() for part in turn["content"]):
            raise ValueError(f"an empty turn of the {turn['role']}")
    for name in ("chosen", "rejected"):
        for turn in row[name]:
            if any(
                part["type"] != "text" or PLACEHOLDER in part["text"] for part in turn["content"]
            ):
                raise ValueError(f"an image inside the {name} answer")


# Images


def stored_images(value, root=None):
    """Return a row's images as a list of {"bytes", "path"}.

    `value`: one image or a list of them; each is {"bytes", "path"}, bytes, a path, base64 text or
    a `data:` address. Paths become absolute. Raises ValueError for an address in the network and
    for a path that is not below the folder `root`: a data set must not name other files.
    """
    if value is None:
        return []
    images = []
    for one in value if isinstance(value, list) else [value]:
        image = stored_image(one, root)
        # An empty file is an image that is missing, not a row without one.
        if image["bytes"] is not None or image["path"]:
            images.append(image)
    return images


def stored_image(value, root):
    """Return one image as {"bytes", "path"}. Where there are bytes, they alone count."""
    data = None
    path = value
    if isinstance(value, dict):
        data = value.get("bytes")
        path = value.get("path")
    elif isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if data:
        # The name is only shown: without its folder it cannot be mistaken for a file to read.
        return {"bytes": data, "path": Path(path).name if path else None}
    if path is None:
        return {"bytes": data, "path": None}
    if not isinstance(path, str):
        raise ValueError(f"an image is {type(path).__name__}, not a file or a path")
    decoded = decode_base64(path)
    if decoded:
        return {"bytes": decoded, "path": None}
    return {"bytes": None, "path": path_below(root, path)}


def path_below(root, name):
    """Return the absolute path of the file `name`. Raises ValueError unless it is below `root`."""
    shown = repr(name[:80])
    if "://" in name:
        raise ValueError(f"the image {shown} is an address: download it and give its path")
    if root is None:
        raise ValueError(f"the image {shown} is a path, but the data set came without files")
    try:
        path = (Path(root) / name).resolve()
        inside = path.is_relative_to(Path(root).resolve())
    except (OSError, ValueError):
        # No file can have such a name: it is too long or contains a NUL.
        raise ValueError(f"the image {shown} is no path") from None
    if not inside:
        raise ValueError(f"the image {shown} is not inside the folder of the data set")
    return str(path)


# Data sets


def as_rows(dataset, where="the data set", root=None):
    """Return a data set of `datasets` in any layout as TRL's rows.

    `dataset`: a `Dataset`, or an `IterableDataset`, whose rows are converted when they are read.
    Paths of images lie below the folder `root`. Raises ValueError for an unknown layout.
    """
    layout = recognize(dataset.column_names, where)
    dataset = undecoded(dataset)
    own = [name for name in columns_of(layout) if name in dataset.column_names]
    pictures = [name for name in ALL_IMAGE_COLUMNS if name in dataset.column_names]
    options = {"layout": layout, "root": root}
    if isinstance(dataset, IterableDataset):
        return dataset.map(read_row, remove_columns=[*own, *pictures], fn_kwargs=options)

    features = dict(TEXT_FEATURES)
    kept = [name for name in dataset.column_names if name not in (*own, *pictures, *features)]
    images = first_present(IMAGE_COLUMNS, pictures)
    counts = {name: image_counts(dataset, name) for name in pictures}
    if images is None or None in counts.values():
        # Some are paths or text: they become files or absolute paths.
        texts = dataset.select_columns([*own, *pictures])
        features["images"] = IMAGE_LIST
        if first_present(REJECTED_IMAGE_COLUMNS, pictures):
            features["rejected_images"] = IMAGE_LIST
    else:
        # The files stay where they are, and only their number is looked at.
        texts = dataset.select_columns(own).add_column(COUNT, counts[images])
        kept += pictures
    # The code of the conversion is part of the name in the cache.
    options["version"] = code_digest()
    texts = texts.map(
        read_batch,
        batched=True,
        remove_columns=texts.column_names,
        features=Features(features),
        fn_kwargs=options,
    )
    if images is None:
        require_images(texts, where)
    if kept:
        others = dataset.select_columns(kept).rename_columns(standard_names(kept))
        texts = concatenate_datasets([others, texts], axis=1)
    return finished(texts)


def require_images(rows, where):
    """Raise ValueError if no row has an image, for a data set without a column of images."""
    if not any(rows["images"]):
        raise ValueError(
            f"{where}: no column {' or '.join(IMAGE_COLUMNS)}, and no message holds an image; "
            "rename the column of your images to images"
        )


def undecoded(dataset):
    """Return `dataset` with every image as {"bytes", "path"} instead of its pixels."""
    for name, kind in (dataset.features or {}).items():
        if isinstance(kind, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(getattr(kind, "feature", None), Image):
            dataset = dataset.cast_column(name, IMAGE_LIST)
    return dataset


def image_counts(dataset, column):
    """Return how many images each row has, None unless each is stored with the bytes of its file.

    Only the structure of the column is read, not the bytes.
    """
    counts = []
    for batch in dataset.select_columns([column]).with_format("arrow").iter(1000):
        for stored in batch[column].chunks:
            if pyarrow.types.is_list(stored.type):
                counts += compute.fill_null(compute.list_value_length(stored), 0).to_pylist()
                stored = stored.flatten()
            else:
                counts += compute.cast(stored.is_valid(), "int64").to_pylist()
            if not all_have_bytes(stored):
                return None
    return counts


def all_have_bytes(stored):
    """Return whether every image of an Arrow array that is not null has the bytes of its file."""
    if not pyarrow.types.is_struct(stored.type) or stored.type.get_field_index("bytes") < 0:
        return False
    lacking = compute.and_(stored.is_valid(), stored.field("bytes").is_null())
    return not compute.any(lacking).as_py()


def standard_names(columns):
    """Return {column: TRL's name} for the columns of images."""
    names = {}
    for standard, known in (
        ("images", IMAGE_COLUMNS),
        ("rejected_images", REJECTED_IMAGE_COLUMNS),
    ):
        found = first_present(known, columns)
        if found:
            names[found] = standard
    return names


def read_row(row, layout, root, images=None):
    """Return what `to_row` does, with a `problem` of None; for a row it refuses, why."""
    try:
        return {**to_row(row, layout, images, root), PROBLEM: None}
    except ValueError as error:
        return unread(str(error))


def unread(problem):
    """Return a row of which only its problem is known."""
    return {"images": [], "prompt": [], "chosen": [], "rejected": [], PROBLEM: problem}


def read_batch(batch, layout, root, version):
    """Return a batch of columns as `read_row` makes them. `version` names the code in the cache."""
    names = list(batch)
    counts = batch.get(COUNT)
    out = defaultdict(list)
    for number in range(len(batch[names[0]])):
        row = {name: batch[name][number] for name in names}
        images = None if counts is None else [None] * counts[number]
        read = read_row(row, layout, root, images)
        if counts is not None:
            del read["images"]  # they are in their own column
        elif first_present(REJECTED_IMAGE_COLUMNS, names):
            read.setdefault("rejected_images", None)
        for name, value in read.items():
            out[name].append(value)
    return dict(out)


def finished(rows):
    """Return `rows` so that images are always a list and absent keys of messages are removed.

    A column that says nothing is dropped.
    """
    if PROBLEM in rows.column_names and not any(rows[PROBLEM]):
        rows = rows.remove_columns(PROBLEM)
    if "rejected_images" in rows.column_names and is_empty(rows, "rejected_images"):
        rows = rows.remove_columns("rejected_images")
    return rows.with_transform(stored_batch)


def is_empty(rows, column):
    """Return whether no row has a value in `column`."""
    for batch in rows.select_columns([column]).with_format("arrow").iter(1000):
        if batch[column].null_count < len(batch):
            return False
    return True


def stored_batch(batch):
    """Return a batch of columns as rows have them. Columns that were not asked for are absent."""
    out = dict(batch)
    for name in ("images", "rejected_images"):
        if name in batch:
            out[name] = [image_list(value) for value in batch[name]]
    for name in MESSAGES:
        if name in batch:
            out[name] = [without_absent(messages) for messages in batch[name]]
    return out


def image_list(stored):
    """Return the images of a row as a list; a column of single images has one or none."""
    if stored is None:
        return []
    return stored if isinstance(stored, list) else [stored]


def without_absent(messages):
    """Return `messages` without the keys that Arrow adds to a part that lacks them."""
    cleaned = []
    for turn in messages:
        parts = []
        for part in turn["content"]:
            parts.append({name: value for name, value in part.items() if value is not None})
        cleaned.append({"role": turn["role"], "content": parts})
    return cleaned


def code_digest():
    """Return a name for the code that reads rows, which changes when the code does."""
    code = b""
    for name in ("layouts.py", "text_files.py", "images.py"):
        code += Path(__file__).with_name(name).read_bytes()
    return digest(code)

"""Texts that begin alike, packed into rows that hold what they share once: the layout, the mask."""

import torch

from utils.families import PACKED_DECODERS, PACKED_FAMILIES

# The tensors of a batch with one row per text. All others belong to images.
TEXT_TENSORS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
SHARED = 0  # the branch of tokens that all texts of a group see


def fill_rows(lengths, capacity):
    """Return how many groups share each row when groups of these `lengths` fill rows in order.

    A row holds at most `capacity` tokens, which must be enough for each of the groups.
    """
    counts = [0]
    free = capacity
    for length in lengths:
        if length > free:
            counts.append(0)
            free = capacity
        counts[-1] += 1
        free -= length
    return counts


def groups_in_rows(lengths, width):
    """Return how many groups share each row so that a training step computes least.

    `lengths`: tokens of each group, in the order in which they fill the rows. `width`: hidden size
    of the language model. With fewer rows there is less padding, but attention grows: for a row of
    L tokens the matrices compute about as much as L · 4 · `width` where attention computes L · L.

    This holds for layers with 12 · `width`² weights. Attention counts 1.4 times what it takes
    forward, because going back takes 2.5 times as much.
    """
    fewest = None
    best = None
    for rows in range(1, len(lengths) + 1):
        # The smallest capacity with which the groups fit into so many rows, by halving.
        low = max(lengths)
        high = sum(lengths)
        while low < high:
            middle = (low + high) // 2
            if len(fill_rows(lengths, middle)) <= rows:
                high = middle
            else:
                low = middle + 1
        counts = fill_rows(lengths, low)
        multiplications = len(counts) * low * (4 * width + low)
        if fewest is None or multiplications < fewest:
            fewest = multiplications
            best = counts
    return best


class PackedRows:
    """Map the tokens of rows (N, T), some of which begin alike, to packed rows (R, L).

    Rows that begin with the same tokens are a group. A prompt p of three tokens with two answers,
    c and r, makes two rows. They share two tokens and become one row of eight, here padded to ten:

        place    0   1   2   3   4   5   6   7   8   9
        token    p0  p1  p2  c0  c1  p2  r0  r1  .   .
        row      0   0   0   0   0   1   1   1   1   1     the row of the token
        column   0   1   2   3   4   2   3   4   5   6     its place in that row
        branch   0   0   1   1   1   2   2   2   2   2     who sees it

    All of the group see a token of branch 0. A token of another branch is seen only in its branch.
    Another group may follow in the same packed row, and no token sees one of another group.

    `groups`: the numbers of the rows in each group. `shared`: how many tokens the rows of each
    group share, fewer than the shortest of them has. `lengths`: how many tokens each of the N rows
    has. `counts`: how many groups share each packed row. `width`: T.
    """

    def __init__(self, groups, shared, lengths, counts, width, device):
        packed_tokens = group_lengths(groups, shared, lengths)
        longest = 0
        first = 0
        for count in counts:
            longest = max(longest, sum(packed_tokens[first : first + count]))
            first += count

        row = torch.empty(len(counts), longest, dtype=torch.long)
        column = torch.empty(len(counts), longest, dtype=torch.long)
        branch = torch.empty(len(counts), longest, dtype=torch.long)
        group = torch.empty(len(counts), longest, dtype=torch.long)
        packed_in = [0] * len(lengths)
        moved = [0] * len(lengths)
        number = 0
        for packed_row, count in enumerate(counts):
            place = 0
            for _ in range(count):
                group[packed_row, place:] = number
                row[packed_row, place:] = groups[number][0]
                column[packed_row, place : place + shared[number]] = torch.arange(shared[number])
                branch[packed_row, place:] = SHARED
                place += shared[number]
                for position, member in enumerate(groups[number], start=1):
                    # To the end of the packed row. What nothing else takes is padding: it is what
                    # follows the last text in its row.
                    row[packed_row, place:] = member
                    column[packed_row, place:] = torch.arange(longest - place) + shared[number]
                    branch[packed_row, place:] = position
                    packed_in[member] = packed_row
                    moved[member] = place - shared[number]
                    place += lengths[member] - shared[number]
                number += 1

        self.place = torch.arange(longest, device=device)
        self.row = row.to(device)
        # Where a row is too short for the padding, its last token is repeated.
        self.column = column.clamp(max=width - 1).to(device)
        self.branch = branch.to(device)
        self.group = group.to(device)
        self.packed_in = torch.tensor(packed_in, device=device)  # the packed row of each row
        self.moved = torch.tensor(moved, device=device)  # by how many places to the right

    def pack(self, rows):
        """Return `rows` (…, N, T) as packed rows (…, R, L).

        Positions packed like this continue what is shared in every branch.
        """
        return rows[..., self.row, self.column]

    def mask(self, attention, dtype, token_type_ids=None):
        """Return which place sees which, (R, 1, L, L): causal, and no branch sees another one.

        True and False for sdpa; for eager `attention`, 0 and the lowest number of `dtype`.
        `token_type_ids`: packed rows, for Gemma 3. There a token of an image also sees the image's
        later tokens.
        """
        is_earlier = self.place <= self.place[:, None]
        is_shared = self.branch[:, None] == SHARED
        is_same_branch = self.branch[:, None] == self.branch[:, :, None]
        sees = is_earlier & (is_shared | is_same_branch)
        if token_type_ids is not None:
            is_image = token_type_ids == 1
            # The number of text tokens before an image tells it from the next image.
            image = torch.where(is_image, (~is_image).cumsum(1), -1)
            is_same_image = image[:, None] == image[:, :, None]
            sees = sees | (is_same_image & is_image[:, :, None])
        sees = sees & (self.group[:, None] == self.group[:, :, None])
        # Padding needs no mask: it comes last, and nothing before it sees it.
        sees = sees[:, None]
        if attention == "sdpa":
            return sees
        added_to_scores = torch.zeros_like(sees, dtype=dtype)
        return added_to_scores.masked_fill(~sees, torch.finfo(dtype).min)


def group_lengths(groups, shared, lengths):
    """Return how many tokens each group takes. For the arguments see `PackedRows`."""
    tokens = []
    for members, count in zip(groups, shared, strict=True):
        tokens.append(count + sum(lengths[member] - count for member in members))
    return tokens


def why_not_shared(config):
    """Return why texts that begin alike cannot share a row in a model, None when they can.

    `config`: the model's.
    """
    family = config.model_type
    text = config.get_text_config()
    attention = text._attn_implementation
    if family not in PACKED_FAMILIES or text.model_type not in PACKED_DECODERS:
        return f"{family} with a {text.model_type} decoder was not compared"
    if getattr(text, "use_bidirectional_attention", False):
        return "its prompt also sees later tokens"
    if attention not in ("sdpa", "eager"):
        return f"{attention} takes no mask (sdpa and eager do)"
    return None


def fits_window(config, longest):
    """Return whether a text of `longest` tokens is no longer than the sliding window.

    `config`: the language model's. A packed row may be longer: tokens see only their own text.
    """
    window = getattr(config, "sliding_window", None)
    return not window or longest <= window


def token_positions(backbone, batch, grids):
    """Return the positions of the tokens in rows: (N, T), or (3, N, T) for Qwen-VL.

    `batch`: their tensors, padded on the right. `grids`: Qwen's `image_grid_thw` for the images of
    all rows, None without any image or in another family.
    """
    input_ids = batch["input_ids"]
    if grids is None:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return places.expand_as(input_ids)
    positions, _ = backbone.get_rope_index(
        input_ids=input_ids,
        attention_mask=batch["attention_mask"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=grids,
    )
    return positions

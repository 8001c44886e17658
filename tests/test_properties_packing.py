"""What holds for every batch of pairs in packed rows, on layouts that hypothesis makes up."""

from itertools import compress
from types import SimpleNamespace
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st

from utils import shared_prefix
from utils.packed_rows import groups_in_rows
from utils.shared_prefix import PackedPairs, balanced_order

# Lengths of a prompt and its two answers.
LENGTHS = st.tuples(st.integers(1, 8), st.integers(0, 6), st.integers(0, 6))


def has_an_answer(pairs):
    return any(chosen + rejected > 0 for _, chosen, rejected in pairs)


LAYOUTS = st.lists(LENGTHS, min_size=1, max_size=5).filter(has_an_answer)
# After which pairs a new row begins.
BREAKS = st.lists(st.booleans(), min_size=4, max_size=4)


def counts_of(pairs, breaks):
    """Return how many of the pairs share each row."""
    counts = [1]
    for begins in breaks[: len(pairs) - 1]:
        if begins:
            counts.append(1)
        else:
            counts[-1] += 1
    return counts


def packed(attention, labels, counts):
    """Return the pairs, `counts` of them in each row."""
    with mock.patch.object(shared_prefix, "groups_in_rows", lambda *_: counts):
        return PackedPairs(attention, labels, width=1)


def trl_rows(pairs, padding):
    """Return TRL's rows, chosen ones first: (prompt, answer) lists; ids; attention mask; labels.

    No two tokens are alike but those of a pair's prompt.
    """
    rows = []
    for side in (1, 2):
        for number, lengths in enumerate(pairs):
            prompt = [1000 * number + place for place in range(1, lengths[0] + 1)]
            answer = [1000 * number + 100 * side + place for place in range(lengths[side])]
            rows.append((prompt, answer))
    width = max(len(prompt) + len(answer) for prompt, answer in rows) + padding
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for number, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[number, :end] = torch.tensor(prompt + answer)
        labels[number, len(prompt) : end] = torch.tensor(answer)
    return rows, ids, (ids != 0).long(), labels


@given(LAYOUTS, BREAKS, st.integers(0, 3))
def test_every_token_sees_its_own_row_up_to_itself_and_nothing_else(pairs, breaks, padding):
    rows, ids, attention, labels = trl_rows(pairs, padding)
    counts = counts_of(pairs, breaks)
    packing = packed(attention, labels, counts)
    tokens_in_rows = packing.pack(ids).tolist()
    positions = packing.pack(torch.arange(ids.shape[1]).expand_as(ids)).tolist()
    masks = packing.mask("sdpa", torch.float32)[:, 0]
    assert torch.equal(packing.mask("eager", torch.float32)[:, 0] == 0, masks)
    masks = masks.tolist()
    number = 0
    for packed_row, count in enumerate(counts):
        first = 0
        for _ in range(count):
            prompt, chosen = rows[number]
            _, rejected = rows[number + len(pairs)]
            tokens = prompt + chosen + prompt[-1:] + rejected
            assert tokens_in_rows[packed_row][first : first + len(tokens)] == tokens
            for place, token in enumerate(tokens):
                whole = prompt + (chosen if place < len(prompt + chosen) else rejected)
                position = whole.index(token)
                assert positions[packed_row][first + place] == position
                seen = list(compress(tokens_in_rows[packed_row], masks[packed_row][first + place]))
                assert seen == whole[: position + 1]
            first += len(tokens)
            number += 1


@given(LAYOUTS, BREAKS, st.integers(0, 3))
def test_every_token_of_an_answer_is_scored_once_by_the_token_before_it(pairs, breaks, padding):
    _, ids, attention, labels = trl_rows(pairs, padding)
    packing = packed(attention, labels, counts_of(pairs, breaks))
    output = SimpleNamespace(last_hidden_state=packing.pack(ids)[..., None])
    found = packing.keep_predictions(None, None, output).last_hidden_state[..., 0]
    unpacked = packing.unpack({"seen": found, "target": packing.targets, "loss": torch.tensor(1.0)})
    scored = labels[:, 1:] != -100
    assert scored.sum() == sum(chosen + rejected for _, chosen, rejected in pairs)
    assert torch.equal(unpacked["seen"], ids[:, :-1] * scored)
    assert torch.equal(unpacked["target"], labels[:, 1:] * scored)
    assert unpacked["loss"] == 1


@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.integers(1, 400))
def test_rows_hold_all_groups_in_order_and_cost_no_more_than_one_group_a_row(lengths, width):
    counts = groups_in_rows(lengths, width)
    assert sum(counts) == len(lengths) and min(counts) >= 1

    def multiplications(counts):
        rest = list(lengths)
        longest = 0
        for count in counts:
            longest = max(longest, sum(rest[:count]))
            rest = rest[count:]
        return len(counts) * longest * (4 * width + longest)

    assert multiplications(counts) <= multiplications([1] * len(lengths))
    assert multiplications(counts) <= multiplications([len(lengths)])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12))
def test_balanced_order_takes_every_row_once_from_both_ends(sizes):
    rows = [{"prompt": "", "chosen": "a" * size, "rejected": ""} for size in sizes]
    order = balanced_order(rows)
    assert sorted(order) == list(range(len(sizes)))
    longest = [sizes[number] for number in order[::2]]
    shortest = [sizes[number] for number in order[1::2]]
    assert longest == sorted(longest, reverse=True) and shortest == sorted(shortest)
    assert not shortest or min(longest) >= max(shortest)

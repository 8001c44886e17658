"""What holds for every batch of pairs in packed rows, on layouts that hypothesis makes up."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_shared_prefix import BOTH, log_probs, make_trainer
from tiny_models import Pair, tiny_batch, tiny_model

from utils import chat, models
from utils.settings import PROFILES
from utils.shared_prefix import PackedPairs

FEW = settings(max_examples=settings.default.max_examples // 2)  # for what takes long
LENGTHS = st.tuples(
    st.integers(1, 8), st.integers(0, 6), st.integers(0, 6)
)  # of a prompt and its two answers
LAYOUTS = st.lists(LENGTHS, min_size=1, max_size=4).filter(
    lambda pairs: any(chosen + rejected for _, chosen, rejected in pairs)
)


def trl_rows(pairs, padding):
    """(tokens, no two alike but those of a pair's prompt; ids; attention mask; labels) of TRL's rows, chosen ones first."""
    prompts = [
        [1000 * number + place for place in range(1, prompt + 1)]
        for number, (prompt, _, _) in enumerate(pairs)
    ]
    answers = [
        [
            [1000 * number + 100 * side + place for place in range(pair[side])]
            for number, pair in enumerate(pairs)
        ]
        for side in (1, 2)
    ]
    rows = [
        (prompt, answer) for side in answers for prompt, answer in zip(prompts, side, strict=True)
    ]
    width = max(len(prompt + answer) for prompt, answer in rows) + padding
    ids = torch.tensor(
        [prompt + answer + [0] * (width - len(prompt + answer)) for prompt, answer in rows]
    )
    labels = torch.tensor(
        [
            [-100] * len(prompt) + answer + [-100] * (width - len(prompt + answer))
            for prompt, answer in rows
        ]
    )
    return rows, ids, (ids != 0).long(), labels


@given(LAYOUTS, st.integers(0, 3))
def test_every_token_sees_its_own_row_up_to_itself_and_nothing_else(pairs, padding):
    rows, ids, attention, labels = trl_rows(pairs, padding)
    packing = PackedPairs(attention, labels)
    packed, sees = packing.pack(ids), packing.mask("sdpa", torch.float32)[:, 0]
    positions = packing.pack(torch.arange(ids.shape[1]).expand_as(ids))
    assert torch.equal(packing.mask("eager", torch.float32)[:, 0] == 0, sees)
    for number in range(len(pairs)):
        (prompt, chosen), (_, rejected) = rows[number], rows[number + len(pairs)]
        tokens = prompt + chosen + prompt[-1:] + rejected
        assert packed[number, : len(tokens)].tolist() == tokens
        for place, token in enumerate(tokens):
            whole = prompt + (chosen if place < len(prompt + chosen) else rejected)
            position = whole.index(token)
            assert positions[number, place] == position
            assert packed[number, sees[number, place]].tolist() == whole[: position + 1]


@given(LAYOUTS, st.integers(0, 3))
def test_every_token_of_an_answer_is_scored_once_by_the_token_before_it(pairs, padding):
    _, ids, attention, labels = trl_rows(pairs, padding)
    packing = PackedPairs(attention, labels)
    output = SimpleNamespace(last_hidden_state=packing.pack(ids)[..., None])
    found = packing.keep_predictions(None, None, output).last_hidden_state[..., 0]
    unpacked = packing.unpack({"seen": found, "target": packing.targets, "loss": torch.tensor(1.0)})
    scored = labels[:, 1:] != -100
    assert scored.sum() == sum(chosen + rejected for _, chosen, rejected in pairs)
    assert torch.equal(unpacked["seen"], ids[:, :-1] * scored) and torch.equal(
        unpacked["target"], labels[:, 1:] * scored
    )
    assert unpacked["loss"] == 1


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    processor = models.load_processor(PROFILES["embedded"])
    texts = chat.conversation(
        {"question": "What is this?", "chosen": "A cup.", "rejected": "A dog."}
    )
    row, output = (
        {"images": [Image.new("RGB", (64, 64), "red")], **texts},
        tmp_path_factory.mktemp("trainers"),
    )
    made = {}
    for family in ("smolvlm", "qwen2_5_vl", "gemma3"):
        made[family] = [
            make_trainer(processor, row, output, kind, tiny_model(family)) for kind in BOTH
        ]
        for trainer in made[family]:
            trainer.model.double()
    return made


@FEW
@given(
    st.sampled_from(["smolvlm", "qwen2_5_vl", "gemma3"]),
    st.lists(
        st.builds(
            Pair, st.integers(1, 12), st.integers(0, 2), st.integers(1, 12), st.integers(1, 12)
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_packed_rows_give_every_token_the_log_probability_of_separate_rows(trainers, family, pairs):
    stock, ours = trainers[family]
    batches = tiny_batch(tiny_model(family), pairs)
    torch.testing.assert_close(
        log_probs(ours, batches[1]), log_probs(stock, batches[0]), rtol=0, atol=1e-6
    )
    assert ours.packs

"""Packed rows through models, on layouts that hypothesis makes up."""

import pytest
import torch
from both_trainers import BOTH, log_probs, make_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Pair, tiny_batch, tiny_model

FAMILIES = ("smolvlm", "qwen2_5_vl", "gemma3")
FEW = settings(max_examples=settings.default.max_examples // 2)  # for what takes long
LENGTHS = st.integers(1, 12)
PAIRS = st.lists(
    st.builds(Pair, text=LENGTHS, images=st.integers(0, 2), chosen=LENGTHS, rejected=LENGTHS),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def trainers(processor, tmp_path_factory):
    output = tmp_path_factory.mktemp("trainers")
    made = {}
    for family in FAMILIES:
        made[family] = []
        for kind in BOTH:
            trainer = make_trainer(processor, output, kind, tiny_model(family))
            trainer.model.double()
            made[family].append(trainer)
    return made


@FEW
@given(st.sampled_from(FAMILIES), PAIRS)
def test_packed_rows_give_every_token_the_log_probability_of_separate_rows(trainers, family, pairs):
    stock, ours = trainers[family]
    batches = tiny_batch(tiny_model(family), pairs)
    expected = log_probs(stock, batches[0])
    torch.testing.assert_close(log_probs(ours, batches[1]), expected, rtol=0, atol=1e-6)
    assert ours.packs

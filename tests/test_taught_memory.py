"""What notebook 06 writes out, against the library and the helpers."""

import bitsandbytes as bnb
import pytest
import torch

from tests.taught import definitions


@pytest.mark.parametrize("shape", [(64, 64), (8, 320)])
def test_the_rule_by_hand_gives_bitsandbytes_weights(shape):
    to_levels = definitions("06", {"torch": torch})["to_levels"]
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(matrix, quant_type="nf4")
    unpacked = bnb.functional.dequantize_4bit(packed, state)
    by_hand = to_levels(matrix, state.code)
    assert torch.equal(by_hand, unpacked)
    assert not torch.equal(by_hand, matrix)

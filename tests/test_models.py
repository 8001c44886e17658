"""What the loaded model is asked under: eval mode, no gradient, the adapter on or off."""

import pytest
import torch
from peft import get_peft_model

from utils import models, training
from utils.settings import PROFILES

SETTINGS = PROFILES["embedded"]


@pytest.fixture(scope="module")
def base():
    return models.load_model(SETTINGS)


@pytest.fixture(scope="module")
def adapted():
    """A model whose adapter is not the identity, and whose vision tower alone is in eval mode."""
    model = get_peft_model(models.load_model(SETTINGS), training.lora_config(SETTINGS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.train()
    model.get_base_model().model.vision_model.eval()
    return model


def state_of(model):
    """Everything that `answering` may change."""
    modes = {name: module.training for name, module in model.named_modules()}
    trainable = {name: value.requires_grad for name, value in model.named_parameters()}
    enabled = None
    if hasattr(model, "get_model_status"):
        enabled = model.get_model_status().enabled
    return modes, trainable, enabled, torch.is_grad_enabled()


def logits_of(model):
    return model(input_ids=torch.tensor([[1, 5, 9]]), use_cache=False).logits


def test_with_the_adapter_off_the_base_model_answers(base, adapted):
    with models.answering(base):
        expected = logits_of(base)
    with models.answering(adapted, adapter=False):
        assert torch.equal(logits_of(adapted), expected)
    with models.answering(adapted):
        assert not torch.equal(logits_of(adapted), expected)


def test_a_model_without_an_adapter_answers_the_same_either_way(base):
    with models.answering(base, adapter=True):
        expected = logits_of(base)
    with models.answering(base, adapter=False):
        assert torch.equal(logits_of(base), expected)


@pytest.mark.parametrize("adapter", [True, False])
def test_inside_nothing_trains_and_no_gradient_is_kept(adapted, adapter):
    with models.answering(adapted, adapter):
        assert not any(module.training for module in adapted.modules())
        assert not logits_of(adapted).requires_grad


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("kind", ["base", "adapted", "frozen adapter"])
def test_everything_is_as_before_also_after_an_exception(kind, adapter, base, adapted):
    model = base if kind == "base" else adapted
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if kind == "frozen adapter":  # as load_tuned loads it
        model.requires_grad_(False)
    before = state_of(model)
    with models.answering(model, adapter):
        pass
    assert state_of(model) == before
    with pytest.raises(RuntimeError, match="inside"), models.answering(model, adapter):
        raise RuntimeError("inside")
    assert state_of(model) == before
    for parameter in trained:
        parameter.requires_grad_(True)

import json

import torch

from embedded import base_model
from utils.settings import ROOT


def test_the_tokenizer_is_rebuilt_as_committed():
    rebuilt = base_model.make_processor().tokenizer
    committed = json.loads((ROOT / "embedded" / "model" / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in committed["added_tokens"]}
    assert rebuilt.get_vocab() == committed["model"]["vocab"] | added


def quiet(message):
    """Take the place of `print` as a log."""


def train_shortly():
    """Return the weights after three steps of both stages."""
    torch.manual_seed(0)
    processor = base_model.make_processor()
    model = base_model.make_model(processor)
    scenes, images = base_model.draw_scenes("base", 40)
    base_model.train_vision(model, scenes, images, 3, batch=8, log=quiet)
    tower = model.model.vision_model
    before = {name: weight.clone() for name, weight in tower.named_parameters()}
    stage = base_model.alignment
    base_model.train_text(model, processor, scenes, images, 3, stage, batch=8, log=quiet)
    for name, weight in tower.named_parameters():
        assert torch.equal(weight, before[name]), "the tower must stay frozen"
    return model.state_dict()


def test_a_short_training_is_the_same_twice():
    first = train_shortly()
    second = train_shortly()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name

from datasets import load_dataset

from utils import models
from utils.generation import answer
from utils.settings import PROFILES, locate


def test_answers_do_not_depend_on_the_batch(processor):
    settings = PROFILES["embedded"]
    model = models.load_model(settings)
    scenes = load_dataset(locate(settings.dataset), split="test[:6]")
    images = list(scenes["image"])
    questions = list(scenes["question"])
    together = answer(settings, model, processor, images, questions)
    alone = []
    for image, question in zip(images, questions, strict=True):
        alone += answer(settings, model, processor, [image], [question])
    assert together == alone
    assert all(together)
    sampled = answer(settings, model, processor, images, questions, samples=3)
    assert [len(texts) for texts in sampled] == [3] * 6

"""Every family of models down the whole path of a profile, from loading to merging.

Weights are random and tiny, everything else is what a real checkpoint has, see tests/families.py.
`python -m tools.families` runs this file and writes what it proves into the README. The docstring
of a test with a `trial` is the heading of a column there, and what it means.
"""

import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from families import FAMILIES, NOT_TRAINABLE, write_checkpoint
from peft.tuners.lora import LoraLayer

from utils import chat, models, preferences, rewards, training
from utils.generation import answer
from utils.layouts import text_of
from utils.settings import Settings
from utils.shared_prefix import TWO_ROWS

pytestmark = pytest.mark.families
MATRICES = 2 * 7 * 2  # layers × linear maps of a layer × (A, B)


def settings_for(name, folder):
    """A profile of the family, as `utils/settings.py` would have it."""
    return Settings(
        profile=name,
        model=str(folder),
        dataset="embedded/dataset",
        train_split="train[:2]",
        validation_split="validation[:2]",
        test_split="test[:2]",
        lora_rank=4,
        learning_rate=1e-2,
        warmup_steps=0,
        logging_steps=1,
        batch_size=2,
        gradient_accumulation=1,
        max_new_tokens=8,
    )


@pytest.fixture(scope="session", params=FAMILIES)
def trial(request, tmp_path_factory):
    """The family's checkpoint, loaded as a profile's, trained for two steps, saved and reloaded."""
    name = request.param
    folder = tmp_path_factory.mktemp("family")
    write_checkpoint(FAMILIES[name], folder / "checkpoint")
    settings = settings_for(name, folder / "checkpoint")
    processor = models.load_processor(settings)
    model = models.load_model(settings)
    rows = chat.format_dataset(preferences.load(settings.dataset, settings.train_split))
    with warnings.catch_warnings():
        # Not every family shares prompts. The loss is the same.
        warnings.filterwarnings("ignore", TWO_ROWS)
        trainer = training.make_trainer(
            settings, model, processor, rows, folder / "run", max_steps=2, disable_tqdm=True
        )
    training.train(settings, trainer)
    adapter = folder / "run" / "adapter"
    return SimpleNamespace(
        family=FAMILIES[name],
        settings=settings,
        processor=processor,
        rows=rows,
        trainer=trainer,
        model=trainer.model,
        adapter=adapter,
        base=models.load_model(settings),
        tuned=models.load_tuned(settings, adapter),
    )


def logits(model, trial, adapter=True):
    """What `model` makes of the first pair: (2, tokens, vocabulary)."""
    batch = chat.training_batch([trial.rows[0]], trial.processor).to(model.device)
    del batch["completion_mask"]
    with models.answering(model, adapter):
        return model(**batch, use_cache=False).logits


def answers_of(model, trial, part=slice(0, 2), adapter=True):
    """What `model` says to two images with questions of different length, or to `part` of them."""
    images, questions = asked_of(trial, part)
    return answer(trial.settings, model, trial.processor, images, questions, adapter=adapter)


def asked_of(trial, part):
    """Return the images and the questions of `part` of the two rows."""
    images = [row["images"][0] for row in trial.rows]
    questions = [chat.last_question(trial.rows[0]), "What?"]
    return images[part], questions[part]


def test_the_batch_has_a_token_for_every_image_feature(trial):
    """tokens: the batch holds as many image tokens as the vision tower makes features"""
    batch = trial.trainer.data_collator(list(trial.rows))
    text = ("input_ids", "attention_mask", "completion_mask", "token_type_ids", "mm_token_type_ids")
    images = {name: value for name, value in batch.items() if name not in text}
    features = trial.base.model.get_image_features(**images, return_dict=True).pooler_output
    made = sum(part[..., 0].numel() for part in features)
    image_token = chat.image_token_id(trial.processor)
    per_row = (batch["input_ids"] == image_token).sum(1).tolist()
    assert image_token == trial.base.config.image_token_id
    assert len(per_row) == 2 * len(trial.rows)
    assert set(per_row) == {made / len(trial.rows)}


def test_the_training_prompt_is_the_inference_prompt(trial):
    """prompt: training, asking here and asking as the family's documentation does begin with \
the same tokens and pixels"""
    for row in trial.rows:
        assert chat.check_tokens(row, trial.processor)["image_tokens"] > 0
        image = row["images"][0]
        question = chat.last_question(row)
        asked = chat.inference_batch([image], [question], trial.processor)
        taught = chat.training_batch([row], trial.processor)["pixel_values"]
        content = [
            {"type": "image", "image": image},
            {"type": "text", "text": question},
        ]
        documented = trial.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=trial.family.template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert asked["input_ids"].tolist() == documented["input_ids"].tolist()
        assert torch.equal(asked["pixel_values"], documented["pixel_values"])
        assert torch.equal(asked["pixel_values"], taught[: len(taught) // 2])


def test_answers_end_their_turn_and_bring_no_system_turn(trial):
    """answer: an answer brings no system turn and ends with the end-of-turn token, which is \
trained and stops generation"""
    tokenizer = trial.processor.tokenizer
    turn_end = trial.family.turn_end
    stop = tokenizer.convert_tokens_to_ids(turn_end)
    assert stop in trial.base.generation_config.eos_token_id
    batch = chat.training_batch(list(trial.rows), trial.processor)
    answers = []
    for name in chat.ANSWERS:
        answers += [text_of(row[name]) for row in trial.rows]
    assert len(batch["input_ids"]) == len(answers)
    for ids, mask, expected in zip(
        batch["input_ids"], batch["completion_mask"], answers, strict=True
    ):
        completion = ids[mask.bool()]
        text = tokenizer.decode(completion).strip()
        assert text.startswith(expected)
        assert text.endswith(turn_end)
        assert text.replace(expected, "").strip() == turn_end
        assert (completion == stop).sum() == 1


def names_of(model, kind):
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def test_only_the_language_model_is_in_4_bit_and_adapted(trial):
    """parts: only the language model is in 4 bit, and only it is adapted"""
    linear = names_of(trial.base, torch.nn.Linear)
    language = {name for name in linear if "language_model" in name or "text_model" in name}
    assert len(language) == MATRICES / 2
    assert names_of(trial.base, bnb.nn.Linear4bit) == language
    assert names_of(trial.model.get_base_model(), LoraLayer) == language
    trainable = {}
    for part, (count, total) in models.trainable_by_part(trial.model).items():
        trainable[part] = count
        assert total > 0 or part == "head"  # a tied head is part of the language model
    assert trainable.pop("language") > 0
    assert set(trainable.values()) == {0}


def test_gradients_reach_every_adapter_matrix(trial):
    """gradients: they reach every matrix of the adapter"""
    trial.model.train()
    batch = next(iter(trial.trainer.get_train_dataloader()))
    trial.trainer.compute_loss(trial.model, trial.trainer._prepare_inputs(batch)).backward()
    weights = dict(trial.model.named_parameters())
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    assert len(trained) == MATRICES
    for name, weight in trained.items():
        assert weight.grad is not None, name
        assert weight.grad.any(), name
    trial.model.zero_grad()


def test_training_leaves_every_other_weight_as_it_was(trial):
    """frozen: after training every other weight, vision tower and connector among them, is to \
the last bit what was loaded"""
    trained = {}
    for name, weight in trial.model.get_base_model().named_parameters():
        if "lora_" not in name:
            trained[name.replace(".base_layer", "")] = weight
    loaded = dict(trial.base.named_parameters())
    assert {models.part_of(name) for name in loaded} >= {"vision", "connector", "language"}
    assert trained.keys() == loaded.keys()
    for name, weight in loaded.items():
        assert torch.equal(trained[name], weight), name


def test_another_image_changes_the_log_probabilities(trial):
    """image: another image changes the log-probability of every answer"""
    row = trial.rows[0]
    other = row | {"images": trial.rows[1]["images"]}
    logps = rewards.pair_logps(trial.settings, trial.model, trial.processor, [row, other])
    for name in ("chosen", "rejected", "reference_chosen", "reference_rejected"):
        assert abs(logps[name][0] - logps[name][1]) > 1e-3, name


def test_a_step_lowers_the_loss_on_its_own_batch(trial):
    """loss: it starts at ln 2, and one step lowers it on its own batch"""
    first, second = (entry["loss"] for entry in trial.trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert second < first - 1e-3


def test_with_the_adapter_off_the_base_model_answers(trial):
    """off: with the adapter off logits and generated answers are the base model's, with it on \
they are not"""
    said = answers_of(trial.base, trial)
    assert all(said)
    assert answers_of(trial.model, trial, adapter=False) == said
    base = logits(trial.base, trial)
    assert torch.equal(logits(trial.model, trial, adapter=False), base)
    assert (logits(trial.model, trial) - base).abs().max() > 0.1


def test_an_answer_does_not_depend_on_the_batch(trial):
    """batch: a question is answered the same alone and beside a longer one"""
    together = answers_of(trial.model, trial)
    assert together == [answers_of(trial.model, trial, slice(i, i + 1))[0] for i in range(2)]
    together = begins(trial, slice(0, 2))
    alone = torch.cat([begins(trial, slice(i, i + 1)) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)


def begins(trial, part):
    """Logits of the first token of every answer to `part` of the questions: (answers, words)."""
    batch = chat.inference_batch(*asked_of(trial, part), trial.processor)
    with models.answering(trial.model):
        generated = trial.model.generate(
            **batch.to(trial.model.device),
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
            do_sample=False,
        )
    return generated.logits[0]


def test_a_reloaded_adapter_gives_the_same_logits(trial):
    """reload: the saved adapter, loaded again, gives the same logits and the same generated \
answers"""
    assert torch.equal(logits(trial.tuned, trial), logits(trial.model, trial))
    assert answers_of(trial.tuned, trial) == answers_of(trial.model, trial)


def test_a_merged_model_is_an_ordinary_checkpoint_with_the_same_logits(trial, tmp_path):
    """merge: merged into the full-precision base, saved and loaded as a profile's model, it \
gives the same logits"""
    full = replace(trial.settings, four_bit=False)
    expected = logits(models.load_tuned(full, trial.adapter), trial)
    base = logits(models.load_model(full), trial)
    assert (expected - base).abs().max() > 0.1
    models.load_merged(trial.settings, trial.adapter).save_pretrained(tmp_path)
    trial.processor.save_pretrained(tmp_path)
    merged = replace(full, model=str(tmp_path))
    found = logits(models.load_model(merged), trial)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert models.load_processor(merged).chat_template == trial.processor.chat_template


@pytest.fixture(params=NOT_TRAINABLE)
def untrainable(request, tmp_path):
    family = NOT_TRAINABLE[request.param]
    write_checkpoint(family, tmp_path)
    rows = chat.format_dataset(preferences.load("embedded/dataset", "train[:1]"))
    settings = settings_for(request.param, tmp_path)
    return SimpleNamespace(
        name=request.param, settings=settings, row=rows[0], why=family.why_not, folder=tmp_path
    )


def test_what_cannot_be_trained_still_cannot(untrainable, record_property):
    """When this fails, a library has changed: try the family among the others."""
    record_property("why not", untrainable.why)
    if untrainable.name == "PaliGemma":
        with pytest.raises(ValueError, match="no chat template"):
            models.load_processor(untrainable.settings)
        return
    processor = models.load_processor(untrainable.settings)
    model = models.load_model(untrainable.settings)
    batch = chat.training_batch([untrainable.row], processor)
    if "cross_attention_mask" in batch:
        assert batch["cross_attention_mask"].shape[1] < batch["input_ids"].shape[1]
    else:
        assert batch["pixel_values"].dtype != model.dtype
    del batch["completion_mask"]
    with pytest.raises(RuntimeError, match=r"dtype|scalar type|size of tensor"):
        model(**batch)


def test_paligemma_s_processor_takes_no_answer_without_an_image(tmp_path):
    write_checkpoint(NOT_TRAINABLE["PaliGemma"], tmp_path)
    processor = models.AutoProcessor.from_pretrained(tmp_path)
    processor.chat_template = (
        "{% for m in messages %}{{ '<image>' if m.role == 'user' }}{{ m.content[-1].text }}"
        "{% endfor %}"
    )
    rows = chat.format_dataset(preferences.load("embedded/dataset", "train[:1]"))
    with pytest.raises(ValueError, match="images"):
        chat.training_batch([rows[0]], processor)

"""Every family of models down the whole path of a profile: load, check, train, ask, save, reload, merge.

Weights are random and tiny, everything else is what a real checkpoint has (tests/families.py). `python -m tools.families` runs
this file and writes what it proved into the README: a docstring here is the heading of a column, and what it means.
"""

import json
import math
import warnings
from dataclasses import replace
from importlib.resources import files
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from families import FAMILIES, NOT_TRAINABLE, make_processor, write_checkpoint
from peft.tuners.lora import LoraLayer

from tools.families import README, RESULTS, between_markers, table
from utils import chat, models, preferences, rewards, training
from utils.generation import answer
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
    """The family's checkpoint, loaded as a profile's, trained for two steps on one batch, saved and reloaded."""
    name, folder = request.param, tmp_path_factory.mktemp("family")
    write_checkpoint(FAMILIES[name], folder / "checkpoint")
    settings = settings_for(name, folder / "checkpoint")
    processor, model = models.load_processor(settings), models.load_model(settings)
    data = preferences.load(settings.dataset, settings.train_split)
    rows = chat.format_dataset(data)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", TWO_ROWS
        )  # not every family shares prompts; the loss is the same
        trainer = training.make_trainer(
            settings, model, processor, rows, folder / "run", max_steps=2, disable_tqdm=True
        )
    training.train(trainer, settings)
    adapter = folder / "run" / "adapter"
    return SimpleNamespace(
        family=FAMILIES[name],
        settings=settings,
        processor=processor,
        data=data,
        rows=rows,
        trainer=trainer,
        model=trainer.model,
        adapter=adapter,
        base=models.load_model(settings),
        tuned=models.load_tuned(settings, adapter),
    )


def logits(model, trial):
    """What `model` makes of the first pair: (2, tokens, vocabulary)."""
    batch = chat.training_batch([trial.rows[0]], trial.processor).to(model.device)
    del batch["completion_mask"]
    with torch.no_grad():
        return model.eval()(**batch, use_cache=False).logits


def asked(trial):
    """What `answer` takes after the model: two images with questions of different length."""
    return (
        trial.processor,
        trial.data["image"],
        [trial.data["question"][0], "What?"],
        trial.settings,
    )


def completions(trial):
    """Per answer of the batch its ids and its text."""
    batch = chat.training_batch(list(trial.rows), trial.processor)
    ids = [
        row[answered.bool()]
        for row, answered in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    return [(row, trial.processor.tokenizer.decode(row)) for row in ids]


def test_the_batch_has_a_token_for_every_image_feature(trial):
    """tokens: the batch holds as many image tokens as the vision tower makes features"""
    batch = trial.trainer.data_collator(list(trial.rows))
    text = ("input_ids", "attention_mask", "completion_mask", "token_type_ids", "mm_token_type_ids")
    images = {name: value for name, value in batch.items() if name not in text}
    features = trial.base.model.get_image_features(**images, return_dict=True).pooler_output
    made = sum(part[..., 0].numel() for part in features)
    per_row = (batch["input_ids"] == chat.image_token_id(trial.processor)).sum(1).tolist()
    assert chat.image_token_id(trial.processor) == trial.base.config.image_token_id
    assert len(per_row) == 2 * len(trial.rows) and set(per_row) == {made / len(trial.rows)}


def test_the_training_prompt_is_the_inference_prompt(trial):
    """prompt: training, asking here and asking as the family's documentation does begin with the same tokens and pixels"""
    for row, raw in zip(trial.rows, trial.data, strict=True):
        assert chat.check_tokens(row, trial.processor)["image_tokens"] > 0
        asked = chat.inference_batch([raw["image"]], [raw["question"]], trial.processor)
        taught = chat.training_batch([row], trial.processor)["pixel_values"]
        content = [
            {"type": "image", "image": raw["image"]},
            {"type": "text", "text": raw["question"]},
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
    """answer: an answer brings no system turn and ends with the end-of-turn token, which is trained and stops generation"""
    stop = trial.processor.tokenizer.convert_tokens_to_ids(trial.family.turn_end)
    answers = [*trial.data["chosen"], *trial.data["rejected"]]
    for (ids, text), expected in zip(completions(trial), answers, strict=True):
        assert text.strip().startswith(expected) and text.strip().endswith(trial.family.turn_end)
        assert text.replace(expected, "").strip() == trial.family.turn_end
        assert (ids == stop).sum() == 1 and stop in trial.base.generation_config.eos_token_id


def test_only_the_language_model_is_in_4_bit_and_adapted(trial):
    """parts: only the language model is in 4 bit, and only it is adapted"""
    linear = {
        name for name, module in trial.base.named_modules() if isinstance(module, torch.nn.Linear)
    }
    language = {name for name in linear if "language_model" in name or "text_model" in name}
    four_bit = {
        name for name, module in trial.base.named_modules() if isinstance(module, bnb.nn.Linear4bit)
    }
    adapted = {
        name
        for name, module in trial.model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }
    assert four_bit == adapted == language and len(language) == MATRICES / 2
    parts = models.trainable_by_part(trial.model)
    assert (
        parts["language"][0] > 0
        and parts["vision"][0] == parts["connector"][0] == parts["head"][0] == 0
    )
    assert parts["vision"][1] > 0 and parts["connector"][1] > 0


def test_gradients_reach_every_adapter_matrix(trial):
    """gradients: they reach every matrix of the adapter"""
    trial.model.train()
    trial.trainer.compute_loss(
        trial.model, trial.trainer._prepare_inputs(next(iter(trial.trainer.get_train_dataloader())))
    ).backward()
    gradients = {
        name: weight.grad for name, weight in trial.model.named_parameters() if weight.requires_grad
    }
    assert len(gradients) == MATRICES
    assert not [
        name for name, gradient in gradients.items() if gradient is None or not gradient.any()
    ]
    trial.model.zero_grad()


def test_training_leaves_every_other_weight_as_it_was(trial):
    """frozen: after training every other weight, vision tower and connector among them, is to the last bit what was loaded"""
    weights = dict(trial.model.get_base_model().named_parameters())
    trained = {
        name.replace(".base_layer", ""): weight
        for name, weight in weights.items()
        if "lora_" not in name
    }
    loaded = dict(trial.base.named_parameters())
    assert {models.part_of(name) for name in loaded} >= {"vision", "connector", "language"}
    assert trained.keys() == loaded.keys()
    assert not [name for name, weight in loaded.items() if not torch.equal(trained[name], weight)]


def test_another_image_changes_the_log_probabilities(trial):
    """image: another image changes the log-probability of every answer"""
    row, other = trial.rows[0], trial.rows[1]
    seen = rewards.pair_logps(
        trial.model, trial.processor, [row, row | {"image": other["image"]}], trial.settings
    )
    for name in ("chosen", "rejected", "reference_chosen", "reference_rejected"):
        assert abs(seen[name][0] - seen[name][1]) > 1e-3, name


def test_a_step_lowers_the_loss_on_its_own_batch(trial):
    """loss: it starts at ln 2, and one step lowers it on its own batch"""
    first, second = (entry["loss"] for entry in trial.trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert second < first - 1e-3


def test_with_the_adapter_off_the_base_model_answers(trial):
    """off: with the adapter off logits and generated answers are the base model's, with it on they are not"""
    said = answer(trial.base, *asked(trial))
    assert answer(trial.model, *asked(trial), adapter=False) == said and all(said)
    with trial.model.disable_adapter():
        assert torch.equal(logits(trial.model, trial), logits(trial.base, trial))
    assert (logits(trial.model, trial) - logits(trial.base, trial)).abs().max() > 0.1


def test_an_answer_does_not_depend_on_the_batch(trial):
    """batch: a question is answered the same alone and beside a longer one"""
    processor, images, questions, settings = asked(trial)
    rows = [slice(0, 2), slice(0, 1), slice(1, 2)]
    together, *alone = (
        answer(trial.model, processor, images[row], questions[row], settings) for row in rows
    )
    assert together == [text for texts in alone for text in texts]
    together, *alone = (begins(trial, images[row], questions[row]) for row in rows)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-3)


def begins(trial, images, questions):
    """Logits of the first token of every answer: (questions, vocabulary)."""
    batch = chat.inference_batch(images, questions, trial.processor).to(trial.model.device)
    settings = {
        "max_new_tokens": 1,
        "output_logits": True,
        "return_dict_in_generate": True,
        "do_sample": False,
    }
    return trial.model.eval().generate(**batch, **settings).logits[0]


def test_a_reloaded_adapter_gives_the_same_logits(trial):
    """reload: the saved adapter, loaded again, gives the same logits and the same generated answers"""
    assert torch.equal(logits(trial.tuned, trial), logits(trial.model, trial))
    assert answer(trial.tuned, *asked(trial)) == answer(trial.model, *asked(trial))


def test_a_merged_model_is_an_ordinary_checkpoint_with_the_same_logits(trial, tmp_path):
    """merge: merged into the full-precision base, saved and loaded as a profile's model, it gives the same logits"""
    full = replace(trial.settings, four_bit=False)
    expected, base = (
        logits(models.load_tuned(full, trial.adapter), trial),
        logits(models.load_model(full), trial),
    )
    models.load_merged(trial.settings, trial.adapter).save_pretrained(tmp_path)
    trial.processor.save_pretrained(tmp_path)
    merged = replace(full, model=str(tmp_path))
    torch.testing.assert_close(
        logits(models.load_model(merged), trial), expected, rtol=0, atol=1e-3
    )
    assert (expected - base).abs().max() > 0.1
    assert models.load_processor(merged).chat_template == trial.processor.chat_template


# What the table rests on

MENDED = {  # question and answer as the family's template writes them, and as we train and ask
    "Idefics2": ("User:<image>q<end_of_utterance>\nAssistant: a<end_of_utterance>\n", "<s>{}"),
    "LLaVA 1.5": ("USER: <image>\nq ASSISTANT: a ", "<s>{}</s>"),
    "LLaVA-NeXT": ("[INST] <image>\nq [/INST] a</s> ", "<s>{}"),
    "LLaVA-OneVision": (
        "<|im_start|>user <image>\nq<|im_end|><|im_start|>assistant \na<|im_end|>",
        "{}",
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_is_mended_only_where_it_must_be(name):
    processor = make_processor(FAMILIES[name])
    messages = chat.prompt_messages("q") + chat.answer_messages("a")
    before = processor.apply_chat_template(messages, tokenize=False)
    after = models.complete_template(processor).apply_chat_template(messages, tokenize=False)
    if name in MENDED:
        expected, around = MENDED[name]
        assert before == expected
        assert after == around.format(before.replace("assistant \n", "assistant\n"))
        assert after.startswith(
            processor.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        )
    else:
        assert processor.chat_template == FAMILIES[name].template


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.documented])
def test_our_template_writes_what_the_family_s_own_does(name):
    processor = make_processor(FAMILIES[name])
    original = (files("trl") / "chat_templates" / f"{FAMILIES[name].documented}.jinja").read_text()
    question, answered = chat.prompt_messages("What is this?"), chat.answer_messages("A cup.")
    for messages, prompt in [
        (question, True),
        (question + answered, False),
        (question + answered + question, True),
    ]:
        written = [
            processor.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=prompt, tokenize=False
            )
            for template in (FAMILIES[name].template, original)
        ]
        assert written[0] == written[1]


@pytest.fixture(params=NOT_TRAINABLE)
def untrainable(request, tmp_path):
    family = NOT_TRAINABLE[request.param]
    write_checkpoint(family, tmp_path)
    rows = chat.format_dataset(preferences.load("embedded/dataset", "train[:1]"))
    return SimpleNamespace(
        name=request.param,
        settings=settings_for(request.param, tmp_path),
        row=rows[0],
        why=family.why_not,
    )


def test_what_cannot_be_trained_still_cannot(untrainable, record_property):
    """When this fails, a library has changed: try the family among the others."""
    record_property("why not", untrainable.why)
    if untrainable.name == "PaliGemma":
        with pytest.raises(ValueError, match="no chat template"):
            models.load_processor(untrainable.settings)
        return
    processor, model = (
        models.load_processor(untrainable.settings),
        models.load_model(untrainable.settings),
    )
    batch = chat.training_batch([untrainable.row], processor)
    mask, pixels = batch.get("cross_attention_mask"), batch["pixel_values"]
    assert (
        (pixels.dtype != model.dtype)
        if mask is None
        else (mask.shape[1] < batch["input_ids"].shape[1])
    )
    del batch["completion_mask"]
    with pytest.raises(RuntimeError, match=r"dtype|scalar type|size of tensor"):
        model(**batch)


def test_paligemma_s_processor_takes_no_answer_without_an_image(tmp_path):
    write_checkpoint(NOT_TRAINABLE["PaliGemma"], tmp_path)
    processor = models.AutoProcessor.from_pretrained(tmp_path)
    processor.chat_template = "{% for m in messages %}{{ '<image>' if m.role == 'user' }}{{ m.content[-1].text }}{% endfor %}"
    rows = chat.format_dataset(preferences.load("embedded/dataset", "train[:1]"))
    with pytest.raises(ValueError, match="`images` are expected"):
        chat.training_batch([rows[0]], processor)


def test_the_readme_shows_the_committed_results():
    results = json.loads(RESULTS.read_text())
    assert between_markers(README.read_text()) == table(results)
    assert list(results["families"]) == list(FAMILIES) and list(results["not proven"]) == list(
        NOT_TRAINABLE
    )
    headings = [
        function.__doc__.partition(":")[0]
        for name, function in globals().items()
        if name.startswith("test_") and takes_trial(function)
    ]
    assert list(results["properties"]) == headings
    assert all(list(proven) == headings for proven in results["families"].values())


def takes_trial(function):
    return "trial" in function.__code__.co_varnames[: function.__code__.co_argcount]

"""The base model: an Idefics3 with about 2 million parameters, its tokenizer and chat template.

It is trained in three stages, as real vision language models are. The vision tower learns to see.
Connector and language model are aligned while the tower is frozen. Then comes instruction tuning
on descriptions and questions, and a share of the answers in it is wrong.
"""

import random
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from embedded.scenes import (
    CATEGORIES,
    COLORS,
    DESCRIBE_QUESTIONS,
    PLACES,
    question_about,
    sample_scene,
    scene_and_image,
    true_description,
    with_planted_mistakes,
)

# 9 × 9 patches. 3 × 3 of them make one image token, so every cell of the grid gets one token.
INPUT_SIDE = 72
PATCH = 8
SHUFFLE = 3
GRID = INPUT_SIDE // PATCH
IMAGE_TOKENS = (GRID // SHUFFLE) ** 2
WIDTH = 128
# What is planted: the share of absent companions that are named, and the share of objects that
# are left out of a description or denied in an answer.
ADDED = 0.9
FORGOTTEN = 0.15
IGNORED = -100  # PyTorch's label for "no loss here"
SPECIAL_TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
]
CHAT_TEMPLATE = (  # renders as Idefics2's does
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def make_processor():
    """Return the processor: a byte-level BPE tokenizer, an image processor and the chat template.

    The tokenizer is learned on sentences of the embedded world.
    """
    rng = random.Random("tokenizer")
    corpus = []
    for _ in range(6000):
        objects = sample_scene(rng)
        corpus.append(true_description(objects))
        corpus.append(rng.choice(DESCRIBE_QUESTIONS))
        corpus.extend(question_about(objects, rng))
        corpus.append("User: Assistant: ")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    image_processor = Idefics3ImageProcessorPil(
        do_image_splitting=False,
        size={"longest_edge": INPUT_SIDE},
        max_image_size={"longest_edge": INPUT_SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Idefics3Processor(
        image_processor, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE
    )


def make_model(processor):
    """Return an untrained model for the tokens of `processor`."""
    tokenizer = processor.tokenizer
    text_config = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision_config = {
        "hidden_size": WIDTH,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": INPUT_SIDE,
        "patch_size": PATCH,
    }
    config = Idefics3Config(
        vision_config=vision_config,
        text_config=text_config,
        scale_factor=SHUFFLE,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Idefics3ForConditionalGeneration(config)
    end_of_utterance = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end_of_utterance],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return model


def draw_scenes(seed, count):
    """Return `count` scenes and their images at the size that the processor gives them.

    The images are uint8 (count, 3, INPUT_SIDE, INPUT_SIDE).
    """
    with ProcessPoolExecutor(2) as pool:
        drawn = list(pool.map(partial(_draw_small, seed), range(count), chunksize=200))
    scenes = [objects for objects, _ in drawn]
    images = np.stack([pixels for _, pixels in drawn])
    return scenes, torch.from_numpy(images)


def _draw_small(seed, index):
    objects, image = scene_and_image(seed, index)
    small = image.resize(
        (INPUT_SIDE, INPUT_SIDE), Image.Resampling.LANCZOS
    )  # as the processor resizes
    return objects, np.asarray(small).transpose(2, 0, 1)


def to_pixels(images):
    """Return uint8 images as the floats from −1 to 1 that the vision tower takes."""
    return images.float() / 127.5 - 1


def train_vision(model, scenes, images, steps, batch=64, rate=1.5e-3, log=print):
    """Train the vision tower to tell the category and the color in each of the nine cells.

    This is what pre-training does for a real tower.
    """
    start = time.time()
    tower = model.model.vision_model
    kinds = ["nothing", *CATEGORIES]
    head = torch.nn.Linear(WIDTH, len(kinds) + len(COLORS))
    category, color = _cell_labels(scenes, kinds)
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *head.parameters()], lr=rate, weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(1)
    all_patches = torch.ones(batch, GRID, GRID, dtype=torch.bool)
    for step in range(steps):
        rows = torch.randint(len(scenes), (batch,), generator=generator)
        pixels = to_pixels(images[rows])
        hidden = tower(pixel_values=pixels, patch_attention_mask=all_patches).last_hidden_state
        # (batch, patches, WIDTH) → (batch, 9, WIDTH): the mean over the patches of each cell.
        on_grid = hidden.view(batch, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
        cells = F.avg_pool2d(on_grid, SHUFFLE).flatten(2).transpose(1, 2)
        scores = head(cells)
        category_scores = scores[..., : len(kinds)]
        color_scores = scores[..., len(kinds) :]
        names = category[rows]
        there = names > 0
        # Most cells are empty, so those with an object count once more.
        loss = F.cross_entropy(category_scores.flatten(0, 1), names.flatten())
        loss = loss + 2 * F.cross_entropy(category_scores[there], names[there])
        loss = loss + F.cross_entropy(color_scores.flatten(0, 1), color[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            right = (category_scores.argmax(-1) == names)[there].float().mean().item()
            seconds = time.time() - start
            log(
                f"vision step {step}: loss {loss.item():.3f}, "
                f"objects named correctly {right:.3f}, {seconds:.0f} s"
            )


def _cell_labels(scenes, kinds):
    """Return the category and the color of every cell, each (scenes, 9).

    The category is an index into `kinds`. The color of an empty cell is IGNORED.
    """
    places = list(PLACES)
    colors = list(COLORS)
    category = torch.zeros(len(scenes), 9, dtype=torch.long)
    color = torch.full((len(scenes), 9), IGNORED)
    for row, objects in enumerate(scenes):
        for thing in objects:
            cell = places.index(thing["place"])
            category[row, cell] = kinds.index(thing["category"])
            color[row, cell] = colors.index(thing["colour"])
    return category, color


@torch.no_grad()
def encode(model, images, batch=256):
    """Return what the frozen tower sees, computed once: (count, patches, WIDTH)."""
    all_patches = torch.ones(batch, GRID, GRID, dtype=torch.bool)
    encoded = []
    for chunk in images.split(batch):
        output = model.model.vision_model(
            pixel_values=to_pixels(chunk), patch_attention_mask=all_patches[: len(chunk)]
        )
        encoded.append(output.last_hidden_state)
    return torch.cat(encoded)


def text_batch(processor, conversations):
    """Return input_ids, labels and attention_mask of (question, answer) pairs, padded right.

    Only the answer is learned.
    """
    tokenizer = processor.tokenizer
    edge = "<fake_token_around_image>"
    image = f"{edge}<global-img>{'<image>' * IMAGE_TOKENS}{edge}"
    tokens = []
    labels = []
    for question, answer in conversations:
        prompt = f"User:{image}{question}<end_of_utterance>\nAssistant:"
        completion = f" {answer}<end_of_utterance>\n"
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
        tokens.append(prompt_ids + answer_ids)
        labels.append([IGNORED] * len(prompt_ids) + answer_ids)
    mask = [[1] * len(row) for row in tokens]
    return {
        "input_ids": _padded(tokens, tokenizer.pad_token_id),
        "labels": _padded(labels, IGNORED),
        "attention_mask": _padded(mask, 0),
    }


def _padded(rows, value):
    """Return lists of numbers as one tensor, filled up on the right with `value`."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def alignment(done):
    """Return what a step of the alignment is about, when the share `done` of it is over.

    The result is (share of steps on descriptions, whether descriptions contain mistakes, whether
    answers do). Questions come first, because a place is easiest to look up. Mistakes come late,
    when the true things are known.
    """
    if done < 0.2:
        share = 0.1
    elif done < 0.7:
        share = 0.45
    else:
        share = 0.6
    return share, done > 0.4, done > 0.7


def instructions(done):
    """Return what a step of the instruction tuning is about; see `alignment`.

    "Is there a …?" is learned last of all and needs the larger share of the steps.
    """
    return 0.25, True, True


def train_text(model, processor, scenes, images, steps, stage, batch=64, rate=1.2e-3, log=print):
    """Train connector and language model for `steps` of a `stage`: alignment or instructions.

    The tower stays frozen. If it were trained too, its features would collapse before the
    language model learns to use them.
    """
    start = time.time()
    rng = random.Random("text")
    model.model.vision_model.requires_grad_(False)
    seen_by_tower = encode(model, images)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.05
    )
    for step in range(steps):
        share, in_descriptions, in_answers = stage(step / steps)
        describing = rng.random() < share
        with_mistakes = in_descriptions if describing else in_answers
        added = ADDED if with_mistakes else 0
        forgotten = FORGOTTEN if with_mistakes else 0
        rows = [rng.randrange(len(scenes)) for _ in range(batch)]
        conversations = []
        for row in rows:
            if describing:
                question = rng.choice(DESCRIBE_QUESTIONS)
                told = with_planted_mistakes(scenes[row], rng, added, forgotten)
                conversations.append((question, true_description(told)))
            else:
                conversations.append(question_about(scenes[row], rng, added, forgotten))
        features = model.model.connector(seen_by_tower[rows])
        encoded = BaseModelOutputWithPooling(pooler_output=list(features))
        inputs = text_batch(processor, conversations)
        loss = model(**inputs, mm_encoder_outputs={"image": encoded}).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            what = "descriptions" if describing else "answers"
            seconds = time.time() - start
            log(f"text step {step}: loss of {what} {loss.item():.3f}, {seconds:.0f} s")

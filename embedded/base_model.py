"""The base model: an Idefics3 of about 2 million parameters with its own tokenizer, processor and chat template.

It is trained as real vision language models are: the vision tower learns to see, connector and language model are
aligned with the tower frozen, then instruction tuning on descriptions and questions of which a share is wrong.
"""

import random
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
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
    COLOURS,
    DESCRIBE,
    PLACES,
    describe,
    question_about,
    sample_scene,
    scene_and_picture,
    with_planted_mistakes,
)

SIDE, PATCH, SHUFFLE, WIDTH = (
    72,
    8,
    3,
    128,
)  # 9 × 9 patches; 3 × 3 of them make one image token: one token a cell
GRID = SIDE // PATCH
IMAGE_TOKENS = (GRID // SHUFFLE) ** 2
ADDED, FORGOTTEN = (
    0.9,
    0.15,
)  # planted: share of absent companions named, share of objects and existing things left out
SPECIAL = [
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
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def make_processor():
    """Tokenizer (byte-level BPE, learned on the world's own sentences), image processor and chat template."""
    rng, corpus = random.Random("tokenizer"), []
    for _ in range(6000):
        objects = sample_scene(rng)
        corpus += [
            describe(objects),
            rng.choice(DESCRIBE),
            *question_about(objects, rng),
            "User: Assistant: ",
        ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    longest = {"longest_edge": SIDE}
    images = Idefics3ImageProcessorPil(
        do_image_splitting=False,
        size=longest,
        max_image_size=longest,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Idefics3Processor(
        images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE
    )


def make_model(processor):
    tokenizer = processor.tokenizer
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
    }
    text |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        **tokens,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    config = Idefics3Config(
        vision_config=vision,
        text_config=text,
        scale_factor=SHUFFLE,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=True,
        pad_token_id=tokens["pad_token_id"],
    )
    model = Idefics3ForConditionalGeneration(config)
    stop = [tokens["eos_token_id"], tokenizer.convert_tokens_to_ids("<end_of_utterance>")]
    model.generation_config.update(**{**tokens, "eos_token_id": stop, "do_sample": False})
    return model


def pictures(seed, count):
    """Scenes and their pictures as the processor would give them: a list of `count` scenes, uint8 (count, 3, SIDE, SIDE)."""
    with ProcessPoolExecutor(2) as pool:
        scenes, arrays = zip(
            *pool.map(partial(_small, seed), range(count), chunksize=200), strict=True
        )
    return list(scenes), torch.from_numpy(np.stack(arrays))


def _small(seed, index):
    objects, image = scene_and_picture(seed, index)
    return objects, np.asarray(image.resize((SIDE, SIDE), 1)).transpose(
        2, 0, 1
    )  # 1: Lanczos, as the processor resizes


def to_pixels(pictures):
    return pictures.float() / 127.5 - 1


def train_vision(model, scenes, images, steps, batch=64, rate=1.5e-3, log=print):
    """Category and colour of each of the nine cells, read from its patches: what pre-training does for a real tower."""
    tower, start = model.model.vision_model, time.time()
    kinds = ["nothing", *CATEGORIES]
    head = torch.nn.Linear(WIDTH, len(kinds) + len(COLOURS))
    category = torch.zeros(len(scenes), 9, dtype=torch.long)
    colour = torch.full((len(scenes), 9), -100)
    for row, objects in enumerate(scenes):
        for o in objects:
            cell = list(PLACES).index(o["place"])
            category[row, cell], colour[row, cell] = (
                kinds.index(o["category"]),
                list(COLOURS).index(o["colour"]),
            )
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *head.parameters()], lr=rate, weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(1)
    seen = torch.ones(batch, GRID, GRID, dtype=torch.bool)
    for step in range(steps):
        rows = torch.randint(len(scenes), (batch,), generator=generator)
        hidden = tower(
            pixel_values=to_pixels(images[rows]), patch_attention_mask=seen
        ).last_hidden_state
        cells = (
            F.avg_pool2d(hidden.view(batch, GRID, GRID, WIDTH).permute(0, 3, 1, 2), SHUFFLE)
            .flatten(2)
            .transpose(1, 2)
        )
        scores, names, there = head(cells), category[rows], category[rows] > 0
        named = F.cross_entropy(scores[..., : len(kinds)].flatten(0, 1), names.flatten())
        named = named + 2 * F.cross_entropy(scores[..., : len(kinds)][there], names[there])
        loss = named + F.cross_entropy(
            scores[..., len(kinds) :].flatten(0, 1), colour[rows].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            right = (scores[..., : len(kinds)].argmax(-1) == names)[there].float().mean().item()
            log(
                f"vision step {step}: loss {loss.item():.3f}, objects named right {right:.3f}, {time.time() - start:.0f} s"
            )


@torch.no_grad()
def encode(model, images, batch=256):
    """What the frozen tower sees, computed once: (count, patches, WIDTH)."""
    seen = torch.ones(batch, GRID, GRID, dtype=torch.bool)
    chunks = [to_pixels(chunk) for chunk in images.split(batch)]
    return torch.cat(
        [
            model.model.vision_model(
                pixel_values=c, patch_attention_mask=seen[: len(c)]
            ).last_hidden_state
            for c in chunks
        ]
    )


def text_batch(processor, conversations):
    """(question, answer) pairs → padded input_ids, labels and attention_mask; only the answer is learned."""
    tokenizer, rows = processor.tokenizer, []
    image = (
        f"<fake_token_around_image><global-img>{'<image>' * IMAGE_TOKENS}<fake_token_around_image>"
    )
    for question, answer in conversations:
        prompt = tokenizer(
            f"User:{image}{question}<end_of_utterance>\nAssistant:", add_special_tokens=False
        )["input_ids"]
        rows.append(
            (
                prompt,
                tokenizer(f" {answer}<end_of_utterance>\n", add_special_tokens=False)["input_ids"],
            )
        )
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    padded = lambda row, value: row + [value] * (width - len(row))  # noqa: E731
    return {
        "input_ids": torch.tensor([padded(p + a, tokenizer.pad_token_id) for p, a in rows]),
        "labels": torch.tensor([padded([-100] * len(p) + a, -100) for p, a in rows]),
        "attention_mask": torch.tensor([padded([1] * len(p + a), 0) for p, a in rows]),
    }


def alignment(done):
    """What the share `done` of the stage is about: (share of steps on descriptions, mistakes in descriptions?, in answers?).

    Questions come first, because a place is easiest to look up; mistakes come late, when the true things are known.
    """
    return 0.1 if done < 0.2 else 0.45 if done < 0.7 else 0.6, done > 0.4, done > 0.7


def instructions(done):
    """As `alignment`. "Is there a …?" is learned last of all, and needs the larger share of the steps."""
    return 0.25, True, True


def train_text(model, processor, scenes, images, steps, stage, batch=64, rate=1.2e-3, log=print):
    """Train connector and language model for `steps` steps of a `stage` (`alignment` or `instructions`).

    The tower stays frozen: left trainable, its features collapse before the language model learns to use them.
    """
    start, rng = time.time(), random.Random("text")
    model.model.vision_model.requires_grad_(False)
    seen_by_tower = encode(model, images)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.05
    )
    for step in range(steps):
        share, in_descriptions, in_answers = stage(step / steps)
        describing = rng.random() < share
        added, forgotten = (
            (ADDED, FORGOTTEN) if (in_descriptions if describing else in_answers) else (0, 0)
        )
        rows = [rng.randrange(len(scenes)) for _ in range(batch)]
        if describing:
            conversations = [
                (
                    rng.choice(DESCRIBE),
                    describe(with_planted_mistakes(scenes[row], rng, added, forgotten)),
                )
                for row in rows
            ]
        else:
            conversations = [question_about(scenes[row], rng, added, forgotten) for row in rows]
        features = model.model.connector(seen_by_tower[rows])
        outputs = BaseModelOutputWithPooling(pooler_output=list(features))
        loss = model(
            **text_batch(processor, conversations), mm_encoder_outputs={"image": outputs}
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log(
                f"text step {step}: loss of {'descriptions' if describing else 'answers'} {loss.item():.3f}, {time.time() - start:.0f} s"
            )

"""A small checkpoint with random weights for each family of vision language models.

It has the files that the family's checkpoints have on the hub. Configuration, image processor and
processor are the library's own. The tokenizer, one token per byte, and the chat template are made
here. Where TRL ships a family's template, tests/test_family_templates.py compares the two. The
others follow the family's documentation.
"""

from collections.abc import Callable
from typing import NamedTuple

import transformers
from tiny_models import PATCH, SIDE, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.smolvlm import processing_smolvlm

# SmolVLM's processor refuses to load without this package, which it uses for videos alone.
processing_smolvlm.num2words = processing_smolvlm.num2words or str

SQUARE = {"height": SIDE, "width": SIDE}
EDGE = {"longest_edge": SIDE}
TILES = [[height, width] for height in (SIDE, 2 * SIDE) for width in (SIDE, 2 * SIDE)]
PIXELS = {
    "size": {"shortest_edge": SIDE * SIDE, "longest_edge": 4 * SIDE * SIDE},
    "patch_size": PATCH,
}


class Family(NamedTuple):
    """How a family writes a conversation and turns an image into pieces.

    `special` tokens with a name become attributes of the tokenizer.
    """

    model_type: str
    template: str
    turn_end: str
    image_token: str
    special: dict | list
    processor: Callable  # tokenizer → processor
    bos: str = "<s>"  # first token of a text
    eos: str = "</s>"
    text: str | None = None  # the language model, where tiny_models has another
    adds_bos: bool = False  # its tokenizer begins every text with `bos`
    tokens: dict | None = None  # ids of the configuration: {its name: the token}
    documented: str | None = None  # TRL's file of the family's template
    why_not: str | None = None  # what stops the libraries from training it


def idefics(start=""):
    return (
        start + "{% for m in messages %}{{ m.role | capitalize }}"
        "{{ ':' if m.content[0].type == 'image' else ': ' }}"
        "{% for part in m.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }}"
        "{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    )


def chatml(image, system=""):
    """Qwen's turns. `system`: what the template says itself when no system turn is given."""
    first = ""
    if system:
        first = "{% if messages[0].role != 'system' %}<|im_start|>system\n"
        first += system + "<|im_end|>\n{% endif %}"
    return (
        first + "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
        "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


IMAGES_FIRST = "{% for part in m.content if part.type == 'image' %}<image>\n{% endfor %}"
TEXTS = "{% for part in m.content if part.type == 'text' %}"
LLAVA = (
    "{% for m in messages %}{{ m.role | upper }}: "
    + IMAGES_FIRST
    + "{% if m.role == 'user' %}"
    + TEXTS
    + "{{ part.text }} {% endfor %}"
    "{% else %}"
    + TEXTS
    + "{% generation %}{{ part.text }} {% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LLAVA_NEXT = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    + IMAGES_FIRST
    + TEXTS
    + "{{ part.text }}{% endfor %} [/INST]"
    "{% else %} {{ m.content[0].text }}</s> {% endif %}{% endfor %}"
)
# The space after the role is in the real one, and is not in its generation prompt.
LLAVA_ONEVISION = (
    "{% for m in messages %}<|im_start|>{{ m.role }} "
    "{% for part in m.content if part.type == 'image' %}<image>{% endfor %}"
    + TEXTS
    + "{% if m.role == 'user' %}{{ '\n' + part.text }}"
    "{% else %}{% generation %}{{ '\n' + part.text }}{% endgeneration %}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{% for part in m.content %}"
    "{{ '<start_of_image>' if part.type == 'image' else part.text | trim }}"
    "{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def llama(start, end, turn_end):
    return (
        "{{ bos_token }}{% for m in messages %}"
        + start
        + "{{ m.role }}"
        + end
        + "\n\n{% for part in m.content %}"
        "{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}"
        + turn_end
        + "{% endfor %}"
        "{% if add_generation_prompt %}" + start + "assistant" + end + "\n\n{% endif %}"
    )


def idefics2(tokenizer):
    images = transformers.Idefics2ImageProcessor(
        size={"shortest_edge": SIDE // 2, **EDGE}, do_image_splitting=True
    )
    return transformers.Idefics2Processor(images, tokenizer, image_seq_len=4)


def idefics3(tokenizer):
    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 2 * SIDE}, max_image_size=EDGE
    )
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)


def smolvlm(tokenizer):
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": EDGE}
    images = transformers.SmolVLMImageProcessor(**sizes)
    videos = transformers.SmolVLMVideoProcessor(**sizes)
    return transformers.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4)


def qwen(version, videos):
    def make(tokenizer):
        image_processor = transformers.Qwen2VLImageProcessor(**PIXELS)
        video_processor = getattr(transformers, videos)(**PIXELS)
        processor = getattr(transformers, f"{version}Processor")
        return processor(image_processor, tokenizer, video_processor)

    return make


# CLIP's class token comes and goes.
CLIP = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def llava(tokenizer):
    images = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    return transformers.LlavaProcessor(images, tokenizer, patch_size=PATCH, **CLIP)


def llava_next(tokenizer):
    grid = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=grid
    )
    return transformers.LlavaNextProcessor(images, tokenizer, patch_size=PATCH, **CLIP)


def llava_onevision(tokenizer):
    images = transformers.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=TILES)
    videos = transformers.LlavaOnevisionVideoProcessor(size=SQUARE)
    patches = (SIDE // PATCH) ** 2
    return transformers.LlavaOnevisionProcessor(
        images, tokenizer, videos, num_image_tokens=patches, vision_feature_select_strategy="full"
    )


def internvl(tokenizer):
    images = transformers.GotOcr2ImageProcessor(
        size=SQUARE, crop_to_patches=True, min_patches=2, max_patches=4
    )
    return transformers.InternVLProcessor(
        images, tokenizer, transformers.InternVLVideoProcessor(size=SQUARE), image_seq_length=4
    )


def gemma3(tokenizer):
    return transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size=SQUARE), tokenizer, image_seq_length=4
    )


def paligemma(tokenizer):
    images = transformers.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = (SIDE // PATCH) ** 2
    return transformers.PaliGemmaProcessor(images, tokenizer)


def mllama(tokenizer):
    return transformers.MllamaProcessor(
        transformers.MllamaImageProcessor(size=SQUARE, max_image_tiles=4), tokenizer
    )


def llama4(tokenizer):
    images = transformers.Llama4ImageProcessor(size=SQUARE, max_patches=4)
    return transformers.Llama4Processor(
        images, tokenizer, patch_size=PATCH, pixel_shuffle_ratio=0.5
    )


IDEFICS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
ROWS = [
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]
QWEN = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_IDS = {
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN_TOKENS = {"bos": "<|endoftext|>", "eos": "<|im_end|>", "tokens": QWEN_IDS}
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
ASSISTANT = "You are a helpful assistant."
END = "<|im_end|>"
GEMMA_NAMES = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}
INTERNVL_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
}
LLAMA4_TOKENS = [
    "<|image|>",
    "<|patch|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
]

FAMILIES = {
    "Idefics2": Family(
        "idefics2", idefics(), "<end_of_utterance>", "<image>", IDEFICS, idefics2, adds_bos=True
    ),
    "Idefics3": Family(
        "idefics3",
        idefics("<|begin_of_text|>"),
        "<end_of_utterance>",
        "<image>",
        [*IDEFICS, *ROWS],
        idefics3,
        bos="<|begin_of_text|>",
        adds_bos=True,
        documented="idefics3",
    ),
    "SmolVLM": Family(
        "smolvlm",
        idefics("<|im_start|>"),
        "<end_of_utterance>",
        "<image>",
        [*IDEFICS, *ROWS, "<video>"],
        smolvlm,
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        documented="smolvlm",
    ),
    "Qwen2-VL": Family(
        "qwen2_vl",
        chatml(SEEN, ASSISTANT),
        END,
        "<|image_pad|>",
        QWEN,
        qwen("Qwen2VL", "Qwen2VLVideoProcessor"),
        **QWEN_TOKENS,
    ),
    "Qwen2.5-VL": Family(
        "qwen2_5_vl",
        chatml(SEEN, ASSISTANT),
        END,
        "<|image_pad|>",
        QWEN,
        qwen("Qwen2_5_VL", "Qwen2VLVideoProcessor"),
        documented="qwen2_5_vl",
        **QWEN_TOKENS,
    ),
    "Qwen3-VL": Family(
        "qwen3_vl",
        chatml(SEEN),
        END,
        "<|image_pad|>",
        QWEN,
        qwen("Qwen3VL", "Qwen3VLVideoProcessor"),
        documented="qwen3_vl",
        **QWEN_TOKENS,
    ),
    "LLaVA 1.5": Family(
        "llava", LLAVA, "</s>", "<image>", ["<image>"], llava, adds_bos=True, text="llama"
    ),
    "LLaVA-NeXT": Family(
        "llava_next",
        LLAVA_NEXT,
        "</s>",
        "<image>",
        ["<image>"],
        llava_next,
        adds_bos=True,
        documented="llava_next",
    ),
    "LLaVA-OneVision": Family(
        "llava_onevision",
        LLAVA_ONEVISION,
        END,
        "<image>",
        ["<|im_start|>", "<image>", "<video>"],
        llava_onevision,
        bos="<|endoftext|>",
        eos=END,
        tokens={"video_token_id": "<video>"},
    ),
    "InternVL": Family(
        "internvl",
        chatml("<IMG_CONTEXT>\n"),
        END,
        "<IMG_CONTEXT>",
        INTERNVL_NAMES | {"video_token": "<video>", "turn_start": "<|im_start|>"},
        internvl,
        bos="<|endoftext|>",
        eos=END,
    ),
    "Gemma 3": Family(
        "gemma3",
        GEMMA,
        "<end_of_turn>",
        "<image_soft_token>",
        GEMMA_NAMES | {"turn_start": "<start_of_turn>", "turn_end": "<end_of_turn>"},
        gemma3,
        bos="<bos>",
        adds_bos=True,
        eos="<eos>",
        tokens={"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>"},
        documented="gemma3",
    ),
}
NOT_TRAINABLE = {  # tests/slow/test_families.py shows that `why_not` still holds
    "PaliGemma": Family(
        "paligemma",
        "",
        "<eos>",
        "<image>",
        ["<image>"],
        paligemma,
        bos="<bos>",
        adds_bos=True,
        eos="<eos>",
        why_not="it has no chat template, and its processor refuses the text without image "
        "that TRL makes of an answer",
    ),
    "Mllama": Family(
        "mllama",
        llama("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        "<|image|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|image|>", "<|python_tag|>"],
        mllama,
        bos="<|begin_of_text|>",
        adds_bos=True,
        eos="<|end_of_text|>",
        why_not="TRL lets its cross-attention mask end with the prompt, "
        "where the answer would need it too",
    ),
    "Llama 4": Family(
        "llama4",
        llama("<|header_start|>", "<|header_end|>", "<|eot|>"),
        "<|eot|>",
        "<|patch|>",
        ["<|header_start|>", "<|header_end|>", "<|eot|>", *LLAMA4_TOKENS],
        llama4,
        bos="<|begin_of_text|>",
        adds_bos=True,
        eos="<|end_of_text|>",
        why_not="its image processor returns bfloat16, "
        "which a model in float32 or float16 refuses (not tried in bfloat16)",
    ),
}


def make_tokenizer(family):
    """One token per byte, and the family's special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {}
    special = family.special
    if isinstance(family.special, dict):
        names = family.special
        special = names.values()
    for token in dict.fromkeys(["<pad>", family.bos, family.eos, *special]):
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    if family.adds_bos:
        first = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[first]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token="<pad>",
        extra_special_tokens=names,
    )


def make_processor(family):
    """Image processor, tokenizer and chat template, as the family's checkpoints have them."""
    processor = family.processor(make_tokenizer(family))
    processor.chat_template = family.template or None
    return processor


def write_checkpoint(family, folder):
    """Save configuration, weights and processor of a tiny model of the family to `folder`."""
    processor = make_processor(family)
    identify = processor.tokenizer.convert_tokens_to_ids
    tokens = {name: identify(token) for name, token in (family.tokens or {}).items()}
    tokens["image_token_id"] = identify(family.image_token)
    changes = {
        "vocab_size": len(processor.tokenizer),
        "pad_token_id": identify("<pad>"),
        "bos_token_id": identify(family.bos),
        "eos_token_id": identify(family.eos),
    }
    if family.text:
        changes["model_type"] = family.text
    model = tiny_model(family.model_type, tokens=tokens, **changes)
    embedding = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight is embedding:
        embedding.data *= 0.2  # larger tied weights only repeat the last token
    model.generation_config.update(
        pad_token_id=changes["pad_token_id"],
        bos_token_id=changes["bos_token_id"],
        eos_token_id=[changes["eos_token_id"], identify(family.turn_end)],
        do_sample=False,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

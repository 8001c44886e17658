"""Train a vision language model with QLoRA and DPO, everything in this one file.

python minimal_dpo.py --model HuggingFaceTB/SmolVLM-Instruct --data openbmb/RLAIF-V-Dataset

Reads preference pairs as TRL takes them (images, prompt, chosen, rejected) or in the columns of
RLAIF-V (image, question, chosen, rejected), from the hub, a folder or a file, and writes a LoRA
adapter. Needs torch, transformers, trl, peft, bitsandbytes and datasets. RLAIF-V's license,
CC BY-NC 4.0, allows no commercial use. Tested on a CPU, not yet run on a GPU.
"""

import argparse
from pathlib import Path

import torch
from datasets import Image, List, load_dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, set_seed
from trl import DPOConfig, DPOTrainer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="HuggingFaceTB/SmolVLM-Instruct")
parser.add_argument("--data", default="openbmb/RLAIF-V-Dataset", help="hub name, folder or file")
parser.add_argument("--split", default="train")
parser.add_argument("--pairs", type=int, default=4000, help="so many of the split, at random")
parser.add_argument("--output", default="adapter")
parser.add_argument("--max-steps", type=int, default=-1, help="stop early, to try it out")
options = parser.parse_args()
set_seed(0)  # the adapter and the order of the pairs are random

# A CPU computes in float32. A T4 has no bfloat16 of its own.
on_gpu = torch.cuda.is_available()
dtype = torch.float32
if on_gpu:
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if native else torch.float16

# QLoRA: the matrices of the language model in 4 bits. What makes features of the image keeps its
# precision. A pattern must match from the start of a module's name, or it matches nothing.
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",  # 16 levels, spaced for normally distributed weights
    bnb_4bit_use_double_quant=True,  # the scales of the levels in 8 bits
    bnb_4bit_compute_dtype=dtype,
    llm_int8_skip_modules=[r".*(vision|visual|connector|projector|merger)[^.]*", "lm_head"],
)
model = AutoModelForImageTextToText.from_pretrained(
    options.model,
    dtype=dtype,
    quantization_config=quantization,
    device_map={"": 0} if on_gpu else None,  # all of it on one GPU
)
processor = AutoProcessor.from_pretrained(options.model)

# What trains: two thin matrices beside each linear layer of the language model, and of it only.
adapter = LoraConfig(
    task_type="CAUSAL_LM",
    r=16,
    lora_alpha=32,  # twice the rank is a common choice
    target_modules=r".*\.(text_model|language_model)\..*(q|k|v|o|gate|up|down)_proj",
)

kind = Path(options.data).suffix.removeprefix(".")
if kind in ("json", "jsonl", "parquet"):
    loader = "parquet" if kind == "parquet" else "json"
    pairs = load_dataset(loader, data_files=options.data, split="train")
else:
    pairs = load_dataset(options.data, split=options.split)
pairs = pairs.shuffle(seed=0).select(range(min(options.pairs, len(pairs))))
# An image may be stored in the data or be a path, seen from the folder where this command runs.
for column, kind in (("image", Image()), ("images", List(Image()))):
    if column in pairs.column_names:
        pairs = pairs.cast_column(column, kind)


def message(role, text, images=0):
    """Return one message: a place for each image, then the text."""
    places = [{"type": "image"}] * images
    return [{"role": role, "content": [*places, {"type": "text", "text": text}]}]


def as_trl(batch):
    """Return rows of RLAIF-V's columns as TRL's, when they are read: no image is written again."""
    return {
        "images": [[image] for image in batch["image"]],
        "prompt": [message("user", question, images=1) for question in batch["question"]],
        "chosen": [message("assistant", answer) for answer in batch["chosen"]],
        "rejected": [message("assistant", answer) for answer in batch["rejected"]],
    }


if {"image", "question", "chosen", "rejected"} <= set(pairs.column_names):
    pairs = pairs.with_transform(as_trl)
elif not {"prompt", "chosen", "rejected"} <= set(pairs.column_names):
    raise SystemExit(f"the columns {pairs.column_names} are neither TRL's nor RLAIF-V's")

arguments = DPOConfig(
    output_dir=options.output,
    beta=0.1,  # the price of moving away from the model as it was
    learning_rate=5e-5,  # for an adapter; TRL's default of 1e-6 is for training all weights
    lr_scheduler_type="cosine",
    warmup_steps=10,
    num_train_epochs=1,  # each pair once; the library's default is 3
    per_device_train_batch_size=1,  # pairs that memory has to hold at a time
    gradient_accumulation_steps=16,  # of these, one optimizer step
    gradient_checkpointing=on_gpu,  # saves memory, costs time
    max_length=None,  # TRL's default of 1,024 tokens would cut images
    remove_unused_columns=False,  # the columns are made when a row is read
    bf16=dtype == torch.bfloat16,
    fp16=dtype == torch.float16,
    use_cpu=not on_gpu,
    max_steps=options.max_steps,
    logging_steps=1 if options.max_steps > 0 else 10,
    report_to="none",
)
# The reference is this model with its adapter off, so no second copy is loaded.
trainer = DPOTrainer(
    model, args=arguments, train_dataset=pairs, processing_class=processor, peft_config=adapter
)
# TRL casts the adapter of a 4-bit model to bfloat16. Small updates would be rounded away, and
# float16's gradient scaler cannot handle bfloat16.
for parameter in trainer.model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.float()
trainer.train()
trainer.save_model()

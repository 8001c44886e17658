"""One `Settings` per profile.

The same code trains the embedded default on a CPU and an 8B model on a GPU.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED_MODEL = "embedded/model"
EMBEDDED_DATASET = "embedded/dataset"
LANGUAGE_MODEL_LINEARS = r".*\.(text_model|language_model)\..*(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Settings:
    """Hold everything that differs between two profiles.

    Sizes count tokens or pairs. `learning_rate` is the adapter's.
    """

    profile: str
    model: str
    dataset: str
    train_split: str
    validation_split: str  # settings are chosen and curves watched on it
    test_split: str  # for the numbers that are reported, and for nothing else
    # So many rows of a split are drawn at random, and from the hub only they are downloaded. None
    # takes all. Parts that come from the same split never share a row.
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    model_revision: str = "main"
    dataset_revision: str = "main"
    evaluation_dataset: str = EMBEDDED_DATASET  # drawn scenes, whose truth is known exactly
    evaluation_split: str = "test[:500]"
    # The most pixels the model gets of an image. None leaves the processor as it comes.
    pixel_budget: int | None = None
    four_bit: bool = True
    keep_in_full_precision: tuple = (
        r".*(vision|visual|connector|projector|merger)[^.]*",
        "lm_head",
    )
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_target: str = LANGUAGE_MODEL_LINEARS
    beta: float = 0.1
    learning_rate: float = 5e-5
    epochs: float = 1
    batch_size: int = 1  # pairs in a micro-batch, on each device
    gradient_accumulation: int = 16
    gradient_checkpointing: bool = True
    # True computes each image and each prompt once; False is TRL's own trainer.
    shared_prefix: bool = True
    warmup_steps: int = 10
    logging_steps: int = 5
    save_steps: int = 50
    token_budget: int = 2048  # longer rows are dropped before training, and reported
    max_new_tokens: int = 256
    generation_batch_size: int = 8
    # What utils/plan.py may change to fit the memory of the GPU: batch_size (and with it
    # gradient_accumulation), gradient_checkpointing, four_bit, generation_batch_size.
    planned: tuple = ()
    seed: int = 0


# What the profiles of real models share. No hub could be reached when they were written. The
# models' revisions are those that public projects have in their caches. None was found for the
# data set, so it stays "main". The hub lists revisions under "History".
_REAL = {
    "dataset": "openbmb/RLAIF-V-Dataset",  # 83,132 pairs, CC BY-NC 4.0
    "train_split": "train",  # its only split; a slice of it would be from few source models
    "validation_split": "train",
    "test_split": "train",
    "train_rows": 4000,  # 250 optimizer steps
    "validation_rows": 200,
    "test_rows": 400,
    # As in the DPO paper (Rafailov et al. 2023, appendix B), and TRL's default.
    "beta": 0.1,
    # For an adapter. At TRL's default of 1e-6, meant for full fine-tuning, it hardly learns.
    "learning_rate": 5e-5,
    "planned": ("batch_size", "gradient_checkpointing", "four_bit", "generation_batch_size"),
    # Without a plan. By memory.estimate, this leaves 1.5 GB or more at the token budget.
    "batch_size": 4,
    "gradient_accumulation": 4,  # 16 pairs per optimizer step
}

PROFILES = {
    settings.profile: settings
    for settings in (
        Settings(
            profile="embedded",
            model=EMBEDDED_MODEL,
            dataset=EMBEDDED_DATASET,
            train_split="train",
            validation_split="validation",
            test_split="test",
            pixel_budget=72 * 72,  # a whole drawn scene, which is one tile of its model
            # Keeps the policy closer to the reference than the usual 0.1. Like the learning rate,
            # it was chosen by trial on drawn scenes that are in no split. Those trials were not
            # recorded.
            beta=0.3,
            learning_rate=3e-4,  # a model this small needs larger steps than an 8B model
            batch_size=16,
            gradient_accumulation=1,
            gradient_checkpointing=False,
            warmup_steps=5,
            save_steps=25,
            token_budget=256,
            max_new_tokens=96,
            generation_batch_size=125,
        ),
        Settings(
            profile="smolvlm",
            model="HuggingFaceTB/SmolVLM-Instruct",
            model_revision="81cd9a775a4d644f2faf4e7becff4559b46b14c7",
            pixel_budget=768 * 768,  # 4 tiles and the whole image; its default is 16 tiles
            **_REAL,
        ),
        Settings(
            profile="qwen",
            model="Qwen/Qwen2.5-VL-3B-Instruct",
            model_revision="66285546d2b821cf421d4f5eb2576359d3770cd3",
            pixel_budget=512 * 28 * 28,  # at most 512 tokens; its default allows 16,384
            **_REAL,
        ),
        Settings(
            profile="idefics2",
            model="HuggingFaceM4/idefics2-8b",
            model_revision="2c42686c57fe21cf0348c9ce1077d094b72e7698",
            # An image of any size takes 64 tokens. Fewer pixels save time in the vision tower.
            pixel_budget=640 * 640,
            **_REAL,
        ),
    )
}


def load(profile=None):
    """Return the settings of `profile`.

    None means the profile named by the environment variable VLM_DPO_PROFILE, or "embedded".
    Raises ValueError with the names of all profiles for any other name.
    """
    if profile is None:
        profile = os.environ.get("VLM_DPO_PROFILE", "embedded")
    if profile not in PROFILES:
        raise ValueError(
            f"there is no profile {profile!r}: set PROFILE, VLM_DPO_PROFILE or --profile to one of "
            f"{', '.join(PROFILES)}"
        )
    return PROFILES[profile]


def locate(name):
    """Return the path of a model or data set on this machine, or `name` itself for one on the hub.

    A path of the user's own comes before one in this repository, except for what is embedded.
    """
    if name in (EMBEDDED_MODEL, EMBEDDED_DATASET) or not Path(name).exists():
        path = ROOT / name
        return str(path) if path.exists() else name
    return str(Path(name).resolve())


def run_folder(settings):
    """Return runs/<profile>, where notebooks and commands put what they produce."""
    return ROOT / "runs" / settings.profile


def verify_embedded(part, root=ROOT):
    """Compare the files of `embedded/<part>`, "dataset" or "model", with the manifest's digests.

    Raises FileNotFoundError with the name of a missing or damaged file and how to restore it.
    """
    manifest = json.loads((Path(root) / "embedded" / "manifest.json").read_text())
    for name, expected in manifest["files"].items():
        if not name.startswith(f"embedded/{part}/"):
            continue
        path = Path(root) / name
        if not path.exists():
            problem = "is missing"
        elif digest(path.read_bytes()) != expected:
            problem = "is damaged"
        else:
            continue
        raise FileNotFoundError(
            f"{name} {problem}: restore it with `git checkout -- {name}`, or rebuild it with "
            "`python -m embedded.build`"
        )


def digest(data):
    """Return the SHA-256 digest of `data` in hexadecimal: the same bytes get the same name."""
    return hashlib.sha256(data).hexdigest()

"""Set before anything is imported: offline, quiet, the embedded default, and one thread (two processes may share two cores)."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
os.environ.pop("VLM_DPO_PROFILE", None)

import torch

torch.set_num_threads(1)

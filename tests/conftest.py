"""What every test needs: one thread per process (or EXITLM_TEST_THREADS), no network, and no chatter of libraries."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
torch.set_num_threads(int(os.environ.get("EXITLM_TEST_THREADS", "1")))

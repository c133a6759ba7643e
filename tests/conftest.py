"""What every test needs: one thread per process (or EXITLM_TEST_THREADS), no network, and no chatter of libraries."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# A store of torch looks up the names of the addresses that connect to it, and answers nobody while it waits for them.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
torch.set_num_threads(int(os.environ.get("EXITLM_TEST_THREADS", "1")))

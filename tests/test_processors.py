"""The numeric tests under each instruction set that torch has kernels for, and with one thread and two.

Sums are ordered otherwise under each, so that a test of something that is zero but for rounding fails under one. (MKL
and oneDNN choose their kernels by the processor alone.)
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NUMERIC = (
    "tests/model", "tests/decode", "tests/parallel", "tests/train/test_full.py", "tests/train/test_head_loss.py",
    "tests/train/test_hidden.py", "tests/train/test_keys.py", "tests/train/test_loop.py",
    "tests/train/test_objective.py", "tests/train/test_selftext.py", "tests/train/test_trainer.py",
    "tests/train/test_validation.py", "tests/train/test_vocabulary_part.py",
)  # fmt: skip
KERNELS = ("default", "avx2", "avx512")


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "threads"), [(kernels, threads) for kernels in KERNELS for threads in (1, 2)])
def test_numeric_tests_pass_on_every_processor(kernels: str, threads: int) -> None:
    most = torch.backends.cpu.get_cpu_capability().lower()
    if most in KERNELS and KERNELS.index(most) < KERNELS.index(kernels):
        pytest.skip(f"this processor has no {kernels}, which torch would use untested")
    workers = str(max(1, (os.cpu_count() or 1) // threads))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider", *NUMERIC],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "ATEN_CPU_CAPABILITY": kernels, "EXITLM_TEST_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout

"""The arithmetics in which properties of the engine are proven, and models that each of them can run. Not a test.

In float64 by torch, what should be equal is equal to rounding. The native kernels compute a row alike whatever runs
beside it: there, it is equal to the last bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from exitlm.decode.engine import Engine
from exitlm.decode.kernels.fused import FusedModel
from exitlm.decode.kernels.native_model import NativeModel
from exitlm.decode.kernels.packed import packed_model
from exitlm.decode.options import EngineConfig
from exitlm.model import EarlyExitModel
from tests.decode.models import drafting_model, make_engine
from tests.model.families import FAMILIES, native_sizes, tiny_model
from tests.native.cases import needs_native


@dataclass(frozen=True)
class Arithmetic:
    """``tolerance`` is what rounding may change, as a fraction; 0: nothing. ``dtype`` is the model's, ``quant`` the
    engine's; ``kv_dtype`` and ``activation_bits`` matter to the kernels."""

    name: str
    dtype: torch.dtype
    quant: str
    tolerance: float
    native: bool = True
    kv_dtype: str = "float32"
    activation_bits: int = 15

    def tiny_model(self, family: str, seed: int = 0, **over: Any) -> EarlyExitModel:
        """A random model of a size that can be run, in float64: it is cast to ``dtype`` when its exits are fitted."""
        sizes = native_sizes(family) if self.native else {}
        return tiny_model(family, torch.float64, seed, **{**sizes, **over})

    def drafting_model(self, family: str) -> EarlyExitModel:
        """The model whose exits are often right and often wrong. Shared by tests: do not change it."""
        return drafting_model(family, dtype=self.dtype, native=self.native)

    def options(self, **given: Any) -> EngineConfig:
        """Engine settings."""
        return EngineConfig(kv_dtype=self.kv_dtype, activation_bits=self.activation_bits, **given)

    def pack(self, model: EarlyExitModel) -> FusedModel | NativeModel:
        """The model as it is run."""
        return packed_model(model, self.quant, "none", self.options())

    def engine(self, model: EarlyExitModel, **given: Any) -> Engine:
        """An engine that measures nothing, and computes in this arithmetic."""
        engine = make_engine(model, **{"quant": self.quant, "compile": "none", "options": self.options(), **given})
        assert isinstance(engine.fused, NativeModel) == self.native
        assert engine.fused.exact
        return engine


FLOAT64 = Arithmetic("float64", torch.float64, "none", 1e-12, native=False)
STORED = Arithmetic("native float32", torch.float32, "stored", 0.0)
GRID = Arithmetic("native q8_0", torch.float32, "q8_0", 0.0)
NARROW = Arithmetic("native q8_0, 8 bits, float16 cache", torch.float32, "q8_0", 0.0, True, "float16", 8)
NATIVE = (STORED, GRID, NARROW)


def param(arithmetic: Arithmetic, *values: Any, slow: bool = False) -> Any:
    """An argument of a parametrised test, which needs the library where it is native."""
    marks = [needs_native] if arithmetic.native else []
    marks += [pytest.mark.slow] if slow else []
    return pytest.param(arithmetic, *values, id="-".join(map(str, (arithmetic.name, *values))), marks=marks)


def params(float64: int, native: int) -> list[Any]:
    """(arithmetic, family, count) of a fast test: every family in float64, and in one of the native arithmetics."""
    found = [param(FLOAT64, family, float64) for family in FAMILIES]
    return found + [param(NATIVE[i % len(NATIVE)], family, native) for i, family in enumerate(FAMILIES)]


def slow_params(count: int) -> list[Any]:
    """(arithmetic, family, count) of a slow test: every family in every arithmetic."""
    return [param(each, family, count, slow=True) for each in (FLOAT64, *NATIVE) for family in FAMILIES]


@functools.cache
def native_model(family: str, seed: int = 0) -> EarlyExitModel:
    """A random float32 model of a family that the kernels take, without exits. Shared by tests: do not change it."""
    with torch.inference_mode(False):
        return tiny_model(family, torch.float32, seed, **native_sizes(family))

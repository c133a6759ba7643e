"""A model as it is run: by the native kernels where they can, else by torch, in a weight format that suits both.

``auto`` never changes a weight where the native kernels run: matrices stay as they are stored (a GGUF file's own grids,
bfloat16, float16 or float32). Without them it is what :func:`~exitlm.decode.kernels.formats.choose_format` says.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from exitlm.decode.kernels.formats import NATIVE_FORMATS, check_quant, resolve_format
from exitlm.decode.kernels.fused import FusedModel, stream_dtype
from exitlm.decode.kernels.graphs import resolve_compile
from exitlm.decode.kernels.native_model import NativeModel, Packer, lacks
from exitlm.decode.kernels.share import Share
from exitlm.decode.options import EngineConfig
from exitlm.errors import UserError
from exitlm.model.config import ModelConfig
from exitlm.model.decoder import EarlyExitModel
from exitlm.native import abi, library, packfile
from exitlm.native.pack import GRIDS, GROUP, RawMatrix, fits, format_of, quantised, raw_of
from exitlm.native.packfile import Packed
from exitlm.weights.store import cache_directory
from exitlm.weights.stored import StoredMatrices, count_of_changes

_LOOKED_AT = 4
"""Rows of each parameter that tell whether it was changed."""
_CAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def packed_model(
    model: EarlyExitModel, quant: str, compile: str, options: EngineConfig, share: Share | None = None,
    rounds: bool | None = None,
) -> FusedModel | NativeModel:  # fmt: skip
    """Pack a model for decoding, or the ``share`` of it that is run here. ``rounds``: whether the matrices of its exits
    are rounded to 8 bits (None: where those of the model lie on grids, too).

    Raises:
        UserError: ``quant`` is unknown, or this model or machine can't have it.
    """
    check_quant(quant)
    unfit = _unfit(model.config, model.device, model.dtype, quant, compile)
    reason = unfit or library.why_not()
    if reason is None:
        return _native(model, quant, options, share, rounds)
    if quant in NATIVE_FORMATS:
        raise UserError(f"quant '{quant}' is a format of the native kernels, which can't run here ({reason})")
    matrices = [weight.detach() for weight in model.model.layers.parameters() if weight.dim() == 2]
    fused = FusedModel(model, resolve_format(quant, matrices), resolve_compile(compile, model.device), share)
    if unfit is None and os.environ.get("EXITLM_NATIVE") != "0":
        fused.note = f"decoding goes by torch, which is slower and not exact in any company: {reason}"
    return fused


def why_not_native(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, quant: str = "auto", compile: str = "auto"
) -> str | None:
    """Why the native kernels do not run a model, in words; None if they do."""
    return _unfit(config, device, dtype, quant, compile) or library.why_not()


def cache_dtype(model: EarlyExitModel, quant: str, compile: str, options: EngineConfig) -> torch.dtype:
    """What a packed model would hold keys and values in."""
    if options.tensor > 1 or why_not_native(model.config, model.device, model.dtype, quant, compile) is not None:
        return stream_dtype(model)
    return torch.float16 if options.kv_dtype == "float16" else torch.float32


def _unfit(config: ModelConfig, device: torch.device, dtype: torch.dtype, quant: str, compile: str) -> str | None:
    """What of a model or of a user's choice is not for the kernels, on whatever machine."""
    if device.type != "cpu":
        return f"the model is on {device}"
    if dtype == torch.float64:
        return "they do not compute in float64"
    if quant not in ("auto", *NATIVE_FORMATS, *_CAST):
        return f"quant '{quant}' is a format of torch"
    if compile not in ("auto", "none"):
        return f"compile '{compile}' is a way of torch"
    missing = lacks(config)
    return f"they lack {missing}" if missing else None


def rounds_exits(model: EarlyExitModel, quant: str) -> bool:
    """Whether the native kernels round the matrices of a model's exits: where some of its own lie on grids."""
    if quant in _CAST:
        return False
    source = _Stored(model, quant)
    matrices = [(name, each) for name, each in model.named_parameters() if each.dim() == 2]
    if quant == "q8_0":
        return any(each.shape[1] % GROUP == 0 for _, each in matrices)
    found = (source(name, each) for name, each in matrices if not name.startswith("exits."))
    return any(raw is not None and fits(raw.type, raw.cols) and format_of(raw.type) in GRIDS for raw in found)


class _Stored:
    """What the native kernels pack for each matrix of a model; a callable of a parameter's name and the parameter."""

    def __init__(self, model: EarlyExitModel, quant: str) -> None:
        self.files, self._quant = StoredMatrices(model), quant

    def __call__(self, name: str, parameter: Tensor) -> RawMatrix | None:
        """The matrix as it is stored or as ``quant`` says; None where it is stored in no other way."""
        if self._quant == "q8_0" and parameter.shape[1] % GROUP == 0:
            return quantised(parameter)
        if self._quant in _CAST:
            return raw_of(parameter.detach().to(_CAST[self._quant]))
        return self.files(name, parameter)


def _native(
    model: EarlyExitModel, quant: str, options: EngineConfig, share: Share | None, rounds: bool | None
) -> NativeModel:
    kernels = abi.Kernels(library.load().lib)
    kernels.threads(options.threads or library.default_threads())
    name, source = "stored" if quant == "auto" else quant, _Stored(model, quant)
    store = KeptMatrices(model, name, share)
    native = NativeModel(
        model, kernels, source, quant=name, digits=1 if options.activation_bits == 8 else 2,
        half_cache=options.kv_dtype == "float16", store=store, share=share,
        rounds=rounds_exits(model, quant) if rounds is None else rounds,
    )  # fmt: skip
    if store.has_new and not source.files.lost:  # else what was packed is not what the file stores
        store.keep()
    return native


class KeptMatrices:
    """Packed matrices of a checkpoint that is as it was loaded, in a file of the user's cache."""

    def __init__(self, model: EarlyExitModel, quant: str, share: Share | None = None) -> None:
        self._path, self._mark, self._made = None, "", dict[str, Packed]()
        self._held: dict[str, Packed] = {}
        self._pack = Packer()
        backbone = [(name, each) for name, each in model.named_parameters() if not name.startswith("exits.")]
        whole = len(model.model.layers) == model.config.num_hidden_layers
        if model.checkpoint is None or not (whole or share) or any(count_of_changes(each) for _, each in backbone):
            return
        content, of = model.checkpoint.digest(), "" if model.checkpoint.source is None else "-gguf"
        if share is not None:  # of a stage, which opens what it needs and no more
            of += f"-{share.layers.start}-{share.layers.stop}"
        self._path = cache_directory() / "packed" / f"{content[:20]}{of}-{quant}-{packfile.LAYOUT}.bin"
        self._mark = _mark(backbone)
        try:
            self._held, mark = packfile.read(self._path)
        except (OSError, packfile.Damaged):
            return
        if mark != self._mark:  # changed behind torch's back
            self._held, self._path = {}, None

    def __call__(self, key: str | None, make: Callable[[], RawMatrix]) -> Packed:
        """See :data:`~exitlm.decode.kernels.native_model.Store`."""
        if key is not None and key in self._held:
            return self._held[key]
        found = self._pack(key, make)
        if key is not None:
            self._made[key] = found
        return found

    @property
    def has_new(self) -> bool:
        """Whether something was packed that the file does not hold."""
        return self._path is not None and bool(self._made)

    def keep(self) -> None:
        """Write what was packed, for the next time. A cache that can't be written only means packing again."""
        if self._path is not None and self._made:
            with suppress(OSError, UserError):
                packfile.write(self._path, {**self._held, **self._made}, self._mark)
        self._made = {}


def _mark(parameters: Sequence[tuple[str, Tensor]]) -> str:
    """A digest of a few rows of each parameter, which tells one that was changed where torch did not count it."""
    found = hashlib.sha256()
    for name, parameter in parameters:
        rows = parameter.detach().reshape(len(parameter), -1)
        some = rows[torch.linspace(0, len(rows) - 1, _LOOKED_AT).long()]
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        found.update(some.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

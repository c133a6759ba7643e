"""A model from a checkpoint: built without memory, then given the mapped tensors.

Where the dtype is the checkpoint's and the device the CPU, nothing is copied: pages are read from the disk when a layer
first runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from exitlm.errors import UserError
from exitlm.model import EarlyExitModel
from exitlm.values import wrong
from exitlm.weights.checkpoint import HEAD, Checkpoint, dtype_of, open_checkpoint


def load_model(
    source: str | os.PathLike[str] | Checkpoint,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    layers: Iterable[int] | None = None,
) -> EarlyExitModel:
    """The model in ``source``, in evaluation mode and without exits; ``model.checkpoint`` is the opened checkpoint.

    ``dtype`` ``auto`` is the checkpoint's. ``layers`` (1-based) builds and reads only these; embedding, final norm and
    head are always there.

    Raises:
        UserError: the source can't be opened, or its tensors are not those of its configuration.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    chosen = checkpoint.dtype if isinstance(dtype, str) and dtype == "auto" else dtype_of(dtype)
    config = checkpoint.model_config
    place = device_of(device)
    with torch.device("meta"), Unfilled():
        model = EarlyExitModel(config, None if layers is None else sorted({layer - 1 for layer in layers}))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop(HEAD)
        _check_tied_head(checkpoint)
    check_names(wanted, checkpoint, partial=layers is not None)
    tensors = {name: checkpoint.tensor(name).to(device=place, dtype=chosen) for name in wanted}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.checkpoint = checkpoint
    return model.eval()


def check_names(wanted: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint, *, partial: bool = False) -> None:
    """Refuse a checkpoint whose tensors are not exactly those ``wanted``, by name and shape.

    ``partial``: the checkpoint may have more layers than are wanted.
    """
    where, names = checkpoint.directory, set(checkpoint.names())
    missing = sorted(set(wanted) - names)
    if missing:
        raise UserError(f"{where} lacks {_some(missing)} that its config.json asks for; download or copy it again")
    unexpected = sorted(names - set(wanted))
    if unexpected and not partial:
        raise UserError(
            f"{where} holds {_some(unexpected)} that its config.json does not explain; choose another checkpoint"
        )
    for name, shape in wanted.items():
        found = checkpoint.entries[name].shape
        if found != shape:
            raise UserError(
                f"{where}: tensor '{name}' has shape {list(found)}, but its config.json asks for {list(shape)}"
            )
        if not checkpoint.entries[name].dtype.startswith(("F", "BF")):
            raise UserError(
                f"{where}: tensor '{name}' has dtype {checkpoint.entries[name].dtype}, which is no weight's"
            )


class Unfilled(TorchFunctionMode):
    """Leaves new modules as they are allocated: what torch's initialisation would write is replaced anyway, and on the
    meta device it writes nothing but imports the compiler (0.8 s)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _check_tied_head(checkpoint: Checkpoint) -> None:
    """A stored head must be the embedding it is tied to: to drop another one would change the model unnoticed."""
    embedding = "model.embed_tokens.weight"
    if HEAD not in checkpoint.entries or embedding not in checkpoint.entries:
        return
    head: Tensor = checkpoint.tensor(HEAD)
    tied = checkpoint.tensor(embedding)
    if head.shape != tied.shape or not torch.equal(head, tied):
        raise UserError(
            f"{checkpoint.directory} has a {HEAD} that differs from the embedding, but its config.json says "
            "tie_word_embeddings; set that to false there"
        )


def device_of(name: str | torch.device) -> torch.device:
    """The device of a name such as ``cuda``; a UserError where it can't be used."""
    if not isinstance(name, str | torch.device):
        raise wrong("device", name, "the name of a device, such as cpu or cuda")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().split("\n")[0].partition(". ")[0].rstrip(".")
        raise UserError(
            f"device {str(name)!r} can't be used ({reason}); use cpu, or cuda where there is one"
        ) from error
    return device


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"the tensor '{names[0]}'{more}"

"""Exit adapters: the exits of a model in a directory of their own, ``exits.safetensors`` and ``exits.json``.

The table names the base and the digest of its weights, each exit's configuration and tuning record, and the SHA-256 of
the tensors' file. The two files change together: the new table is laid beside the old one first, so that after a crash
at any moment one of the two tables fits the tensors, and that one is read. A lock keeps writers apart. A reader takes
none, for it may have no right to: it reads again if files changed meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exitlm.atomic import cannot_write, locked, replace_file, sync
from exitlm.errors import UserError, nearest
from exitlm.model import EarlyExitModel, ExitConfig, ExitHead, ExitRecord
from exitlm.model.exits import OWN_EXITS, check_layers
from exitlm.weights.checkpoint import HEAD, INDEX, SINGLE, Checkpoint, read_json
from exitlm.weights.load import Unfilled
from exitlm.weights.tensorfile import (
    Written,
    damaged,
    digest_of_file,
    digest_of_tensors,
    is_finite,
    open_file,
    read_header,
    write_tensors,
)

FORMAT, VERSION = "exitlm exits", 1
TENSORS, TABLE = "exits.safetensors", "exits.json"
_NEXT_TABLE = "exits.json.new"
_READS = 100  # of an adapter that changes each time
_NAME = re.compile(r"exits\.(\d{1,9})\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)", re.ASCII)
_OUTPUT = "output.weight"
_CONFIG_KEYS = {field.name for field in fields(ExitConfig)}


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read and checked. ``meta`` is its table, ``tensors`` are mapped, by name.

    ``output_from[layer]`` is the exit whose output matrix that of ``layer`` is.
    """

    directory: Path
    meta: Mapping[str, Any]
    exits: list[ExitConfig]
    records: Mapping[int, ExitRecord]
    output_from: Mapping[int, int]
    tensors: Mapping[str, Tensor]

    @property
    def base_digest(self) -> str:
        """The digest of the weights that the exits were tuned on."""
        return str(self.meta["base"]["digest"])


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds exits, alone or beside a model."""
    return (directory / TABLE).is_file() or ((directory / _NEXT_TABLE).is_file() and (directory / TENSORS).is_file())


# --- writing --------------------------------------------------------------------------------------------------------


def save_adapter(
    directory: str | os.PathLike[str],
    model: EarlyExitModel,
    *,
    training: Mapping[str, Any] | None = None,
    adapter: str | None = None,
) -> None:
    """Write the exits of ``model`` to ``directory``, whole or not at all; an adapter there is replaced.

    ``training`` is plain data about the run; without it, the record of the adapter that the exits came from is kept.
    ``adapter`` names one of several adapters that the model has (None: the exits of all, which must then be at
    different layers, since a directory holds one exit a layer).

    Raises:
        UserError: the model has no exits, several at a layer or none of that name, or the directory can't be written or
            holds another model.
    """
    directory = Path(directory)
    heads = heads_to_write(model, adapter)
    base = base_of(model)
    check_place(directory, lambda: base["digest"])
    existed = directory.is_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(directory, error) from error
    try:
        with locked(_lock_of(directory)):
            write_adapter(directory, heads, base, training=training)
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


def _lock_of(directory: Path) -> Path:
    """What writers lock: the directory, or a file in it where nothing can be made beside it."""
    place = Path(os.path.abspath(directory))
    return place if os.access(place.parent, os.W_OK) else place / TABLE


def check_place(directory: Path, digest: Callable[[], str]) -> None:
    """Refuse a place for exits beside a model whose weights have another ``digest`` than their base: that model would
    be loaded with them from then on, and refused. Nothing is hashed where there is no model."""
    directory = Path(os.path.abspath(directory))
    held = [name for name in ("config.json", SINGLE, INDEX) if (directory / name).is_file()]
    if not held:
        return
    try:
        found = Checkpoint(directory, directory.name).digest()
    except UserError:
        found = ""
    if found != digest():
        raise UserError(
            f"{directory} holds a model ({held[0]}) that is not the base of these exits, and that could not be loaded "
            "with them; choose another directory"
        )


def base_of(model: EarlyExitModel, digest: str | None = None, name: str | None = None) -> dict[str, Any]:
    """What the table says of the base: its name, the digest of its weights, and the sizes that exits depend on."""
    config, checkpoint = model.config, model.checkpoint
    return {
        "name": name or (checkpoint.name if checkpoint is not None else config.model_type),
        "digest": digest or digest_of_base(model),
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }


def digest_of_base(model: EarlyExitModel) -> str:
    """The digest of the checkpoint that a model was loaded from, or of its own weights if it came from none."""
    if isinstance(model.checkpoint, Checkpoint):
        return model.checkpoint.digest()
    return digest_of_tensors(backbone_tensors(model))


def backbone_tensors(model: EarlyExitModel) -> dict[str, Tensor]:
    """The tensors of a model by HF name, without its exits and without a head that is tied to the embedding."""
    tied = model.config.tie_word_embeddings
    state = model.state_dict()
    return {name: state[name] for name in state if not name.startswith("exits.") and not (tied and name == HEAD)}


def heads_to_write(model: EarlyExitModel, adapter: str | None = None) -> dict[int, ExitHead]:
    """The exits that go into a directory: those of one adapter, or of all (None).

    Raises:
        UserError: there are none, two adapters have one at the same layer, or no adapter has that name.
    """
    sets = model.exit_sets()
    if not sets:
        raise UserError("the model has no exits to save; tune some (exitlm tune) or add some (add_exits) first")
    if adapter is not None:
        if adapter not in sets:
            raise UserError(f"there is no adapter '{adapter}'{nearest(adapter, sets)}; there are: {', '.join(sets)}")
        return sets[adapter]
    heads: dict[int, ExitHead] = {}
    owner: dict[int, str] = {}
    for name, own in sets.items():
        for layer, head in own.items():
            if layer in heads:
                raise UserError(
                    f"adapters '{owner[layer]}' and '{name}' both have an exit at layer {layer}, and a directory holds "
                    f"one a layer; load only one of them, or save one by its name: save_exits(..., adapter='{name}')"
                )
            heads[layer], owner[layer] = head, name
    return dict(sorted(heads.items()))


def write_adapter(
    directory: Path,
    heads: Mapping[int, ExitHead],
    base: Mapping[str, Any],
    *,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the two files; the caller holds the lock. ``heads`` are at least one exit by layer, ascending; ``dtype``
    converts floating-point tensors (None: none)."""
    source = _matrix_owners(heads)
    tensors = [
        _written(f"exits.{layer}.{name}", tensor, dtype)
        for layer, head in heads.items()
        for name, tensor in sorted(head.state_dict().items())
        if name != _OUTPUT or source.get(layer, layer) == layer
    ]
    records = {layer: head.record for layer, head in heads.items()}
    if training is None:
        kept = [record.training for record in records.values()]
        training = kept[0] if kept[0] and all(entry == kept[0] for entry in kept) else None
    if training is not None:
        records = {layer: replace(record, training=None) for layer, record in records.items()}
    table = {
        "format": FORMAT,
        "version": VERSION,
        "base": dict(base),
        "exits": [
            {**asdict(head.config), "output_from": source.get(layer), "record": plain(records[layer].to_json())}
            for layer, head in heads.items()
        ],
        "training": plain(training),
    }
    following = directory / _NEXT_TABLE
    try:
        with replace_file(directory / TENSORS) as file:
            write_tensors(file, tensors, {"format": "pt"})
            table["tensors_sha256"] = digest_of_file(file)
            with replace_file(following) as beside:
                beside.write_text(json.dumps(table, indent=2, allow_nan=False), encoding="utf-8")
    except BaseException:
        following.unlink(missing_ok=True)
        raise
    try:
        os.replace(following, directory / TABLE)
        sync(directory)
    except OSError as error:
        raise cannot_write(directory / TABLE, error) from error


def _written(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Written:
    chosen = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return Written(name, chosen, tuple(tensor.shape), lambda: tensor.detach().to(chosen))


def _matrix_owners(heads: Mapping[int, ExitHead]) -> dict[int, int]:
    """For each exit with output ``exits``, the first exit that has the same matrix (perhaps itself)."""
    owners: dict[int, int] = {}
    first: dict[int, int] = {}
    for layer, head in heads.items():
        if head.config.output == "exits":
            owners[layer] = first.setdefault(id(head.output.weight), layer)
    return owners


def plain(value: Any) -> Any:
    """What JSON can hold: numbers of numpy and torch become Python's, tuples lists, and a number that is none null."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int | float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


# --- reading --------------------------------------------------------------------------------------------------------


def read_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """Read and check an adapter. Its tensors are mapped.

    Raises:
        UserError: there is none, it is damaged or from a newer exitlm, or it holds what is no part of an exit.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"there is no adapter directory {directory}; give one that exitlm tune or save_exits made")
    if not is_adapter(directory):
        if (directory / "checkpoints").is_dir():
            raise UserError(
                f"{directory} is a run and holds no exits by itself (yet); start the same command again to finish it, "
                "or write its model with exitlm export"
            )
        raise UserError(
            f"{directory} is not an exit adapter: it has no {TABLE}; give a directory that exitlm tune made"
        )
    for _ in range(_READS):
        before = _state(directory)
        try:
            found = _read(directory)
        except (UserError, OSError):
            if _state(directory) == before:
                raise
        else:
            if _state(directory) == before:
                return found
    raise UserError(f"another process writes to {directory} again and again; wait for it")


def _read(directory: Path) -> Adapter:
    """What its files hold, if none of them is replaced meanwhile."""
    table = _fitting_table(directory)
    exits, records, output_from = _exits(directory, table)
    tensors = _tensors(directory / TENSORS, {config.layer for config in exits})
    return Adapter(directory, table, exits, records, output_from, tensors)


def _state(directory: Path) -> list[tuple[int, int, int] | None]:
    """What changes when one of the files is replaced."""
    found: list[tuple[int, int, int] | None] = []
    for name in (TENSORS, TABLE, _NEXT_TABLE):
        try:
            status = (directory / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return found


def _fitting_table(directory: Path) -> dict[str, Any]:
    """The table whose digest is that of the tensors: the current one, or the next one where a writer died between."""
    weights = directory / TENSORS
    if not weights.is_file():
        raise UserError(f"{directory} lacks {TENSORS}; the adapter is incomplete, copy both of its files")
    digest = digest_of_file(weights)
    found: Any = None
    for name in (TABLE, _NEXT_TABLE):
        if (directory / name).is_file():
            table = _checked_table(directory / name)
            found = table["tensors_sha256"]
            if found == digest:
                return table
    raise UserError(
        f"{weights} is damaged: its SHA-256 is {digest}, but {TABLE} says {found}; copy the adapter again or restore it"
    )


def _checked_table(path: Path) -> dict[str, Any]:
    table = read_json(path)
    version = table.get("version")
    if table.get("format") != FORMAT or isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise UserError(f"{path} is not the table of an exit adapter; give a directory that exitlm tune made")
    if version > VERSION:
        raise UserError(
            f"{path} has adapter format version {version}, this exitlm reads up to {VERSION}; update exitlm"
        )
    base, exits = table.get("base"), table.get("exits")
    if (
        not isinstance(base, dict)
        or not isinstance(base.get("digest"), str)
        or not isinstance(exits, list)
        or not exits
    ):
        raise damaged(path, "it names no base or no exits")
    if not isinstance(table.get("training"), dict | None):
        raise damaged(path, "what it says of the training is not a table")
    if not isinstance(table.get("tensors_sha256"), str):
        raise damaged(path, "it has no digest of the tensors")
    return table


def _exits(directory: Path, table: Mapping[str, Any]) -> tuple[list[ExitConfig], dict[int, ExitRecord], dict[int, int]]:
    configs: list[ExitConfig] = []
    records: dict[int, ExitRecord] = {}
    output_from: dict[int, int] = {}
    for entry in table["exits"]:
        if not isinstance(entry, dict):
            raise damaged(directory / TABLE, "an exit of it is no table")
        values = dict(entry)
        record, source = values.pop("record", None) or {}, values.pop("output_from", None)
        for key in values:
            if key not in _CONFIG_KEYS:
                raise UserError(f"{directory / TABLE}: unknown exit setting '{key}'{nearest(key, _CONFIG_KEYS)}")
        if (
            not isinstance(record, dict)
            or not all(_is_natural(values.get(key, 0)) for key in ("layer", "rank", "candidates"))
            or not all(isinstance(values.get(key, False), bool) for key in ("gate", "branch"))
        ):
            raise damaged(directory / TABLE, "the settings of an exit have wrong types")
        try:
            found = ExitRecord.from_json(record)
        except UserError as error:
            what = f"the record of exit {values.get('layer')} is malformed: {error}"
            raise damaged(directory / TABLE, what) from error
        try:
            config = ExitConfig(**values)
        except TypeError as error:
            raise damaged(directory / TABLE, f"the settings of an exit are incomplete: {error}") from error
        configs.append(config)
        records[config.layer] = found
        if source is not None and not _is_natural(source):
            raise damaged(directory / TABLE, f"output_from of exit {config.layer} is no layer")
        if source is not None:
            output_from[config.layer] = source
    layers = [config.layer for config in configs]
    check_layers(layers, max([1, *layers]))
    if any(source not in output_from or output_from[source] != source for source in output_from.values()):
        raise damaged(directory / TABLE, "an exit takes its output matrix from one that has none")
    return sorted(configs, key=lambda config: config.layer), records, output_from


def _is_natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensors(path: Path, layers: set[int]) -> dict[str, Tensor]:
    names = read_header(path)[0]
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None or str(int(match[1])) != match[1] or int(match[1]) not in layers:
            raise UserError(
                f"{path} holds a tensor '{name}', which is no part of an exit it names; do not trust this file"
            )
    file = open_file(path)
    return {name: file.get_tensor(name) for name in names}


# --- attaching ------------------------------------------------------------------------------------------------------


def adapter_names(directories: Sequence[str | os.PathLike[str]]) -> list[str]:
    """What adapters are called, by the last part of their directories; a ``:``, which separates the base's name from
    an adapter's, becomes a ``-``.

    Raises:
        UserError: two would be called alike.
    """
    owner: dict[str, str | os.PathLike[str]] = {}
    for directory in directories:
        name = Path(directory).resolve().name.replace(":", "-") or OWN_EXITS
        if name in owner:
            raise UserError(
                f"the adapters {owner[name]} and {directory} would both be called '{name}', after the last part of "
                "their directories; rename one of the directories, or leave one out"
            )
        owner[name] = directory
    return list(owner)


def attach(
    model: EarlyExitModel,
    adapters: Iterable[str | os.PathLike[str]],
    *,
    allow_other_base: bool = False,
    names: Sequence[str] | None = None,
) -> None:
    """Add the exits of adapters to a model, in its dtype and on its device, beside those it has; all of them or none.

    Several may have an exit at a layer (see :meth:`EarlyExitModel.exit_sets`). ``names`` is what they are called (None:
    see :func:`adapter_names`).

    Raises:
        UserError: an adapter can't be read, was tuned on other weights (unless ``allow_other_base``), does not fit the
            model, or has the name of another.
    """
    directories = list(adapters)
    names = adapter_names(directories) if names is None else names
    read = [read_adapter(directory) for directory in directories]
    digest = digest_of_base(model) if read and not allow_other_base else None
    sets: dict[str, dict[int, ExitHead]] = {}
    for name, adapter in zip(names, read, strict=True):
        if digest is not None and adapter.base_digest != digest:
            raise UserError(
                f"the exits in {adapter.directory} were tuned on other weights: theirs have digest "
                f"{adapter.base_digest} ({adapter.meta['base'].get('name')}), this model's have {digest}; load their "
                "base, or allow another one (--allow-other-base, allow_other_base=True)"
            )
        if name in model.exit_sets():
            raise UserError(
                f"{adapter.directory} would be called '{name}', as are exits that the model has already; rename the "
                "directory, or remove those exits first"
            )
        sets[name] = _build(model, adapter)
    model.add_adapters(sets)


def _build(model: EarlyExitModel, adapter: Adapter) -> dict[int, ExitHead]:
    """The heads of an adapter, each tensor checked against what its configuration asks for."""
    where = adapter.directory / TENSORS
    check_layers([config.layer for config in adapter.exits], model.config.num_hidden_layers)
    heads: dict[int, ExitHead] = {}
    used: set[str] = set()
    for config in adapter.exits:
        prefix = f"exits.{config.layer}."
        own = {name.removeprefix(prefix): name for name in adapter.tensors if name.startswith(prefix)}
        with torch.device("meta"), Unfilled():
            head = ExitHead(config, model.config)
        source = adapter.output_from.get(config.layer, config.layer)
        state: dict[str, Tensor] = {}
        for name, expected in head.state_dict().items():
            if name == _OUTPUT and source != config.layer:
                own[name] = f"exits.{source}.{_OUTPUT}"
            if own.get(name) not in adapter.tensors:
                raise UserError(f"{where} lacks the tensor '{prefix}{name}'; the adapter is incomplete, copy it again")
            tensor = adapter.tensors[own[name]]
            used.add(own[name])
            if tensor.shape != expected.shape or tensor.is_floating_point() != expected.is_floating_point():
                raise UserError(
                    f"{where}: tensor '{own[name]}' is {list(tensor.shape)} of {tensor.dtype}, but the model and the "
                    f"exit's settings ask for {list(expected.shape)} of {expected.dtype}; the adapter does not fit"
                )
            state[name] = tensor.to(model.device, model.dtype if tensor.is_floating_point() else torch.long)
            if not is_finite(state[name]):
                raise UserError(
                    f"{where}: tensor '{own[name]}' holds NaN or infinity"
                    + (f" in {str(model.dtype).removeprefix('torch.')}; load the model with dtype 'float32'"
                       if is_finite(tensor) else "; tune the exits again, with a lower train.lr")
                )  # fmt: skip
        if head.candidate_ids is not None:
            _check_candidates(where, state["candidate_ids"], model.config.vocab_size)
        head.load_state_dict(state, assign=True)
        if source != config.layer:
            head.output = heads[source].output
        head.record = adapter.records[config.layer]
        if adapter.meta.get("training") is not None:
            head.record = replace(head.record, training=adapter.meta["training"])
        heads[config.layer] = head.train(model.training)
    extra = sorted(set(adapter.tensors) - used)
    if extra:
        raise UserError(f"{where} holds a tensor '{extra[0]}' that its exits do not have; do not trust this file")
    return heads


def _check_candidates(where: Path, ids: Tensor, vocab_size: int) -> None:
    rising = bool((ids[1:] > ids[:-1]).all())
    if not rising or int(ids[0]) < 0 or int(ids[-1]) >= vocab_size:
        raise UserError(f"{where}: candidate ids must rise and lie in the vocabulary of {vocab_size} tokens")

"""The model: embedding, layers, final norm, output matrix, and the exits attached to it.

Plain modules with global layer indices and HF names, so that parts may be absent (a pipeline stage holds some layers)
and a state dict is a checkpoint. Not here: files (``exitlm.weights``), sampling and caches made for decoding
(``exitlm.decode``), losses (``exitlm.train``).

Shapes: B rows, T new positions, S positions seen (stored and new), D hidden_size, V vocab_size, KV key/value heads,
Dh head_dim. Layers and exits are numbered from 1: tap e is the output of layer e, which is ``layers["e-1"]``.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from exitlm.errors import UserError
from exitlm.model.config import SLIDING, ModelConfig
from exitlm.model.exits import OWN_EXITS, ExitConfig, ExitHead, ExitKey, check_layers
from exitlm.model.layers import AttentionContext, CacheKey, DecoderLayer, PastProtocol, RMSNorm, Tap, model_norm
from exitlm.model.rope import rotary_tables

Part = TypeVar("Part", bound=nn.Module)
TokenIds = Tensor | Sequence[int] | Sequence[Sequence[int]]


class Past:
    """A plain cache for B rows: keys and values of ``length`` positions per layer. For inference: it writes in place.

    ``update`` places new keys and values behind the stored ones without counting them; ``advance`` counts them once all
    layers (and block exits) have seen them. Setting ``length`` back forgets the positions from there on.
    """

    def __init__(self) -> None:
        self.length = 0
        self._stored: dict[CacheKey, tuple[Tensor, Tensor]] = {}

    def update(self, key: CacheKey, key_BKTd: Tensor, value_BKTd: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, KV, T, Dh] at ``key`` and return all [B, KV, length + T, Dh], as views."""
        end = self.length + key_BKTd.shape[2]
        stored = self._stored.get(key)
        if stored is None or stored[0].shape[2] < end:
            grown = tuple(
                new.new_zeros(*new.shape[:2], max(end, 2 * self.length), new.shape[3]) for new in (key_BKTd, value_BKTd)
            )
            if stored is not None:
                for old, new in zip(stored, grown, strict=True):
                    new[:, :, : self.length] = old[:, :, : self.length]
            stored = self._stored[key] = (grown[0], grown[1])
        stored[0][:, :, self.length : end] = key_BKTd
        stored[1][:, :, self.length : end] = value_BKTd
        return stored[0][:, :, :end], stored[1][:, :, :end]

    def advance(self, count: int) -> None:
        """Count ``count`` positions as stored."""
        self.length += count


class Numbered(nn.ModuleDict, Generic[Part]):
    """Modules of one type under numbers as names: global indices stay what they are when some modules are absent."""

    def __getitem__(self, key: str) -> Part:
        return cast(Part, super().__getitem__(key))

    def by_number(self) -> dict[int, Part]:
        """The modules by number, ascending."""
        return {number: self[str(number)] for number in sorted(map(int, self))}


class Decoder(nn.Module):
    """Embedding, layers by global index, final norm. ``layers`` picks the 0-based layers to build (default: all)."""

    def __init__(self, config: ModelConfig, layers: Iterable[int] | None = None) -> None:
        super().__init__()
        chosen = range(config.num_hidden_layers) if layers is None else sorted(layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers: Numbered[DecoderLayer] = Numbered({str(index): DecoderLayer(config, index) for index in chosen})
        self.norm = model_norm(config)


class EarlyExitModel(nn.Module):
    """A decoder with exits. Built with torch's default initialisation on the default device and dtype.

    ``exits`` has one exit a layer; these are what training, saving and :meth:`exit_logits` see. Of several adapters
    that have an exit at a layer, it holds the first one's. The others are reached by :meth:`exit_sets` alone: they are
    no part of the state dict and of the parameters. ``checkpoint`` is a place for what the weights were loaded from;
    nothing here reads it.
    """

    def __init__(self, config: ModelConfig, layers: Iterable[int] | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, layers)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.exits: Numbered[ExitHead] = Numbered()
        self._adapters: dict[str, dict[int, ExitHead]] = {}
        self.checkpoint: Any = None
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output matrix and the embedding one Parameter, where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def initialise(self, seed: int = 0) -> None:
        """Give the backbone random weights: matrices N(0, initializer_range), biases 0, norms neutral.

        Values depend on the seed, the parameter's name order and the dtype's rounding only, not on the device.
        """
        generator = torch.Generator().manual_seed(seed)
        norms = {id(module.weight): module for module in self.modules() if isinstance(module, RMSNorm)}
        for name, parameter in self.named_parameters():
            if name.startswith("exits."):
                continue
            if id(parameter) in norms:
                parameter.fill_(1.0 - norms[id(parameter)].offset)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                noise = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(noise.normal_(0.0, self.config.initializer_range, generator=generator))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights (all have one)."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights (all are on one)."""
        return next(self.parameters()).device

    # --- the pass through the layers ---------------------------------------------------------------------------------

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D] of token ids, the family's scale included."""
        hidden: Tensor = self.model.embed_tokens(ids_BT)
        if self.config.embedding_scale != 1.0:
            hidden = hidden * _rounded(self.config.embedding_scale, hidden.dtype)
        return hidden

    def context(
        self,
        positions_BT: Tensor,
        attention_mask_BS: Tensor | None = None,
        past_length: int = 0,
        *,
        total_length: int | Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionContext:
        """Build what the layers share: rotary tables and masks.

        ``attention_mask_BS`` is 1 (or True) at real tokens and 0 at padding, for stored and new positions alike;
        ``total_length`` is passed to :func:`rotary_tables` (longrope only); ``dtype`` None is that of the weights.
        """
        config, dtype = self.config, dtype or self.dtype
        if config.rope_in_float32 and dtype != torch.float64:
            dtype = torch.float32
        cos, sin = rotary_tables(config.rope, positions_BT, dtype, total_length)
        local: tuple[Tensor | None, Tensor | None] = (None, None)
        if config.rope_local is not None:
            local = rotary_tables(config.rope_local, positions_BT, dtype, total_length)
        masks = {
            kind: attention_mask(
                positions_BT.shape[1],
                past_length,
                window=config.sliding_window if kind == SLIDING else None,
                valid_BS=attention_mask_BS,
                device=positions_BT.device,
            )
            for kind in dict.fromkeys(config.layer_types)
        }
        return AttentionContext(positions_BT, cos, sin, masks, *local)

    def run_layers(
        self,
        hidden: Tensor,
        context: AttentionContext,
        layers: Iterable[int],
        past: PastProtocol | None = None,
    ) -> dict[int, Tap]:
        """Run the layers that are present, from the first one to the highest of ``layers``, and return those taps.

        ``hidden`` enters the first present layer; where the layer below that one is asked for, it is its tap.
        """
        wanted = set(layers)
        present = self.model.layers.by_number()
        below = min(present, default=0)
        taps = {below: Tap(hidden)} if below in wanted else {}
        for index, layer in present.items():
            if index >= max(wanted, default=0):
                break
            number = index + 1
            if number in wanted and self._reads_mlp_input(number):
                taps[number] = Tap(*layer.parts(hidden, context, past))
                hidden = taps[number].hidden
            else:
                hidden = layer(hidden, context, past)
                if number in wanted:
                    taps[number] = Tap(hidden)
        return taps

    def _reads_mlp_input(self, layer: int) -> bool:
        return str(layer) in self.exits and self.exits[str(layer)].config.kind == "mlp"

    def taps(
        self,
        ids_BT: Tensor | None,
        layers: Iterable[int],
        *,
        attention_mask: Tensor | None = None,
        past: PastProtocol | None = None,
        start_hidden: Tensor | None = None,
        context: AttentionContext | None = None,
    ) -> dict[int, Tap]:
        """Return the taps of ``layers`` (1-based), running no layer above the highest.

        ``start_hidden`` [B, T, D] replaces the embedded ids and enters the first layer that is present. The caller
        advances ``past``, after exits with a cache of their own have read the taps. A ready ``context`` may be given in
        place of ``attention_mask``.
        """
        hidden = start_hidden if start_hidden is not None else self.embed(_require(ids_BT))
        if context is None:
            context = self.context_for(hidden.shape[0], hidden.shape[1], attention_mask, past)
        return self.run_layers(hidden, context, layers, past)

    def context_for(
        self, rows: int, count: int, attention_mask: Tensor | None = None, past: PastProtocol | None = None
    ) -> AttentionContext:
        """Build the context of ``count`` new positions behind those of ``past``.

        ``attention_mask`` [B, S] covers stored and new positions; padding is not counted in the positions behind it.
        """
        stored = 0 if past is None else past.length
        if attention_mask is None:
            positions = torch.arange(stored, stored + count, device=self.device).expand(rows, count)
            return self.context(positions, None, stored)
        if attention_mask.shape != (rows, stored + count):
            raise UserError(
                f"the attention mask has shape {tuple(attention_mask.shape)}, but must cover {stored} stored "
                f"and {count} new positions of {rows} rows: {(rows, stored + count)}"
            )
        positions = (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)[:, stored:]
        return self.context(positions, attention_mask, stored)

    def final_features(self, hidden: Tensor) -> Tensor:
        """What the output matrix reads: the final norm of the last layer's output."""
        features: Tensor = self.model.norm(hidden)
        return features

    def forward(self, ids_BT: Tensor, attention_mask: Tensor | None = None, past: Past | None = None) -> Tensor:
        """Logits [B, T, V] of the final head; advances ``past`` by T."""
        depth = self.config.num_hidden_layers
        hidden = self.taps(ids_BT, (depth,), attention_mask=attention_mask, past=past)[depth].hidden
        if past is not None:
            past.advance(ids_BT.shape[1])
        logits: Tensor = self.lm_head(self.final_features(hidden))
        return logits

    # --- plain tensors for anyone -------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, ids: TokenIds) -> Tensor:
        """Logits [B, T, V] of the final head for a list of ids, [T] or [B, T]."""
        return self.forward(self.check_ids(ids))

    @torch.no_grad()
    def exit_logits(self, ids: TokenIds) -> dict[int, Tensor]:
        """Logits [B, T, V] of each exit by its layer; -inf outside of the exit's candidates."""
        ids_BT = self.check_ids(ids)
        heads = self.exit_heads()
        context = self.context_for(*ids_BT.shape)
        taps = self.taps(ids_BT, heads, context=context)
        weight = self.lm_head.weight
        return {
            layer: head.expand(head.project(head.features(taps[layer], context), weight))
            for layer, head in heads.items()
        }

    def check_ids(self, ids: TokenIds) -> Tensor:
        """Return ids [B, T] on the model's device.

        Raises:
            UserError: no ids, ids that are no integers, rows of different length, or ids beyond the vocabulary.
        """
        try:
            found = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            reason = str(error).split("\n")[0].rstrip(".")
            raise UserError(f"token ids must be integers in rows of one length ({reason})") from None
        if found.numel() and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
            raise UserError(f"token ids must be integers, not {str(found.dtype).removeprefix('torch.')}")
        if found.dim() not in (1, 2) or not found.numel():
            raise UserError(f"token ids must be [T] or [B, T] and not empty, not of shape {tuple(found.shape)}")
        found = found.long()  # torch has no minimum of unsigned ones
        if found.device.type != "meta" and not 0 <= int(found.min()) <= int(found.max()) < self.config.vocab_size:
            raise UserError(f"token ids must lie in 0..{self.config.vocab_size - 1}, the vocabulary of the model")
        return found.reshape(-1, found.shape[-1]).to(self.device)

    # --- exits --------------------------------------------------------------------------------------------------------

    def exit_heads(self) -> dict[int, ExitHead]:
        """The exits by layer, ascending."""
        return self.exits.by_number()

    def exit_sets(self) -> dict[str, dict[int, ExitHead]]:
        """The exits of each adapter by layer, ascending; the adapters in the order in which they were added. Exits that
        came from none are those of ``exits``, which stands first if no adapter has that name. Where several have an
        exit at a layer, the first one's is in :attr:`exits`."""
        sets = {name: dict(heads) for name, heads in self._adapters.items()}
        named = {id(head) for heads in sets.values() for head in heads.values()}
        own = {layer: head for layer, head in self.exit_heads().items() if id(head) not in named}
        if not own:
            return sets
        joined = {OWN_EXITS: dict(sorted({**sets.get(OWN_EXITS, {}), **own}.items()))}
        return {**sets, **joined} if OWN_EXITS in sets else {**joined, **sets}

    def heads_by_key(self) -> dict[ExitKey, ExitHead]:
        """Every exit of every adapter, by layer, and at one layer in the order of the adapters."""
        sets = self.exit_sets()
        layers = sorted({layer for heads in sets.values() for layer in heads})
        return {(name, layer): heads[layer] for layer in layers for name, heads in sets.items() if layer in heads}

    def add_adapters(self, adapters: Mapping[str, Mapping[int, ExitHead]]) -> None:
        """Attach the exits of adapters by name and layer, and keep those that are there.

        Raises:
            UserError: a name is taken, or has no layer. The model is then unchanged.
        """
        taken = self.exit_sets()
        for name in adapters:
            if name in taken:
                raise UserError(f"the model has exits called '{name}' already; give the others another name")
        for heads in adapters.values():
            check_layers(list(heads), self.config.num_hidden_layers)
        self._adapters |= {name: dict(sorted(heads.items())) for name, heads in adapters.items() if heads}
        added: dict[int, ExitHead] = {}
        for heads in adapters.values():
            added = {**heads, **added}  # the first one's stays
        self.exits.update({str(e): added[e] for e in sorted(added) if str(e) not in self.exits})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch does to all that is in the module, also to the exits that are only in an adapter."""
        inside = {id(head) for head in self.exits.values()}
        for heads in self._adapters.values():
            for head in heads.values():
                if id(head) not in inside:
                    head._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def add_exits(self, configs: Sequence[ExitConfig], *, seed: int = 0, candidate_ids: Tensor | None = None) -> None:
        """Attach new, initialised exits and keep those that are there. An exit's values do not depend on the others'.

        ``candidate_ids``: token ids, most frequent first; an exit with n candidates takes the first n.

        Raises:
            UserError: a layer out of range, given twice, or with an exit already; exits that are to share one matrix
                but not their candidates. The model is then unchanged.
        """
        layers = [config.layer for config in configs]
        check_layers(layers, self.config.num_hidden_layers)
        taken = sorted(layer for layer in layers if str(layer) in self.exits)
        if taken:
            raise UserError(f"layer {taken[0]} has an exit already; remove it first, or leave it out")
        added: dict[str, ExitHead] = {}
        backbone = self.model.layers.by_number(), self.model.norm, self.lm_head.weight
        for config in sorted(configs, key=lambda config: config.layer):
            with torch.device(self.device):
                head = ExitHead(config, self.config, candidate_ids)
            head.to(self.device, self.dtype).train(self.training)
            head.initialise(*backbone, torch.Generator().manual_seed((seed * 100_003 + config.layer) % 2**64))
            self._share_output(head, [*self.exit_heads().values(), *added.values()])
            added[str(config.layer)] = head
        self.exits.update(added)

    @staticmethod
    def _share_output(head: ExitHead, others: Sequence[ExitHead]) -> None:
        """Let an exit with output "exits" use the matrix of the others that have it."""
        if head.config.output != "exits":
            return
        for other in others:
            if other.config.output != "exits":
                continue
            mine, theirs = head.candidate_ids, other.candidate_ids
            if (mine is None) != (theirs is None) or (mine is not None and not torch.equal(mine, _require(theirs))):
                raise UserError(
                    f"exits {other.config.layer} and {head.config.layer} are to share one output matrix, but not their "
                    "candidates; give both the same candidates, or one of them output 'own'"
                )
            head.output = other.output
            return

    def remove_exits(self, layers: Iterable[int]) -> None:
        """Detach exits, those of all adapters; a layer without one is a UserError."""
        chosen = list(dict.fromkeys(layers))
        self._exits_at(chosen)
        for layer in chosen:
            del self.exits[str(layer)]
        left = {n: {e: h for e, h in heads.items() if e not in chosen} for n, heads in self._adapters.items()}
        self._adapters = {name: heads for name, heads in left.items() if heads}

    def own_outputs(self, layers: Iterable[int] | None = None) -> None:
        """Give exits (default: all) whose output matrix is shared a copy of their own; the others stay as they are."""
        for head in self._exits_at(self.exit_heads() if layers is None else layers):
            if head.config.output not in ("shared", "exits"):
                continue
            weight = head.output_weight(self.lm_head.weight).detach().clone()
            with torch.device("meta"):
                output = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            output.weight = nn.Parameter(weight)
            head.output = output
            head.config = dataclasses.replace(head.config, output="own")

    def _exits_at(self, layers: Iterable[int]) -> list[ExitHead]:
        heads = self.exit_heads()
        chosen = list(layers)
        absent = [layer for layer in chosen if layer not in heads]
        if absent:
            found = ", ".join(map(str, heads)) or "none"
            raise UserError(f"layer {absent[0]} has no exit; the model's exits are: {found}")
        return [heads[layer] for layer in chosen]

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter that is no exit's, once."""
        own = {id(parameter) for parameter in self.exits.parameters()}
        return (parameter for parameter in self.parameters() if id(parameter) not in own)

    def exit_parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of the exits, once."""
        return self.exits.parameters()


def attention_mask(
    count: int,
    past_length: int,
    *,
    window: int | None = None,
    valid_BS: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor | None:
    """Which stored and new positions each of ``count`` new ones may attend to: bool [B or 1, 1, T, S], or None.

    None stands for what SDPA does without a mask: causal attention from position 0, or one query that sees everything.
    A query of padding attends to itself, so that no row is empty.
    """
    total = past_length + count
    if window is not None and total <= window:
        window = None
    if valid_BS is None and window is None and (past_length == 0 or count == 1):
        return None
    query = torch.arange(past_length, total, device=device)[:, None]
    key = torch.arange(total, device=device)[None, :]
    allowed = key <= query
    if window is not None:
        allowed = allowed & (key > query - window)
    if valid_BS is None:
        return allowed[None, None]
    return ((allowed & valid_BS.bool()[:, None, :]) | (key == query))[:, None]


@functools.lru_cache(maxsize=16)
def _rounded(value: float, dtype: torch.dtype) -> float:
    """The nearest number in ``dtype``: Gemma rounds its embedding scale to the dtype of the weights."""
    return float(torch.tensor(value, dtype=dtype, device="cpu"))


def _require(value: Any) -> Any:
    if value is None:
        raise UserError("token ids or start_hidden must be given")
    return value

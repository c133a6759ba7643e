"""From logits to a token: bans and biases, penalties, filters, and a race that any drafter can run too.

The order, for the final head and for exit heads alike: a grammar's mask (the caller's), then :meth:`Sampler.restrict`,
then the exit rule's score (the caller's), then :meth:`Sampler.shape`, then temperature -> top-k -> top-p (arXiv
1904.09751) -> min-p (arXiv 2407.01082). The token is argmax p_v / E_v over the tokens that are left, with the noise E
of :mod:`exitlm.decode.sampling.noise`: an exponential race, and so an exact draw from p. A draft is the same race with
the drafter's q and the same noise, and is accepted iff it is the token that p would have drawn anyway. So drafts never
change a text (drafter-invariant sampling, arXiv 2408.07978). Temperature 0 is the case without noise.

Nothing here has state but :class:`TokenCounts`, which belongs to one sequence. On a CPU the race runs in numpy, whose
calls cost a fraction of torch's. Shapes: logits and probabilities are one row ``[V]``; n token ids; R rows of a pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exitlm.decode.sampling.noise import noise, noise_at
from exitlm.errors import UserError, short
from exitlm.values import elements, number, whole, wholes, wrong

LogitsProcessor = Callable[[list[int], Tensor], Tensor]

_HUGE = 1e30  # a penalty above, and a temperature below 1 / this, are taken for it
_GROUP = 64  # logits of which only the largest is looked at first in the search for the k largest
_NEARLY, _ROUNDING = 0.999, 1e-9  # leave more room than rounding can need
_RANGES = {  # name -> the least and the largest value
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, math.inf),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}


class NoTokenLeft(UserError):
    """All logits are minus infinity: grammar, bans and processor together leave no token."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Which noise decides a token: that of a seed (at most 64 bits), a choice, and a position in the output."""

    seed: int
    choice: int = 0
    position: int


class TokenCounts:
    """The tokens of one sequence and how often each occurs, kept up to date so that a penalty does not read the text.

    ``ids``: prompt, generated tokens and the drafts behind them, in order; read it, and change it by :meth:`push` and
    :meth:`pop` alone. A push or pop is O(1); a penalty is O(distinct tokens).
    """

    def __init__(self, prompt_ids: Iterable[int], generated_ids: Iterable[int] = ()) -> None:
        self.ids = list(prompt_ids)
        self._prompt = len(self.ids)
        distinct = list(dict.fromkeys(self.ids))
        self._slot = {token: slot for slot, token in enumerate(distinct)}
        self._token = np.array(distinct + [0] * 64, np.int64)  # by slot; room for more behind the used ones
        self._total = np.zeros(len(self._token), np.int64)
        self._generated = np.zeros(len(self._token), np.int64)
        np.add.at(self._total, [self._slot[token] for token in self.ids], 1)
        for token in generated_ids:
            self.push(token)

    def push(self, token: int) -> None:
        """One more token at the end: generated or drafted."""
        slot = self._slot.get(token)
        if slot is None:
            slot = self._slot[token] = len(self._slot)
            if slot == len(self._token):
                grown = [np.concatenate([a, np.zeros_like(a)]) for a in (self._token, self._total, self._generated)]
                self._token, self._total, self._generated = grown
            self._token[slot] = token
        self._total[slot] += 1
        self._generated[slot] += 1
        self.ids.append(token)

    def pop(self, count: int = 1) -> None:
        """Drop the last ``count`` tokens, none of them the prompt's."""
        assert 0 <= count <= len(self.ids) - self._prompt
        for _ in range(count):
            token = self.ids.pop()
            slot = self._slot[token]
            self._total[slot] -= 1
            self._generated[slot] -= 1
            if self._total[slot] == 0:  # so its first place was this one, and its slot is the newest
                del self._slot[token]

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The distinct token ids ``[n]`` and how often each was generated ``[n]``, until the next push or pop."""
        used = len(self._slot)
        ids_n, generated_n = (torch.from_numpy(a[:used]).to(device) for a in (self._token, self._generated))
        return ids_n, generated_n


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The settings of sampling, and the functions from logits to a token.

    ``repetition_penalty`` (arXiv 1909.05858) divides the positive and multiplies the negative logits of all tokens of
    prompt and output; ``presence_penalty`` is subtracted from the logits of generated tokens, ``frequency_penalty``
    once for each time that one was generated (OpenAI's meaning). ``logit_bias``: from a token id to what is added to
    its logit. ``bad_words``: sequences of token ids that are never completed. ``processor(ids, logits)``: a pure
    function of all token ids so far and the logits ``[V]`` that returns logits ``[V]``; it is called for drafts and for
    refused tokens too, any number of times, in any order.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[Sequence[int]] = ()
    processor: LogitsProcessor | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            expected = f"a number from {low:g} to {high:g}"
            value = number(getattr(self, name), name, expected)
            if not low <= value <= high or value == math.inf:
                raise UserError(f"{name} is {value}, but must be {expected}")
            object.__setattr__(self, name, value)
        if self.top_p == 0.0:
            raise UserError("top_p is 0, which leaves no token; use a number above 0, or temperature 0 for greedy text")
        if self.repetition_penalty == 0.0:
            raise UserError("repetition_penalty is 0, but logits are divided by it; use 1 for no penalty")
        object.__setattr__(self, "top_k", whole(self.top_k, "top_k", least=0))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        words = elements(self.bad_words, "bad_words", "a sequence of sequences of token ids")
        object.__setattr__(self, "bad_words", tuple(map(bad_word, words)))
        if self.processor is not None and not callable(self.processor):
            raise wrong("logits_processor", self.processor, "a function of (token ids, logits)")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def plain(self) -> bool:
        """Whether the argmax of the raw logits is the token: nothing depends on the text before."""
        return self.greedy and not (self.restricts or self.penalises) and self.processor is None

    @property
    def restricts(self) -> bool:
        """Whether :meth:`restrict` may change logits."""
        return bool(self.logit_bias or self.bad_words)

    @property
    def penalises(self) -> bool:
        """Whether there is a penalty on tokens that occurred."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that a model of ``vocab_size`` tokens does not have."""
        named = [("logit_bias", list(self.logit_bias)), *(("bad_words", word) for word in self.bad_words)]
        for name, ids in named:
            for token in ids:
                if token >= vocab_size:
                    raise UserError(f"{name} has token id {token}, but the model has the ids 0 to {vocab_size - 1}")

    # ---- before the exit rule

    def restrict(self, logits_V: Tensor, ids: Sequence[int]) -> Tensor:
        """Logits ``[V]`` with ``logit_bias`` added, and minus infinity for what would complete one of ``bad_words``
        after the text ``ids``. The given logits stay as they are; half precision is widened to float32."""
        banned = self._banned(ids)
        if not (self.logit_bias or banned):
            return logits_V
        out_V = logits_V.to(_wide(logits_V.dtype), copy=True)
        if self.logit_bias:
            ids_n, bias_n = (tensor.to(out_V.device) for tensor in self._bias)
            out_V.index_add_(0, ids_n, bias_n.to(out_V.dtype))
        if banned:
            out_V[torch.tensor(banned, device=out_V.device)] = -torch.inf
        return out_V

    @functools.cached_property
    def _bias(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(list(self.logit_bias)), torch.tensor(list(self.logit_bias.values()), dtype=torch.float64)

    @functools.cached_property
    def _endings(self) -> dict[int | None, list[tuple[list[int], int]]]:
        """(what stands before, the last token) of each bad word, by the token just before the last; None: always."""
        found: dict[int | None, list[tuple[list[int], int]]] = {}
        for word in self.bad_words:
            *before, last = word
            found.setdefault(before[-1] if before else None, []).append((before, last))
        return found

    def _banned(self, ids: Sequence[int]) -> list[int]:
        """The tokens that may not come after ``ids``."""
        if not self.bad_words:
            return []
        banned = [last for _, last in self._endings.get(None, ())]
        if ids:
            close = self._endings.get(ids[-1], ())
            banned += [last for before, last in close if list(ids[-len(before) :]) == before]
        return banned

    # ---- after the exit rule

    def shape(self, logits_V: Tensor, text: TokenCounts) -> Tensor:
        """Logits ``[V]`` after the penalties, then after the processor, for the token that follows ``text``.

        The given logits stay as they are; half precision is widened to float32. A processor that raises, or returns
        anything but usable logits, is a :class:`UserError` that names it.
        """
        out_V = logits_V
        if self.penalises and text.ids:
            ids_n, generated_n = text.tensors(logits_V.device)
            out_V = logits_V.to(_wide(logits_V.dtype), copy=True)
            out_V[ids_n] = self._penalised(out_V[ids_n], generated_n)
        if self.processor is not None:
            own = out_V if out_V is not logits_V else logits_V.to(_wide(logits_V.dtype), copy=True)
            out_V = self._processed(own, text)
        return out_V

    def _penalised(self, logits_n: Tensor, generated_n: Tensor) -> Tensor:
        if self.repetition_penalty != 1.0:
            r = min(max(self.repetition_penalty, 1 / _HUGE), _HUGE)  # else 0 or infinity in float32, and then NaN
            logits_n = torch.where(logits_n > 0, logits_n / r, logits_n * r).clamp_max(torch.finfo(logits_n.dtype).max)
        if self.frequency_penalty:
            logits_n = logits_n - self.frequency_penalty * generated_n.to(logits_n.dtype)
        if self.presence_penalty:
            logits_n = logits_n - self.presence_penalty * (generated_n > 0).to(logits_n.dtype)
        return logits_n

    def _processed(self, logits_V: Tensor, text: TokenCounts) -> Tensor:
        name = getattr(self.processor, "__qualname__", None) or type(self.processor).__qualname__
        shape, dtype, device = logits_V.shape, logits_V.dtype, logits_V.device
        assert self.processor is not None
        try:
            found: Any = self.processor(list(text.ids), logits_V)
        except Exception as error:
            raise UserError(f"logits_processor {name} raised {type(error).__name__}: {short(str(error))}") from error
        said = f"logits_processor {name} must return logits of shape {list(shape)}, {dtype} on {device}, but returned "
        if not isinstance(found, Tensor):
            raise UserError(f"{said}{short(found)} ({type(found).__name__})")
        if (found.shape, found.dtype, found.device) != (shape, dtype, device):
            raise UserError(f"{said}shape {list(found.shape)}, {found.dtype} on {found.device}")
        if not bool((found < torch.inf).all()):
            raise UserError(f"logits_processor {name} returned NaN or infinity; use -inf to forbid a token")
        return found

    # ---- the token

    def distribution(self, logits_V: Tensor) -> Tensor:
        """Probabilities ``[V]`` after temperature and filters, in float32 or the logits' own wider type. Greedy gives
        all mass to the argmax. The logits have no NaN and no plus infinity."""
        wide_V = logits_V.to(_wide(logits_V.dtype))
        if self.greedy:
            return torch.zeros_like(wide_V).index_fill_(0, wide_V.argmax(), 1.0)
        ids_n, weights_n = self._left(wide_V.numpy(force=True))
        out_V = np.zeros(len(wide_V), weights_n.dtype)
        out_V[slice(None) if ids_n is None else ids_n] = weights_n / weights_n.sum()
        return torch.from_numpy(out_V).to(wide_V.device)

    def choose(self, logits_V: Tensor, draw: Draw) -> int:
        """The token: the argmax if greedy, else the winner of the race; the lowest id of equals.

        The logits ``[V]`` went through :meth:`restrict` and :meth:`shape`; they have no NaN and no plus infinity. That
        all of them are minus infinity raises :class:`NoTokenLeft`: mask, bans and processor left none.
        """
        if self.greedy:
            token = _argmax(logits_V)
            _some(float(logits_V[token]))
            return token
        wide_V, given = logits_V.to(_wide(logits_V.dtype)), (draw.seed, draw.choice, draw.position)
        if wide_V.device.type != "cpu" and not self._filters:
            noise_V = noise(*given, vocab_size=len(wide_V), device=wide_V.device)
            return _winner(wide_V, self.temperature, noise_V)
        ids_n, weights_n = self._left(wide_V.numpy(force=True))
        if ids_n is None:
            return _first(weights_n, noise(*given, vocab_size=len(weights_n)).numpy())
        return int(ids_n[_first(weights_n, noise_at(*given, ids_n))])

    @property
    def _filters(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    def _left(self, logits_V: NDArray[Any]) -> tuple[NDArray[np.int64] | None, NDArray[Any]]:
        """The ids ``[n]`` that the filters leave, rising (None: all), and their weights: probabilities up to a factor,
        the largest of them 1."""
        top = logits_V.max()
        _some(float(top))
        ids_n: NDArray[np.int64] | None = None
        logits_n = logits_V
        if 0 < self.top_k < len(logits_V):
            ids_n = _largest(logits_V, self.top_k)
            logits_n = logits_V[ids_n]
        weights_n = logits_n - top
        with np.errstate(over="ignore"):  # the largest stays 0, however small the temperature
            weights_n /= max(self.temperature, 1 / _HUGE)
        np.exp(weights_n, out=weights_n)
        if self.top_p < 1.0:
            at_n = _nucleus(weights_n, self.top_p)
            ids_n, weights_n = at_n if ids_n is None else ids_n[at_n], weights_n[at_n]
        if self.min_p > 0.0:
            at_n = np.flatnonzero(weights_n >= self.min_p)
            ids_n, weights_n = at_n if ids_n is None else ids_n[at_n], weights_n[at_n]
        return ids_n, weights_n


def finite_rows(logits_RV: Tensor) -> list[bool]:
    """Whether the logits of each row are finite, in one pass over them."""
    found: list[bool] = logits_RV.sum(-1, dtype=_wide(logits_RV.dtype)).isfinite().tolist()
    return found


def _largest(logits_V: NDArray[Any], k: int) -> NDArray[np.int64]:
    """The rising indices of the ``k`` largest, and of all that equal the least of them; never of minus infinity."""
    groups = len(logits_V) // max(1, min(_GROUP, len(logits_V) // (4 * k)))
    best = logits_V[: len(logits_V) // groups * groups].reshape(-1, groups).max(0)
    # k groups have a maximum of at least the bound, so k logits have, and the k-th largest is not below it
    bound = max(np.partition(best, -k)[-k], np.finfo(logits_V.dtype).min)
    near_n = np.flatnonzero(logits_V >= bound)
    if len(near_n) <= k:
        return near_n
    logits_n = logits_V[near_n]
    kept_n: NDArray[np.int64] = near_n[logits_n >= np.partition(logits_n, -k)[-k]]
    return kept_n


def _nucleus(weights_V: NDArray[Any], top_p: float) -> NDArray[np.int64]:
    """The rising indices of the largest weights that hold the share ``top_p``: those before which there is less, where
    equals stand in the order of their indices."""
    total = float(weights_V.sum(dtype=np.float64))
    wanted = top_p * total

    def near(weights_n: NDArray[Any], mass: float) -> NDArray[np.int64]:
        # Before a kept weight there is less than what is wanted. So it and all after it, of which it is the largest,
        # hold more than the rest: it is above their mean, and what is below need not be sorted.
        return np.flatnonzero(weights_n >= (_NEARLY * (mass - wanted) - _ROUNDING * total) / len(weights_n))

    ids_n = near(weights_V, total)
    weights_n = weights_V[ids_n]
    at_n = near(weights_n, float(weights_n.sum(dtype=np.float64)))  # far fewer: what is left has a larger mean
    ids_n, weights_n = ids_n[at_n], weights_n[at_n]
    ordered_n = np.sort(weights_n)[::-1]
    kept = 1 + int(np.count_nonzero(ordered_n[:-1].cumsum(dtype=np.float64) < wanted))
    keep_n = weights_n > ordered_n[kept - 1]
    equal_n = np.flatnonzero(weights_n == ordered_n[kept - 1])
    keep_n[equal_n[: kept - np.count_nonzero(keep_n)]] = True
    kept_ids_n: NDArray[np.int64] = ids_n[keep_n]
    return kept_ids_n


def _first(weights_n: NDArray[Any], noise_n: NDArray[np.float64]) -> int:
    """The winner of the race."""
    return int(np.divide(weights_n, noise_n, dtype=np.float64).argmax())


def _winner(logits_V: Tensor, temperature: float, noise_V: Tensor) -> int:
    """The race of all tokens, on the device of the logits."""
    top = logits_V.amax()
    _some(float(top))
    weights_V = torch.exp((logits_V - top).div_(max(temperature, 1 / _HUGE)))
    return _argmax(weights_V.double().div_(noise_V))


def _argmax(values_V: Tensor) -> int:
    """The first index of the largest value."""
    if values_V.device.type == "cpu" and values_V.dtype in (torch.float32, torch.float64):
        return int(values_V.numpy(force=True).argmax())  # in a tenth of torch's time
    return int(values_V.argmax())


def _wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)


def _some(largest: float) -> None:
    """Refuse logits of which the largest is minus infinity."""
    if largest == -math.inf:
        raise NoTokenLeft(
            "no token is allowed: grammar, bad_words and logits_processor together forbid all; loosen one"
        )


def _biases(value: Any) -> dict[int, float]:
    """``logit_bias``: from any mapping; a text of digits is a token id, since JSON has no other keys."""
    if not isinstance(value, Mapping):
        raise wrong("logit_bias", value, "a mapping from token ids to numbers from -100 to 100")
    found: dict[int, float] = {}
    for key, given in value.items():
        digits = isinstance(key, str) and key.isdecimal() and len(key) < 20
        token = whole(int(key) if digits else key, "a token id in logit_bias", least=0)
        bias = number(given, f"logit_bias of token {token}", "a number from -100 to 100")
        if not -100.0 <= bias <= 100.0:
            raise UserError(f"logit_bias of token {token} is {bias}, but must be a number from -100 to 100")
        if token in found:
            raise UserError(f"logit_bias has token {token} more than once; give it one number")
        found[token] = bias
    return found


def bad_word(value: Any) -> tuple[int, ...]:
    """One of ``bad_words``, from any sequence of token ids."""
    found = tuple(wholes(value, "a sequence in bad_words", "a sequence of token ids"))
    if not found:
        raise UserError("a sequence in bad_words is empty, which would forbid every token; leave it out")
    if min(found) < 0:
        raise UserError(f"a sequence in bad_words has token id {min(found)}, but ids are whole numbers from 0")
    return found

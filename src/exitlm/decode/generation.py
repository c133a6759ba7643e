"""What a user asks of a generation and what comes back: plain data, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from exitlm.decode.rules import RULES, check_threshold
from exitlm.decode.sampling.grammar import read_response_format
from exitlm.decode.sampling.sampler import LogitsProcessor, Sampler, bad_word
from exitlm.errors import UserError, nearest, short
from exitlm.palette import html, palette
from exitlm.values import elements, flag, seed_of, settings_of, whole, wholes, words, wrong

MODES = ("full", "threshold", "lossless")
DRAFTS = ("exits", "lookup", "grammar", "prediction")
MAX_CHOICES = 1024

_SAMPLING = (  # settings that a Sampler has under the same name, and in the same form
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of one generation.

    ``mode``: ``full`` runs all layers for every token; ``threshold`` emits at the first exit whose rule fires;
    ``lossless`` drafts at exits (and from the text before) and verifies, so that the output is exactly the full
    model's. ``rule``: probability, margin, entropy, gate, patience, fixed or decay; None is the gate where exits were
    tuned with one, else probability. ``threshold``: a number in [0, 1], or one per exit layer (a mapping); None takes
    what tuning stored for the rule, else 0.9. ``exits``: the active exit layers; None is all of them, or those that
    tuning found worth testing when rule and threshold are left at None too. ``adapter``: the name of the adapter whose
    exits these are, of a model that has several (:attr:`exitlm.LLM.adapters`); None is all of them, and at a layer
    where several have an exit the first one's. ``patience``: successive exits that must agree. ``exit_layer``: the
    layer of rule ``fixed`` (None: the deepest active exit). ``max_pending``: positions that may wait for the deeper
    layers (None: 64; it changes no token). ``min_exit_tokens``: tokens before the first exit may fire. ``draft``: the
    sources of drafts in lossless mode: exits, lookup (what followed the same words before) and grammar (what
    ``response_format`` forces) and prediction; ``max_draft`` caps one round (at most 63). ``prediction``: a text or
    token ids that much of the output is expected to be, such as a file that is edited (lossless mode). ``adaptive``
    lets measured acceptance and cost set the length of drafts. ``temperature`` (0: greedy) to ``logits_processor`` are
    those of :class:`exitlm.decode.sampling.sampler.Sampler`; ``bad_words`` are texts or token ids each, and ``seed``
    decides all that is random (None: a fresh one). ``logprobs``: 0 is off, n gives each token's log-probability and the
    n most likely alternatives; ``prompt_logprobs`` likewise for the prompt's own tokens (None is off, 0 without
    alternatives). ``n``: how many texts to write, each with noise of its own. ``response_format``: what the text must
    look like, a JSON schema, a regular expression or one of some choices (see
    :func:`exitlm.decode.sampling.grammar.read_response_format`).
    """

    max_new_tokens: int = 128
    mode: str = "lossless"
    rule: str | None = None
    threshold: float | Mapping[int, float] | None = None
    exits: Sequence[int] | None = None
    adapter: str | None = None
    patience: int = 2
    exit_layer: int | None = None
    max_pending: int | None = None
    min_exit_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[str | Sequence[int]] = ()
    logits_processor: LogitsProcessor | None = None
    response_format: Any = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int = 0
    prompt_logprobs: int | None = None
    n: int = 1
    draft: Sequence[str] = DRAFTS
    max_draft: int | None = None
    prediction: str | Sequence[int] | None = None
    adaptive: bool = True

    def __post_init__(self) -> None:
        found: dict[str, Any] = {name: words(getattr(self, name), name) for name in ("stop", "draft")}
        found |= {name: flag(getattr(self, name), name) for name in ("ignore_eos", "adaptive")}
        for name, least in (("max_new_tokens", 0), ("patience", 1), ("min_exit_tokens", 0), ("logprobs", 0), ("n", 1)):
            found[name] = whole(getattr(self, name), name, least=least)
        for name, least in (("exit_layer", 1), ("max_pending", 0), ("max_draft", 0), ("prompt_logprobs", 0)):
            if getattr(self, name) is not None:
                found[name] = whole(getattr(self, name), name, least=least)
        found["stop_token_ids"] = tuple(wholes(self.stop_token_ids, "stop_token_ids"))
        if self.exits is not None:
            found["exits"] = tuple(wholes(self.exits, "exits"))
        if self.threshold is not None:
            found["threshold"] = self._thresholds(self.threshold)
        found["response_format"] = read_response_format(self.response_format)
        if self.seed is not None:
            found["seed"] = seed_of(self.seed)
        if self.prediction is not None:
            found["prediction"] = self._prediction(self.prediction)
        found["bad_words"] = self._bad_words(self.bad_words)
        sampler = self.sampler()
        found |= {name: getattr(sampler, name) for name in _SAMPLING}
        for name, value in found.items():
            object.__setattr__(self, name, value)
        self._one_of("mode", self.mode, MODES)
        if self.rule is not None:
            self._one_of("rule", self.rule, RULES)
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise wrong("adapter", self.adapter, "the name of an adapter that was loaded")
        for source in self.draft:
            self._one_of("draft", source, DRAFTS)
        if not all(self.stop):
            raise UserError("a stop string is empty; leave it out or give the text at which to stop")
        if self.exits is not None and len(set(self.exits)) < len(self.exits):
            raise UserError(f"exits {list(self.exits)} name a layer more than once; name each once")
        if self.n > MAX_CHOICES:
            raise UserError(f"n is {short(self.n)}, but at most {MAX_CHOICES} texts are written for one prompt")
        self._warn_of_idle()

    @staticmethod
    def _thresholds(given: Any) -> float | dict[int, float]:
        """One threshold for all exits, or one for each layer named."""
        if isinstance(given, Mapping):
            pairs = [(whole(layer, "a layer in threshold"), value) for layer, value in given.items()]
            return {layer: check_threshold(value, f"threshold of exit {layer}") for layer, value in pairs}
        return check_threshold(given)

    @staticmethod
    def _prediction(given: Any) -> str | tuple[int, ...]:
        """A text, or token ids."""
        if isinstance(given, str):
            if not _is_utf8(given):
                raise UserError("prediction is not valid UTF-8 text; give it in that encoding")
            return given
        return tuple(wholes(given, "prediction", "a text or a sequence of token ids"))

    @staticmethod
    def _bad_words(given: Any) -> tuple[str | tuple[int, ...], ...]:
        """Texts and tuples of token ids; one text stands for a list of one."""
        expected = "a text or a sequence of texts and of sequences of token ids"
        found = [given] if isinstance(given, str) else elements(given, "bad_words", expected)
        if any(isinstance(word, str) and not word for word in found):
            raise UserError("a text in bad_words is empty; leave it out or give what must not be written")
        for word in found:
            if isinstance(word, str) and not _is_utf8(word):
                raise UserError(
                    f"a text in bad_words is {short(word)}, which is not valid UTF-8; give it in that encoding"
                )
        return tuple(word if isinstance(word, str) else bad_word(word) for word in found)

    def _warn_of_idle(self) -> None:
        """A setting that was changed but that the others keep from having an effect is a warning."""
        exits = self.mode == "threshold" or (self.mode == "lossless" and "exits" in self.draft)
        idle = {
            "exit_layer": (self.rule == "fixed" or not exits, "rule='fixed'"),
            "patience": (self.rule == "patience" or not exits, "rule='patience'"),
            "max_draft": (self.mode == "lossless", "mode='lossless'"),
            "prediction": (self.mode == "lossless", "mode='lossless'"),
            "top_k": (self.temperature > 0, "a temperature above 0"),
            "top_p": (self.temperature > 0, "a temperature above 0"),
            "min_p": (self.temperature > 0, "a temperature above 0"),
            "n": (self.temperature > 0, "a temperature above 0, since all texts are the same"),
            **dict.fromkeys(
                ("rule", "threshold", "exits", "adapter", "min_exit_tokens"), (exits, "a mode that uses exits")
            ),
        }
        for f in dataclasses.fields(self):
            used, needs = idle.get(f.name, (True, ""))
            if not used and getattr(self, f.name) != f.default:
                warnings.warn(f"{f.name} has no effect without {needs}", stacklevel=4)

    @staticmethod
    def _one_of(name: str, value: Any, known: Sequence[str]) -> None:
        if not isinstance(value, str):
            raise wrong(name, value, f"one of {', '.join(known)}")
        if value not in known:
            raise UserError(f"{name} {value!r} is unknown; use one of {', '.join(known)}{nearest(value, known)}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> GenerationConfig:
        """From keyword arguments; an unknown one is refused with the nearest known name."""
        return settings_of(cls, options, "generation")

    def sampler(self, bad_words: Sequence[Sequence[int]] = ()) -> Sampler:
        """The sampling part of these settings, with :attr:`bad_words` as a tokenizer writes them: token ids alone."""
        shared = {name: getattr(self, name) for name in _SAMPLING}
        return Sampler(**shared, bad_words=bad_words, processor=self.logits_processor)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class RefusedDraft:
    """A draft that the full model refused: its token, the layer and the source it came from."""

    id: int
    layer: int
    source: str


@dataclass(kw_only=True)
class TokenTrace:
    """One generated token: where it came from and what was tried for it.

    ``exit_layer`` is the layer whose head gave it (L for the final head); ``source`` is ``exit``, ``final``,
    ``lookup``, ``grammar`` or ``prediction``; ``confidence`` maps each exit that was tried to its score; ``drafted``
    says that it was a draft that the full model accepted, ``refused`` what draft it took the place of. ``logprob`` is
    under the unfiltered distribution it was taken from. ``stage``: which stage of a pipeline decided it, from 1; None
    in one process.
    """

    id: int
    exit_layer: int
    source: str
    stage: int | None = None
    drafted: bool = False
    refused: RefusedDraft | None = None
    confidence: dict[int, float] = field(default_factory=dict)
    logprob: float | None = None
    top_logprobs: dict[int, float] = field(default_factory=dict)
    text: str = ""


@dataclass(kw_only=True)
class Piece:
    """What a stream yields: text that is certain now and the tokens that came with it (text may lag behind tokens).

    ``index`` is the prompt's place in a list of prompts, ``choice`` which of its ``n`` texts this is; ``error`` ends
    the text of this prompt alone. ``prompt_logprobs`` come with the first piece, as in :class:`Generation`.
    """

    text: str
    tokens: list[TokenTrace]
    index: int = 0
    choice: int = 0
    error: UserError | None = None
    prompt_logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        """Ids of :attr:`tokens`."""
        return [token.id for token in self.tokens]

    @property
    def exit_layers(self) -> list[int]:
        """Layers of :attr:`tokens`."""
        return [token.exit_layer for token in self.tokens]


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a generation took.

    ``tokens_per_second`` is of decoding alone, NaN for a single token, and ``mean_layers`` the mean exit layer.
    ``queue_seconds``: from the request to its first pass; ``prefill_seconds`` and ``decode_seconds`` count passes that
    were shared with other sequences in full. ``rounds``: passes that gave tokens after the prefill; ``layer_rows``:
    rows times layers run in them. ``drafted`` and ``accepted`` count drafts, ``predicted`` and ``predicted_accepted``
    those that came from ``prediction``; ``max_pending``: positions that waited at once. ``exits``, ``rule`` and
    ``thresholds``: what was tested. ``quant``: the format of the weights; ``kernels``: what computed, ``torch`` or
    ``native`` with its instruction set; ``costs``: where the table of costs came from (None if no request needed it so
    far). ``seed`` gives this text again. ``shared_tokens``: positions whose keys came from another text;
    ``preemptions``: how often it had to give its memory to others. ``exact``: whether near-ties fall alike in any
    company, since rows are computed one like the other (native kernels) or precisely enough (float64).
    """

    mode: str
    prompt_tokens: int = 0
    tokens: int = 0
    tokens_per_second: float = math.nan
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    mean_layers: float = math.nan
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    predicted: int = 0
    predicted_accepted: int = 0
    max_pending: int = 0
    layer_rows: int = 0
    exits: list[int] = field(default_factory=list)
    rule: str | None = None
    thresholds: dict[int, float] = field(default_factory=dict)
    quant: str = "none"
    kernels: str = "torch"
    costs: str | None = None
    seed: int = 0
    shared_tokens: int = 0
    preemptions: int = 0
    exact: bool = False

    @property
    def acceptance(self) -> float | None:
        """The share of drafts that were accepted; None without drafts."""
        return self.accepted / self.drafted if self.drafted else None

    def to_json(self) -> dict[str, Any]:
        """All figures, with ``acceptance``; None for those that are NaN, which JSON lacks."""
        found = {**dataclasses.asdict(self), "acceptance": self.acceptance}
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in found.items()
        }


@dataclass(kw_only=True)
class Generation:
    """A finished generation. ``text`` is None without a tokenizer; ``finish_reason`` is ``stop``, ``length`` or, of one
    prompt among several, ``error``, which ``error`` explains. ``prompt_logprobs`` are those of the prompt's second to
    last token, each with the most likely alternatives. With ``n`` above 1 this is choice 0, and ``choices`` lists all.
    """

    text: str | None
    token_ids: list[int]
    exit_layers: list[int]
    trace: list[TokenTrace]
    stats: Stats
    finish_reason: str
    prompt_logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    choices: list[Generation] = field(default_factory=list, repr=False)
    error: UserError | None = None

    def __repr__(self) -> str:
        """How it begins, its length, its mean exit layer and its mode."""
        tokens = len(self.token_ids)
        depth = f", {sum(self.exit_layers) / tokens:.1f} layers on average" if tokens else ""
        begin = short(self.token_ids if self.text is None else self.text)
        return f"<Generation {begin}: {tokens} token{'s' * (tokens != 1)}{depth}, mode {self.stats.mode}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the text (token ids where there is none) with every token in its layer's colour."""
        words = [token.text if self.text is not None else f"{token.id} " for token in self.trace]
        colours = palette([*self.exit_layers, *self.stats.exits], max(self.exit_layers, default=0))
        return html(zip(words, self.exit_layers, strict=True), colours)


def failed(error: UserError, mode: str) -> Generation:
    """What stands for the answer to one prompt of several that could not be answered."""
    return Generation(
        text=None, token_ids=[], exit_layers=[], trace=[], stats=Stats(mode=mode), finish_reason="error", error=error
    )  # fmt: skip


def speed_of(tokens: int, seconds: float) -> float:
    """Tokens per second of decoding, NaN for a single one: the first token belongs to the prefill."""
    return (tokens - 1) / seconds if seconds > 0 and tokens > 1 else math.nan


def mean_depth(trace: Sequence[TokenTrace]) -> float:
    """The mean exit layer of some tokens, NaN of none."""
    return sum(token.exit_layer for token in trace) / len(trace) if trace else math.nan

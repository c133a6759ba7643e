"""From a request to a sequence: what can't be met is refused here, before anything runs."""

from __future__ import annotations

import collections.abc
import threading

from exitlm.decode.arrival import Runs
from exitlm.decode.generation import GenerationConfig
from exitlm.decode.lookup import NgramIndex
from exitlm.decode.output import Output
from exitlm.decode.planning import Exits, Plan, make_plan
from exitlm.decode.prediction import Prediction
from exitlm.decode.pricing.costs import Costs
from exitlm.decode.pricing.drafting import Drafting
from exitlm.decode.sampling.grammar import GrammarCompiler, GrammarState
from exitlm.decode.sequence import Sequence
from exitlm.decode.text import TextStream, Tokenizer
from exitlm.errors import UserError, nearest, short
from exitlm.model.exits import ExitHead, ExitKey

Ids = collections.abc.Sequence[int]


class Intake:
    """Makes the sequences of one engine. ``notes`` say what was chosen for requests that left it open, of which adapter
    and why. ``exits`` are those of a request that names no adapter, ``adapters`` those of each by its name."""

    def __init__(
        self,
        runner: Runs,
        heads: collections.abc.Mapping[ExitKey, ExitHead],
        tokenizer: Tokenizer | None,
        costs: collections.abc.Callable[[], Costs],
    ) -> None:
        """``heads`` are those of a model's exits, at a layer in the order of the adapters; ``costs`` is asked only
        where drafts are open."""
        self.runner, self.config, self.pool = runner, runner.fused.config, runner.pool
        self.tokenizer, self.notes = tokenizer, dict[tuple[str | None, str], str]()
        early = {key: head for key, head in heads.items() if key[1] in runner.early}
        self.exits = Exits.of(early)
        self.adapters = {
            name: Exits.of({key: head for key, head in early.items() if key[0] == name}, f"adapter '{name}'")
            for name in runner.fused.adapters
        }
        self._costs = costs
        self._compiler: GrammarCompiler | None = None
        self._compiling = threading.Lock()

    def sequence(self, key: int, prompt: Ids, config: GenerationConfig, choice: int, seed: int) -> Sequence:
        """A sequence that is ready to be admitted. Raises :class:`UserError` for what can't be met."""
        self.check_prompt(prompt, config)
        if config.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and this model has none; use stop_token_ids")
        plan = self.plan(config)
        sampler = config.sampler(token_words(config.bad_words, self.tokenizer))
        sampler.check_vocabulary(self.config.vocab_size)
        room = self.config.max_position_embeddings - len(prompt)
        stops = frozenset(config.stop_token_ids)
        if not config.ignore_eos:
            stops |= frozenset(self.config.eos_token_ids)
        output = Output(TextStream(self.tokenizer, config.stop, prompt), stops, min(config.max_new_tokens, room))
        drafting = index = prediction = None
        if config.mode == "lossless":
            known, rule = self.exits_of(config.adapter), plan.rule
            exits: dict[collections.abc.Hashable, tuple[float, float]] = {
                plan.source(e): known.expected(e, rule) for e in plan.exits if rule is not None
            }
            limits = {"max_draft": config.max_draft, "max_pending": config.max_pending}
            predicts = bool(config.prediction) and "prediction" in config.draft
            drafting = Drafting(exits, adaptive=config.adaptive, predicts=predicts, **limits)
            if "lookup" in config.draft:
                index = NgramIndex()
                index.extend(prompt)
            if config.prediction and predicts:
                prediction = Prediction(self._expected_ids(config.prediction))
        return Sequence(
            key, prompt, config, plan, output, segments=self.runner.segments, sampler=sampler,
            seed=seed, choice=choice, drafting=drafting, index=index, prediction=prediction,
            grammar=self._grammar(config),
        )  # fmt: skip

    def _expected_ids(self, prediction: str | Ids) -> Ids:
        """A prediction as token ids. Ids that the vocabulary lacks are drafts that are never right, so they end it."""
        if not isinstance(prediction, str):
            known = [0 <= token < self.config.vocab_size for token in prediction]
            return prediction if all(known) else prediction[: known.index(False)]
        if self.tokenizer is None:
            raise UserError("a prediction that is a text needs a tokenizer, and this model has none; give token ids")
        return list(self.tokenizer(prediction, add_special_tokens=False)["input_ids"])

    def prepare(self, config: GenerationConfig) -> None:
        """Compile the grammar of a request ahead of its sequences, which may take long; from any thread. Raises
        :class:`UserError` for one that can't be used."""
        self._grammar(config)

    def _grammar(self, config: GenerationConfig) -> GrammarState | None:
        """The grammar of a request's ``response_format``."""
        if config.response_format is None:
            return None
        with self._compiling:
            if self._compiler is None:
                if self.tokenizer is None:
                    raise UserError("response_format needs a tokenizer, and this model has none")
                self._compiler = GrammarCompiler(self.tokenizer, self.config.vocab_size, self.config.eos_token_ids)
        return self._compiler.state(config.response_format, config.stop_token_ids)

    def exits_of(self, adapter: str | None) -> Exits:
        """The exits of an adapter, or those of all (None). Raises :class:`UserError` for one that the model lacks."""
        if adapter is None:
            return self.exits
        if adapter not in self.adapters:
            have = ", ".join(self.adapters) or "none"
            raise UserError(
                f"the model has no adapter {short(adapter)}{nearest(adapter, self.adapters)} (it has: {have}); an "
                "adapter is called by the last part of the directory that it was loaded from"
            )
        return self.adapters[adapter]

    def plan(self, config: GenerationConfig) -> Plan:
        """Which exits a configuration tests, and by what rule."""
        plan = make_plan(config, self.exits_of(config.adapter), self._costs)
        if plan.why:
            self._note_off(plan, config.adapter)
        return plan

    def _note_off(self, plan: Plan, adapter: str | None) -> None:
        """Say which exits are left alone by default, and that naming them switches them on."""
        self.notes.pop((adapter, plan.why), None)
        if plan.off:
            whose = f" of adapter '{adapter}'" if adapter is not None and len(self.adapters) > 1 else ""
            reason = "by what tuning measured" if plan.why == "leave" else "by measured cost and calibration"
            none = " (none pays)" if plan.rule is None else ""
            self.notes[adapter, plan.why] = (
                f"no token will {plan.why} at exits {list(plan.off)}{whose}, {reason}{none}; name them to use them: "
                f"--exits {','.join(map(str, plan.off))}"
            )

    def check_prompt(self, prompt: Ids, config: GenerationConfig) -> None:
        """Refuse an empty prompt, ids that the vocabulary lacks, and a prompt that fills the context or the pool."""
        if len(prompt) == 0:
            raise UserError("the prompt is empty; give at least one token of text")
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise UserError(
                f"the prompt has token id {max(prompt) if min(prompt) >= 0 else min(prompt)}, but the vocabulary has "
                f"ids 0 to {self.config.vocab_size - 1}; use the tokenizer of this model"
            )
        context = self.config.max_position_embeddings
        if len(prompt) >= context + (config.max_new_tokens == 0):
            raise UserError(
                f"the prompt has {len(prompt)} tokens, but the model's context is {context}; shorten the prompt"
            )
        length = min(len(prompt) + config.max_new_tokens, context)
        if length > self.pool.capacity:
            raise UserError(
                f"prompt and answer have up to {length} tokens, but engine.kv_bytes holds {self.pool.capacity}; "
                f"shorten them, or set it to {self.pool.least_bytes(length)} or more"
            )


def token_words(words: collections.abc.Sequence[str | Ids], tokenizer: Tokenizer | None) -> list[list[int]]:
    """``bad_words`` as token ids: a text as it is written at the start of a text, and behind a space."""
    found: list[list[int]] = []
    for word in words:
        if not isinstance(word, str):
            found.append(list(word))
            continue
        if tokenizer is None:
            raise UserError("bad_words that are texts need a tokenizer, and this model has none; give token ids")
        for text in (word, f" {word}"):
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if ids and ids not in found:
                found.append(ids)
    return found

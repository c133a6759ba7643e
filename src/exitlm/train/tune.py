"""Tune exits on a pretrained model whose own weights stay as they are (EE-Tuning, arXiv 2402.00518).

From settings to an adapter: resolve what the model decides, get the text, solve the lenses in closed form (checkpoint
0), run the loop, measure the exits on held-out text, publish. The same call again goes on where a killed run stopped,
and says so where nothing is left to do.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from exitlm.decode.kernels.packed import why_not_native
from exitlm.errors import UserError
from exitlm.model.exits import check_layers
from exitlm.model.record import ExitRecord
from exitlm.parallel.mesh import Launch
from exitlm.progress import Progress, progress
from exitlm.train import checkpoint as run_files
from exitlm.train.backbone import TORCH, backbone_of
from exitlm.train.corpus import Corpus, corpus_of_answers, corpus_of_files, open_tokens, self_tokens
from exitlm.train.data import Blocks, TextTokenizer, Tokens
from exitlm.train.exits import automatic_candidates, default_layers, exit_configs, needs_final
from exitlm.train.full import train
from exitlm.train.heads import Heads
from exitlm.train.hidden import HiddenStates, Row, Wanted
from exitlm.train.loop import Clock, Interrupted, StopSignal, Trainer, loss_settings, stop_signal, validation_values
from exitlm.train.metrics import Tracker, check_trackers, open_trackers, step_note
from exitlm.train.objective import candidate_vocabulary
from exitlm.train.precision import resolve_dtype
from exitlm.train.run import RunConfig
from exitlm.train.selftext import read_prompts
from exitlm.train.stream import Stream
from exitlm.train.tested import reads_of
from exitlm.train.trained import recorded, versions
from exitlm.train.unread import set_back, unread_by_tuning
from exitlm.train.validation import Scores, evaluate, records
from exitlm.values import path_of, paths_of, wholes, words
from exitlm.weights.adapter import check_place, save_adapter
from exitlm.weights.checkpoint import Checkpoint, open_checkpoint, read_json
from exitlm.weights.load import device_of, load_model
from exitlm.weights.store import cache_directory

CLOSED_FORM_TOKENS = 1 << 16


def tune(
    base: str | os.PathLike[str] | RunConfig,
    *,
    exits: Sequence[int] | None = None,
    data: str | Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    seed: int | None = None,
    save_every: int | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Tune exits at layers ``exits`` (default: three, evenly placed) of ``base`` on ``data`` (files, or ``self:N``) and
    return ``out``, which is then an adapter directory. ``base`` may be a :class:`RunConfig`; the other arguments and
    ``overrides`` (``"train.lr=1e-3"``) change it. Under torchrun the work is laid over its processes as ``parallel``
    says (:func:`exitlm.train.full.train`); text must then come from files.

    Raises:
        UserError: anything the user can put right; the output directory then holds no adapter.
        Interrupted: SIGTERM or Ctrl-C; the same call goes on from there.
    """
    config = base.typed() if isinstance(base, RunConfig) else RunConfig()
    name = None if isinstance(base, RunConfig) else path_of(base, "base", "the name of a model, or a RunConfig")
    changes: dict[str, dict[str, Any]] = {
        "model": {"base": name},
        "exits": {"layers": None if exits is None else wholes(exits, "exits")},
        "data": {"files": None if data is None else paths_of(data, "data")},
        "train": {"steps": steps, "seed": seed},
        "checkpoint": {"dir": None if out is None else path_of(out, "out"), "every": save_every},
    }
    given = {s: {key: value for key, value in keys.items() if value is not None} for s, keys in changes.items()}
    config, overrides = RunConfig.from_dict(given, config), words(overrides, "overrides")
    if config.with_overrides(overrides).train.parameters == "all":
        raise UserError(
            "train.parameters is 'all', but exitlm tune trains exits alone; leave it out, or use exitlm train RUN.toml"
        )
    if Launch.from_environment().world > 1:  # which all check together
        return train(config, overrides=[*overrides, "train.parameters=exits"])
    config = config.with_overrides(overrides)
    config.check()
    if not config.model.base:
        raise UserError("model.base is not set: name a directory, hub id, .gguf file, or smollm2")
    if not config.checkpoint.dir:
        raise UserError("checkpoint.dir is not set: name a directory for the run (--out DIR)")
    p = config.parallel
    if p.data * p.tensor * p.pipeline > 1:
        return train(replace(config, train=replace(config.train, parameters="exits")))
    if config.train.dtype == "float16":
        raise UserError("train.dtype = 'float16' is for exitlm train; tune exits in bfloat16 or float32")
    opened = open_checkpoint(config.model.base)
    config = resolve(config, opened)
    directory = Path(config.checkpoint.dir)
    check_place(directory, opened.digest)
    with stop_signal() as stop, run_files.exclusive(directory):
        _Run(config, opened, directory, stop).run()
    return directory


def resolve(config: RunConfig, opened: Checkpoint) -> RunConfig:
    """Replace what is left to the model and the machine by what it means here.

    Raises:
        UserError: exits out of range, given twice or not ascending; a number of values that does not fit the exits.
    """
    count = opened.model_config.num_hidden_layers
    layers = config.exits.layers or default_layers(count)
    check_layers(layers, count)
    if list(layers) != sorted(layers):
        raise UserError(f"exits {list(layers)} are not in ascending order; write {sorted(layers)}")
    device = config.model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = device_of(device)
    backbone = resolve_dtype(config.model.dtype, place, opened.dtype if config.model.dtype == "auto" else torch.float32)
    master = torch.promote_types(backbone, torch.float32)
    vocab, hidden = opened.model_config.vocab_size, opened.model_config.hidden_size
    automatic = automatic_candidates(vocab)
    given = config.exits.candidates
    candidates = tuple(automatic if n == -1 else n for n in (given if isinstance(given, tuple) else (given,)))
    exits = replace(
        config.exits, layers=tuple(layers), candidates=candidates if isinstance(given, tuple) else candidates[0]
    )
    config = replace(config, exits=exits)
    config.check()
    if (every := config.objective.rotate_exits) > len(layers):
        raise UserError(f"objective.rotate_exits is {every}, but there are {len(layers)} exits; use at most that, or 0")
    config = set_back(config, unread_by_tuning(config, vocab), RunConfig())
    base = config.model.base
    if Path(base).expanduser().exists():
        base = os.path.abspath(Path(base).expanduser())  # the run is gone on with, and exported, from anywhere
    data = config.data
    if self_tokens(config) is not None:
        native = data.self_dtype == "auto" and why_not_native(opened.model_config, place, backbone) is None
        writes = backbone if native else resolve_dtype(data.self_dtype, place, backbone)
        data = replace(data, self_dtype=_name(writes))
    resolved = replace(
        config,
        model=replace(config.model, base=base, device=device, dtype=_name(backbone)),
        data=data,
        train=replace(config.train, dtype=_name(resolve_dtype(config.train.dtype, place, master))),
    )
    for e in exit_configs(resolved):
        if e.candidates > vocab:
            raise UserError(
                f"exit {e.layer}: {e.candidates} candidates, but the vocabulary has {vocab} tokens; use fewer"
            )
        if e.output == "low_rank" and e.rank > hidden:
            raise UserError(f"exit {e.layer}: rank {e.rank} exceeds the hidden size {hidden}; use a smaller one")
    sharing = {e.candidates for e in exit_configs(resolved) if e.output == "exits"}
    if len(sharing) > 1:
        raise UserError(
            f"exits with output 'exits' share one matrix, but have {sorted(sharing)} candidates; give all the same"
        )
    return resolved


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


class _Run:
    """One run in its directory, which this process owns."""

    def __init__(self, config: RunConfig, opened: Checkpoint, out: Path, stop: StopSignal) -> None:
        self.config, self.opened, self.out, self.stop = config, opened, out, stop
        self.started = time.perf_counter()
        self.saved = -1  # the step of the newest checkpoint

    def run(self) -> None:
        """Everything from the first check to the adapter."""
        config, out = self.config, self.out
        fresh = not (out / "run.toml").exists()
        if not fresh or (out / "exits.json").exists():
            run_files.claim(out, config)
            if (out / "exits.json").exists():
                made_on = read_json(out / "exits.json").get("base") or {}
                run_files.check_same(out, {"base_digest": made_on.get("digest")}, {"base_digest": self.opened.digest()})
                _say(f"{out} is a finished run already; nothing to do")
                return
        try:
            tokens = open_tokens(config, self.opened)
            from_files = self_tokens(config) is None
            if not from_files:
                read_prompts(config.data.prompts, config.data.validation_sequences)
            check_trackers(config.logging)
            text = corpus_of_files(config, self.opened, tokens, cache_directory()) if from_files else None
            all_layers = any(e.init == "closed_form" or e.kind == "block" for e in exit_configs(config))
            self.partly = from_files and not all_layers and not needs_final(config)
            self.model = load_model(
                self.opened,
                dtype=config.model.dtype,
                device=config.model.device,
                layers=range(1, config.exits.layers[-1] + 1) if self.partly else None,
            )
        except (UserError, OSError):
            if fresh:
                _leave_nothing(out)
            raise
        run_files.claim(out, config)
        run_files.clean(out)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        if text is None:
            text = corpus_of_answers(
                config, self.opened, tokens, self.model, cache_directory(), lambda: bool(self.stop)
            )
        self._check_stop("" if from_files else "the text written so far is kept; ")
        assert text is not None
        self._tune(text, tokens)

    # ---- tuning

    def _tune(self, text: Corpus, tokens: Tokens) -> None:
        config = self.config
        same = {"base_digest": self.opened.digest(), "data_digest": text.digest()}
        found = run_files.newest(self.out)
        if found is not None:
            run_files.check_same(self.out, found.meta, same)
        self.backbone = backbone_of(self.model, None if found is None else found.meta.get("backbone", TORCH))
        self.meta: dict[str, Any] = {**same, "backbone": self.backbone.kernels}
        configs = exit_configs(config)
        largest = max(e.candidates for e in configs)
        candidate_ids = None
        if largest:
            special = sorted({*self.model.config.eos_token_ids, *_special_ids(tokens, self.model.config.vocab_size)})
            candidate_ids = candidate_vocabulary(text.train.counts(self.model.config.vocab_size), special, largest)
        self.model.add_exits(configs, seed=config.train.seed, candidate_ids=candidate_ids)
        self.heads = Heads(self.model, getattr(torch, config.train.dtype))
        hidden = self._hidden(text.train, "train", needs_final(config))
        held = self._hidden(text.validation, "held", not self.partly)
        try:
            self._fit(text, found, hidden, held)
        finally:
            hidden.close()
            held.close()
            shutil.rmtree(self.out / ".hidden", ignore_errors=True)

    def _hidden(self, blocks: Blocks, name: str, final: bool) -> HiddenStates:
        config, t = self.config, self.config.train
        restricted = all(head.candidate_ids is not None for head in self.heads.by_layer.values())
        wanted = Wanted(
            exits=tuple(self.heads.layers),
            whole=frozenset(e for e, head in self.heads.by_layer.items() if head.config.kind == "block"),
            final=final,
            teacher=final and (config.objective.candidate_loss or restricted),
            temperature=config.objective.distill_temperature,
        )
        repeats = bool(config.data.weights) or t.steps * t.global_batch > len(blocks)
        again = name == "held" or repeats or (final and self._closed_form_layers())
        keep = t.hidden_cache if again else "none"
        limit = t.hidden_cache_gib * 2**30
        return HiddenStates(self.backbone, blocks, wanted, keep=keep, limit=limit, home=self.out / ".hidden" / name)

    def _closed_form_layers(self) -> list[int]:
        return [layer for layer, head in self.heads.by_layer.items() if head.config.init == "closed_form"]

    def _fit(self, text: Corpus, found: run_files.Checkpoint | None, hidden: HiddenStates, held: HiddenStates) -> None:
        config, t, out = self.config, self.config.train, self.out
        trainer = Trainer(config, self.heads, hidden, text.order)
        before = 0.0
        if found is not None:
            trainer.restore(found.tensors, found.step)
            self.saved = found.step
            before = float(found.meta["seconds"])
            if found.step:
                _say(f"going on from step {found.step} of {t.steps} in {out}")
        else:
            self._solve(hidden, text.order)
        if found is None:
            self._save(trainer, before)
        trackers = open_trackers(out, config, trainer.done)
        unmeasured = None if found is None else found.meta.get("unmeasured")
        try:
            with progress("tuning", t.steps) as bar:
                if unmeasured:  # it was stopped while the exits were measured after its last step
                    self._log(trackers, trainer, self._validated(trainer, held, unmeasured, bar, before))
                self._steps(trainer, held, trackers, bar, before)
        finally:
            for tracker in trackers:
                tracker.close()
        self._publish(text, held, before)

    def _solve(self, hidden: HiddenStates, stream: Stream | None) -> None:
        layers = self._closed_form_layers()
        if not layers:
            return
        if not hidden.wanted.final:  # only this needs the layers above the deepest exit
            wanted = replace(hidden.wanted, final=True)
            home = self.out / ".hidden" / "closed-form"
            hidden = HiddenStates(self.backbone, hidden.blocks, wanted, keep="none", limit=0.0, home=home)
        total = min(CLOSED_FORM_TOKENS, hidden.blocks.total_targets())
        with progress("lenses in closed form", total) as bar:

            def rows() -> Iterator[Row]:
                done = 0
                for index in range(len(hidden)) if stream is None else stream.indices(range(len(hidden))):
                    if done >= CLOSED_FORM_TOKENS:
                        return
                    self._check_stop("")
                    row = hidden.row(index)
                    done += len(row.labels_N)
                    yield row
                    bar.update(min(done, total))

            self.heads.solve_closed_form(rows(), layers)

    def _steps(
        self, trainer: Trainer, held: HiddenStates, trackers: list[Tracker], bar: Progress, before: float
    ) -> None:
        config, t = self.config, self.config.train
        clock = Clock()
        bar.update(trainer.done)
        while trainer.done < t.steps:
            if self.stop:
                self._save(trainer, before)
                bar.close()
                self._check_stop(f"step {trainer.done} of {t.steps} is saved; ")
            result = trainer.step()
            done = trainer.done
            rate = clock.tick(result.tokens)
            bar.update(done, step_note(result.loss, result.agreement, rate))
            values = {**result.values(), "tokens_per_second": rate}
            validates = t.validate_every > 0 and done % t.validate_every == 0 and done < t.steps
            if validates:
                values = self._validated(trainer, held, values, bar, before)
                clock.tick(0)
            if done % config.logging.every == 0 or done == t.steps or validates:
                self._log(trackers, trainer, values)
            if done == t.steps or (config.checkpoint.every and done % config.checkpoint.every == 0):
                self._save(trainer, before)

    def _validated(
        self, trainer: Trainer, held: HiddenStates, values: dict[str, float], bar: Progress, before: float
    ) -> dict[str, float]:
        """The ``values`` of the last step with what the exits measure after it. A signal ends it at once: the step is
        saved, and the same call goes on with the measurement."""
        try:
            scores = self._scores(held, lambda i, n: bar.update(trainer.done, f"measuring the exits: {i}/{n}"))
        except Interrupted:
            if self.saved != trainer.done:
                self._save(trainer, before, unmeasured=values)
            bar.close()
            self._check_stop(f"step {trainer.done} of {self.config.train.steps} is saved; ")
            raise
        return {**values, **validation_values(scores)}

    def _scores(self, held: HiddenStates, report: Callable[[int, int], None]) -> dict[int, Scores]:
        with self.stop.at_once():
            return evaluate(self.heads, held, loss_settings(self.config.objective), report)

    def _log(self, trackers: list[Tracker], trainer: Trainer, values: dict[str, float]) -> None:
        for tracker in trackers:
            tracker.log(trainer.done, values)

    def _save(self, trainer: Trainer, before: float, **more: Any) -> None:
        seconds = before + time.perf_counter() - self.started
        meta = {**self.meta, "step": trainer.done, "seconds": round(seconds, 3), **more}
        run_files.save(self.out, trainer.state(), meta, self.config.checkpoint.keep)
        self.saved = trainer.done

    def _publish(self, text: Corpus, held: HiddenStates, before: float) -> None:
        """Measure the exits on the held-out text and write the adapter."""
        try:
            with progress("measuring the exits", len(held)) as bar:
                scores = self._scores(held, lambda i, _: bar.update(i))
                bar.update(len(held))
        except Interrupted:
            self._check_stop(f"step {self.config.train.steps} of {self.config.train.steps} is saved; ")
            raise
        found = records(scores, reads_of(self.model))
        for layer, head in self.heads.by_layer.items():
            head.record = found[layer]
        t = self.config.train
        training = {
            "config": recorded(self.config, self.opened.name),
            "steps": t.steps,
            "tokens": text.train.total_targets(),
            "seconds": round(before + time.perf_counter() - self.started, 1),
            "data_digest": text.digest(),
            "base_digest": self.opened.digest(),
            "backbone": self.backbone.kernels,
            "versions": versions(),
        }  # fmt: skip
        save_adapter(self.out, self.model, training=training)
        _say(_summary(self.out, found))

    def _check_stop(self, kept: str) -> None:
        if self.stop:
            _say(f"stopped by {self.stop.name}: {kept}start the same command again to go on")
            raise Interrupted


def _say(sentence: str) -> None:
    print(sentence, flush=True)


def _summary(out: Path, records: Mapping[int, ExitRecord]) -> str:
    """What was measured, and what it means for decoding."""
    what, tested = "accuracy", ""
    if all(record.agreement is not None for record in records.values()):
        what = "agreement with the final head"
        chosen = [str(layer) for layer, record in records.items() if record.tested]
        names = ", ".join(chosen) or "none, since none has a net speed-up"
        tested = f"; tested by default in mode threshold: {names}"
    shares = ((layer, r.accuracy if r.agreement is None else r.agreement) for layer, r in records.items())
    parts = [f"exit {layer}: {share:.1%}" for layer, share in shares if share is not None]
    return f"{out} holds the exits; {what} on held-out text: {', '.join(parts)}{tested}"


def _leave_nothing(out: Path) -> None:
    """Take back the directory of a run that could not begin."""
    if [p.name for p in out.iterdir()] == [".lock"]:
        shutil.rmtree(out, ignore_errors=True)


def _special_ids(tokens: Tokens, vocab_size: int) -> list[int]:
    """The ids that a tokenizer keeps for itself, as far as the model knows them."""
    if isinstance(tokens, TextTokenizer):
        return [int(i) for i in tokens.tokenizer.all_special_ids if int(i) < vocab_size]
    return [] if tokens.eos_id is None or tokens.eos_id >= vocab_size else [tokens.eos_id]

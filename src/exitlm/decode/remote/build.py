"""An engine over a pipeline for a model that was loaded: stages are started or waited for, as its settings say."""

from __future__ import annotations

from dataclasses import replace

from exitlm.decode.options import EngineConfig
from exitlm.decode.remote.engine import PipelinedEngine
from exitlm.decode.remote.job import Weights
from exitlm.decode.remote.keys import key_of
from exitlm.decode.remote.launch import Children, Joining, Launcher
from exitlm.decode.remote.pipeline import Pipeline
from exitlm.decode.text import Tokenizer
from exitlm.errors import UserError
from exitlm.model.decoder import EarlyExitModel
from exitlm.native import library
from exitlm.weights.adapter import digest_of_base
from exitlm.weights.stored import count_of_changes


def pipelined_engine(
    model: EarlyExitModel, *, quant: str, options: EngineConfig, tokenizer: Tokenizer | None = None
) -> PipelinedEngine:
    """An engine whose stages are those that ``options`` ask for.

    Raises:
        UserError: a stage can't be had, or the model is not what its files hold.
    """
    own = replace(options, pipeline=1, layers_per_stage=None, stages_at=None, stage_key_file=None,
                  stage_certificate=None, threads=_threads(options))  # fmt: skip
    weights = Weights(
        source=_source(model), digest=digest_of_base(model), dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device), quant=quant, compile="auto", rounds=False, options=own,
    )  # fmt: skip
    launcher: Launcher
    if options.stages_at is None:
        launcher = Children()
    else:
        key = key_of(options.stage_key_file)
        launcher = Joining(options.stages_at, key, options.stage_certificate, options.stage_timeout)
    pipeline = Pipeline(
        model, weights, launcher, stages=options.pipeline, layers_per_stage=options.layers_per_stage,
        timeout=options.stage_timeout,
    )  # fmt: skip
    return PipelinedEngine(model, pipeline, tokenizer=tokenizer, options=own)


def _threads(options: EngineConfig) -> int | None:
    """Threads of each process: those of this machine are shared by the stages that are started on it."""
    if options.threads is not None or options.stages_at is not None:
        return options.threads
    return max(1, library.default_threads() // (options.pipeline * options.tensor))


def _source(model: EarlyExitModel) -> str:
    """Where stages find the weights. Raises :class:`UserError` where these are not what a file holds."""
    checkpoint = model.checkpoint
    backbone = [each for name, each in model.named_parameters() if not name.startswith("exits.")]
    if checkpoint is None or any(count_of_changes(each) for each in backbone):
        raise UserError(
            "the stages of a pipeline read the weights from disk, and this model is not what a file there holds; write "
            "it with export() and load it from there"
        )
    return str((checkpoint.source or checkpoint.directory).resolve())

"""The generation that a sequence ends with."""

from __future__ import annotations

from exitlm.decode.generation import Generation, Stats, mean_depth, speed_of
from exitlm.decode.sequence import Sequence


def result(
    sequence: Sequence, seconds: float, *, has_text: bool, quant: str, kernels: str, costs: str | None, exact: bool
) -> Generation:
    """The generation of a sequence that has ended, after ``seconds`` of decoding."""
    output, tally, rule = sequence.output, sequence.tally, sequence.plan.rule
    stats = Stats(
        mode=sequence.config.mode,
        prompt_tokens=sequence.prompt_length,
        tokens=len(output.trace),
        tokens_per_second=speed_of(len(output.trace), seconds),
        queue_seconds=tally.queued,
        prefill_seconds=tally.first - tally.begun,
        decode_seconds=seconds,
        mean_layers=mean_depth(output.trace),
        rounds=tally.rounds,
        drafted=tally.drafted,
        accepted=tally.accepted,
        predicted=tally.predicted,
        predicted_accepted=tally.predicted_accepted,
        max_pending=tally.max_pending,
        layer_rows=tally.layer_rows,
        exits=sequence.plan.exits,
        rule=None if rule is None else rule.name,
        thresholds={} if rule is None else dict(rule.thresholds),
        quant=quant,
        kernels=kernels,
        costs=costs,
        seed=sequence.seed,
        shared_tokens=tally.shared,
        preemptions=tally.preemptions,
        exact=exact,
    )
    return Generation(
        text="".join(token.text for token in output.trace) if has_text else None,
        token_ids=[token.id for token in output.trace],
        exit_layers=[token.exit_layer for token in output.trace],
        trace=output.trace,
        stats=stats,
        finish_reason=output.finish_reason or "length",
        prompt_logprobs=output.prompt_logprobs,
    )

"""Figures of a running server for Prometheus, under the names of vLLM with our prefix.

They are counted as plain numbers in the engine's thread, which must not be held up, and become samples when they are
asked for. Histograms have buckets that grow as vLLM's do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from exitlm.decode.engine import Engine
from exitlm.decode.generation import Generation, Piece
from exitlm.serve.async_engine import Text

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 25.0, 50.0)


class Histogram:
    """Counts of values, by buckets that end at ``bounds``."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = tuple(bounds), [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """The counts up to each bound, as Prometheus wants them."""
        found, total = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class Metrics(Collector):
    """What has happened since the server began; an :class:`~exitlm.serve.async_engine.Observer`."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.counts: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.exit_layers: Counter[int] = Counter()
        self.first_token, self.between_tokens, self.whole = Histogram(_FIRST), Histogram(_SHORT), Histogram(_LONG)
        self.queue, self.prefill, self.decode = Histogram(_LONG), Histogram(_LONG), Histogram(_LONG)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    # ---- in the engine's thread

    def piece(self, text: Text, piece: Piece, now: float) -> None:
        """Count tokens, and the time since those before."""
        tokens = piece.tokens
        self.counts["generation_tokens"] += len(tokens)
        for token in tokens:
            self.exit_layers[token.exit_layer] += 1
        if text.last:
            self.between_tokens.add((now - text.last) / len(tokens), len(tokens))
        else:
            self.first_token.add(now - text.arrived)
            if len(tokens) > 1:
                self.between_tokens.add(0.0, len(tokens) - 1)

    def ended(self, text: Text, generation: Generation | None, now: float) -> None:
        """Count a text, and what it took."""
        if generation is None:
            self.finished["abort"] += 1
            return
        stats = generation.stats
        self.finished[generation.finish_reason] += 1
        self.whole.add(now - text.arrived)
        self.queue.add(stats.queue_seconds)
        self.prefill.add(stats.prefill_seconds)
        self.decode.add(stats.decode_seconds)
        if text.choice == 0:
            self.counts["prompt_tokens"] += stats.prompt_tokens
        self.counts["prefix_cache_queries"] += stats.prompt_tokens
        self.counts["prefix_cache_hits"] += stats.shared_tokens
        self.counts["num_preemptions"] += stats.preemptions

    def refused(self, texts: int) -> None:
        """Count texts that were not let in."""
        self.counts["requests_refused"] += texts

    # ---- when they are asked for

    def text(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """All figures."""
        if self.engine is not None:
            yield from self._of_engine(self.engine)
        for name, what in (
            ("prompt_tokens", "Tokens of prompts that were answered"),
            ("generation_tokens", "Tokens that were written"),
            ("prefix_cache_queries", "Tokens of prompts that were looked up in the prefix index"),
            ("prefix_cache_hits", "Tokens of prompts whose keys came from another text"),
            ("num_preemptions", "How often a text had to give its memory to others"),
            ("requests_refused", "Texts that were refused because too many wait"),
        ):
            yield _counter(name, what, self.counts[name])
        for name, what, histogram in (
            ("time_to_first_token_seconds", "From a request's arrival to its first token", self.first_token),
            ("inter_token_latency_seconds", "From a token to the next one", self.between_tokens),
            ("e2e_request_latency_seconds", "From a request's arrival to its last token", self.whole),
            ("request_queue_time_seconds", "From a request's arrival to its first pass", self.queue),
            ("request_prefill_time_seconds", "From a request's first pass to its first token", self.prefill),
            ("request_decode_time_seconds", "From a request's first token to its last one", self.decode),
        ):
            yield HistogramMetricFamily(f"exitlm:{name}", what, buckets=histogram.buckets(), sum_value=histogram.sum)
        yield _labelled("request_success", "Texts that ended, and why", "finished_reason", self.finished)
        yield _labelled("exit_layer_tokens", "Tokens by the layer whose head gave them", "layer", self.exit_layers)

    def _of_engine(self, engine: Engine) -> Iterator[Metric]:
        drafts = engine.accounts.drafts
        used = [allocator.used / allocator.num_blocks for allocator in engine.memory.pool.allocators]
        yield _gauge("num_requests_running", "Texts that are being decoded", len(engine.roster.running))
        yield _gauge("num_requests_waiting", "Texts that wait to be decoded", len(engine.roster.waiting))
        yield _gauge("kv_cache_usage_perc", "Share of the blocks for keys and values in use, 0 to 1", max(used))
        yield _gauge("scheduler_rate_ratio", "Tokens per second over those of plain decoding", engine.pricing.gain)
        yield _counter(
            "stages_lost", "Stages that ended or did not answer, each of which was to be replaced", engine.lost
        )
        busy = {str(number): seconds for number, seconds in enumerate(engine.stage_seconds, 1)}
        yield _labelled("stage_busy_seconds", "Seconds that passes of a stage took", "stage", busy)
        yield _counter("spec_decode_num_drafts", "Rounds in which drafts were verified", drafts.rounds)
        yield _counter("spec_decode_num_draft_tokens", "Drafts that were verified or dropped", drafts.drafted)
        yield _counter("spec_decode_num_accepted_tokens", "Drafts that were accepted", sum(drafts.accepted_at))
        yield _labelled(
            "spec_decode_num_accepted_tokens_per_pos", "Accepted drafts by their position in a round", "position",
            Counter({at: count for at, count in enumerate(drafts.accepted_at) if count}),
        )  # fmt: skip


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"exitlm:{name}", f"{what}.", value=value)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"exitlm:{name}", f"{what}.", value=value)


def _labelled(name: str, what: str, label: str, counts: Mapping[str, float] | Mapping[int, int]) -> Metric:
    found = CounterMetricFamily(f"exitlm:{name}", f"{what}.", labels=[label])
    for value, count in sorted(dict(counts).items()):  # another thread may add one meanwhile
        found.add_metric([str(value)], count)
    return found

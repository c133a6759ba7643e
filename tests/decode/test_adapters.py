"""Several adapters of one base: whatever they share with each other, a text is the one of its own adapter alone.

Each is compared with a model that has that adapter's exits and nothing else: in float64, by the native kernels to the
last bit, and by passes with static shapes.
"""

import copy
import dataclasses
import functools
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from exitlm.decode.engine import Engine
from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.decode.kernels.fused import FusedModel
from exitlm.decode.kernels.runner import Runner
from exitlm.decode.logits import expand
from exitlm.decode.pricing.measure_costs import SIZES, _table, ideal
from exitlm.errors import UserError
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from exitlm.model.record import Calibration, ExitRecord
from tests.decode.arithmetic import FLOAT64, Arithmetic, params, slow_params
from tests.decode.company import Letters, company_of, draw_config, together
from tests.decode.driver import Driver, advance_many, make_runner
from tests.decode.models import attach, fade, fit_lenses, generate, make_engine, random_ids, worst
from tests.decode.test_company import check_alike
from tests.decode.test_graphs import record_on_cpu
from tests.model.families import FAMILIES, tiny_model

FAST, FAST_NATIVE, SLOW = 3, 2, 40  # companies for each family
NAMES = ("a", "b")
HEADS: tuple[dict[str, Any], ...] = (
    {"kind": "lens"}, {"kind": "lens"}, {"kind": "lens", "branch": True}, {"kind": "norm"}, {"kind": "mlp"},
    {"kind": "block"}, {"kind": "block", "output": "low_rank", "rank": 6}, {"kind": "mlp", "output": "own"},
    {"kind": "lens", "output": "exits"}, {"kind": "norm", "output": "exits"},
)  # fmt: skip


def with_adapters(
    base: EarlyExitModel, configs: Mapping[str, list[ExitConfig]], dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[EarlyExitModel, dict[str | None, EarlyExitModel]]:
    """A model with the adapters of these names, and for each name the base with its exits alone; for None that with
    what a request gets that names no adapter."""
    alone: dict[str | None, EarlyExitModel] = {}
    with torch.inference_mode(False):
        for number, (name, exits) in enumerate(configs.items()):
            made = attach(copy.deepcopy(base), exits, seed * 10 + number)
            alone[name] = fit_lenses(made, seed * 10 + number).to(dtype)
        both = copy.deepcopy(base).to(dtype)
        both.add_adapters({name: alone[name].exit_heads() for name in configs})
        alone[None] = copy.deepcopy(both)
        alone[None]._adapters.clear()
    return both, alone


@functools.cache
def two_adapters(
    family: str, seed: int, arithmetic: Arithmetic = FLOAT64
) -> tuple[EarlyExitModel, dict[str | None, EarlyExitModel]]:
    """Four layers; exits of two adapters behind some of them, at least one layer of which has both."""
    rng = random.Random(f"adapters {family} {seed}")
    with torch.inference_mode(False):
        base = fade(arithmetic.tiny_model(family, seed), 3, rng.choice([0.2, 0.5]))
    shared = rng.randint(1, 3)
    configs = {}
    for name in NAMES:
        layers = sorted({shared, *rng.sample((1, 2, 3), rng.randint(0, 2))})
        candidates = rng.choice([0, 0, 40])
        configs[name] = [
            ExitConfig(layer=layer, candidates=candidates, gate=rng.random() < 0.7, **rng.choice(HEADS))
            for layer in layers
        ]
    return with_adapters(base, configs, arithmetic.dtype, seed)


def of_adapter(config: GenerationConfig, adapter: str | None) -> GenerationConfig:
    """The same settings with an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dataclasses.replace(config, adapter=adapter)


def draw_settings(rng: random.Random, alone: Mapping[str | None, EarlyExitModel]) -> GenerationConfig:
    """Settings of an adapter, or of none; often with a test at the layers where both adapters have an exit."""
    adapter = rng.choice((*NAMES, *NAMES, None))
    config = draw_config(rng, alone[adapter])
    if rng.random() < 0.4:
        return of_adapter(config, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dataclasses.replace(
            config, adapter=adapter, mode=rng.choice(["threshold", "lossless"]), max_new_tokens=17, exit_layer=None,
            exits=sorted({*alone["a"].exit_heads()} & {*alone["b"].exit_heads()}), min_exit_tokens=0, max_draft=None,
            rule=rng.choice(["probability", "margin", "entropy"]), threshold=rng.choice([0.0, 0.01, 0.03, 0.1, 0.9]),
            draft=rng.choice([("exits",), ("exits", "lookup")]),
        )  # fmt: skip


def in_full(config: GenerationConfig) -> GenerationConfig:
    """The same settings without exits and drafts."""
    free = GenerationConfig()
    names = ("exits", "adapter", "rule", "threshold", "patience", "min_exit_tokens", "max_draft", "draft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dataclasses.replace(config, mode="full", **{name: getattr(free, name) for name in names})


@dataclass
class Seen:
    """What happened in all companies: the test can fail only where these things do. ``mixed`` are passes at whose end
    two adapters' exits were tested."""

    compared: int = 0
    mixed: int = 0
    early: int = 0
    drafted: int = 0
    preempted: int = 0
    shared: int = 0
    lossless: int = 0


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[str]]:
    """The adapters that are tested in each pass."""
    found: dict[int, set[str]] = defaultdict(set)
    kept: list[object] = []  # so that no two passes have one identity
    test_exit = Engine._test_exit

    def watch(engine: Engine, boundary: int, adapter: str, arrived: Any, rows: list[int], tested: list[Any]) -> None:
        kept.append(arrived)
        found[id(arrived)].add(adapter)
        test_exit(engine, boundary, adapter, arrived, rows, tested)

    monkeypatch.setattr(Engine, "_test_exit", watch)
    return found


def run(family: str, count: int, passes: dict[int, set[str]], arithmetic: Arithmetic = FLOAT64, **given: Any) -> Seen:
    """Companies of requests of both adapters and of none; each gets what it gets alone, from a model that has nothing
    but its own adapter."""
    seen = Seen()
    for number in range(count):
        rng = random.Random(f"{family} adapters {number}")
        both, alone = two_adapters(family, rng.randrange(3), arithmetic)

        company = company_of(rng, both, functools.partial(draw_settings, rng, alone), 7, arithmetic)
        if rng.random() < 0.6:  # together from the first pass on
            company.arrivals = [0] * len(company.requests)
            company.options = dataclasses.replace(company.options, max_sequences=64)
        found, engine = together(company, rng, rng.choice([0, 1, 3]), **given)
        options = arithmetic.options(prefix_sharing=False)
        engines = {name: arithmetic.engine(one, tokenizer=Letters(), options=options) for name, one in alone.items()}
        for index, generation in found.items():
            prompt, config = company.requests[index]
            single = engines[config.adapter].generate(prompt, of_adapter(config, None))
            try:
                check_alike(generation, single, arithmetic.tolerance)
                if config.mode == "lossless":
                    assert generation.token_ids == engines[None].generate(prompt, in_full(config)).token_ids
            except AssertionError as error:
                raise AssertionError(f"{family} {number}, request {index}: {company.requests[index]}") from error
            assert not set(generation.exit_layers) - {*alone[config.adapter].exit_heads(), 4}
            count_up(seen, generation)
        assert engine.memory.hidden.used == 0
        for allocator in engine.memory.pool.allocators:
            allocator.check()
            assert allocator.used == 0
    seen.mixed = sum(len(adapters) > 1 for adapters in passes.values())
    return seen


def count_up(seen: Seen, generation: Generation) -> None:
    seen.compared += 1
    seen.early += min(generation.exit_layers, default=4) < 4
    seen.drafted += generation.stats.drafted
    seen.preempted += generation.stats.preemptions
    seen.shared += generation.stats.shared_tokens
    seen.lossless += generation.stats.mode == "lossless"


@pytest.mark.parametrize(("arithmetic", "family", "count"), params(FAST, FAST_NATIVE))
def test_a_text_is_that_of_its_adapter_alone(
    arithmetic: Arithmetic, family: str, count: int, passes: dict[int, set[str]]
) -> None:
    seen = run(family, count, passes, arithmetic)
    assert seen.compared > 2 * count


def test_the_companies_meet_what_could_go_wrong(passes: dict[int, set[str]]) -> None:
    """Two adapters tested in one pass, drafts, texts that gave way for others, and blocks that were shared."""
    seen = run("llama", 12, passes)
    assert min(seen.mixed, seen.early, seen.drafted, seen.lossless, seen.preempted, seen.shared) > 3


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_static_passes_keep_the_exits_of_adapters_apart(family: str, passes: dict[int, set[str]]) -> None:
    assert run(family, 3, passes, compile="static").compared > 6


@pytest.mark.parametrize(("arithmetic", "family", "count"), slow_params(SLOW))
def test_a_text_is_that_of_its_adapter_alone_in_many_cases(
    arithmetic: Arithmetic, family: str, count: int, passes: dict[int, set[str]]
) -> None:
    seen = run(family, count, passes, arithmetic)
    assert min(seen.mixed, seen.early, seen.drafted, seen.lossless) > count / 2
    assert seen.shared > count / 4  # windows of 8 positions leave few blocks to share


# ---- passes


def sharing(family: str = "llama", a: str = "block", b: str = "block", **over: Any) -> Any:
    """Both adapters have exits of these kinds behind layers 1 and 3, and b has one behind layer 2."""
    configs = {
        "a": [ExitConfig(layer=layer, kind=a, gate=True, **over) for layer in (1, 3)],
        "b": [ExitConfig(layer=layer, kind=b, candidates=20) for layer in (1, 2, 3)],
    }
    return with_adapters(tiny_model(family, torch.float64), configs)


@pytest.mark.parametrize("compile", ["none", "static"])
@pytest.mark.parametrize("kinds", [("block", "block"), ("mlp", "block"), ("lens", "mlp"), ("norm", "lens")])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_adapter_has_its_own_logits_at_a_boundary(family: str, kinds: tuple[str, str], compile: str) -> None:
    """Of rows of two texts that share passes: as the model computes them that has one adapter alone. Static passes and
    heads are recorded."""
    both, alone = sharing(family, *kinds)
    fused, texts = FusedModel(both, "none", compile), [random_ids(12), random_ids(12, 1)]
    if fused.static is not None:
        fused.static.record = record_on_cpu
    runner = make_runner(fused, 128)
    drivers = [Driver(runner), Driver(runner)]
    expected = {name: [alone[name].exit_logits(ids) for ids in texts] for name in NAMES}
    assert runner.bounds == (0, 1, 2, 3, 4)
    for at, size, boundary in ((0, 5, 1), (5, 1, 3), (6, 1, 1), (7, 3, 2), (10, 1, 3), (11, 1, 1)):
        moves = [(driver, text[at : at + size]) for driver, text in zip(drivers, texts, strict=True)]
        for which, arrived in enumerate(advance_many(moves, boundary)):
            names = [name for name in NAMES if boundary in expected[name][which]]
            assert names == (["b"] if boundary == 2 else ["a", "b"])
            for name in names:
                head, rows = runner.head(boundary, name), range(len(arrived.hidden_MD))
                assert head.key == (name, boundary)
                newest = runner.exit_logits(boundary, arrived, rows[-1:], name)[0]
                wanted = expected[name][which][boundary][0, at + size - 1]
                assert worst(expand(newest, head.candidate_ids, 97), wanted) <= 1e-11
            assert runner.head(boundary).key == (names[0], boundary)
            if boundary != 2:
                gate = alone["a"].exits[str(boundary)]
                tapped = alone["a"].taps(torch.tensor([texts[which]]), [boundary])[boundary].hidden[0, at + size - 1]
                score = torch.sigmoid(gate.gate_logit(tapped)).item()
                assert runner.gates(boundary, arrived, rows[-1:], "a") == pytest.approx([score], abs=1e-11)


@torch.no_grad()
def test_each_block_exit_has_an_entry_that_every_row_fills() -> None:
    """As full passes of one adapter's model do, whatever the rows of a pass go on to."""
    both, alone = sharing()
    runner, ids = make_runner(FusedModel(both, "none"), 64), random_ids(9)
    assert len(runner.pool.stores) == 4 + 5
    keys = [key for key, head in runner.fused.heads.items() if head.block is not None]
    assert keys == [("a", 1), ("b", 1), ("b", 2), ("a", 3), ("b", 3)]
    driver = Driver(runner)
    driver.advance(ids[:4])
    for token, boundary in zip(ids[4:], (1, 3, 2, 1, 4), strict=True):
        driver.advance([token], boundary)
    for name in NAMES:
        single = Driver(make_runner(FusedModel(alone[name], "none"), 64))
        single.advance(ids)
        own = [4 + at for at, key in enumerate(keys) if key[0] == name]
        for mine, entry in zip(range(4, 4 + len(own)), own, strict=True):
            assert worst(driver.stored(entry), single.stored(mine)) <= 1e-12


# ---- the engine


def test_without_a_name_a_request_has_the_exits_of_all_and_of_the_first_where_they_share() -> None:
    both, alone = sharing(a="lens", b="norm")
    engine = make_engine(both)
    settings: dict[str, Any] = {"mode": "threshold", "threshold": 0.0, "max_new_tokens": 8, "ignore_eos": True}
    texts = {name: generate(engine, [5, 6, 7], adapter=name, **settings) for name in (*NAMES, None)}
    for name, made in alone.items():
        found, expected = texts[name], generate(make_engine(made), [5, 6, 7], **settings)
        assert (found.token_ids, found.exit_layers) == (expected.token_ids, expected.exit_layers)
    assert texts["a"].token_ids == texts[None].token_ids != texts["b"].token_ids
    assert (texts["a"].stats.exits, texts["b"].stats.exits, texts[None].stats.exits) == ([1, 3], [1, 2, 3], [1, 2, 3])
    reversed_model = copy.deepcopy(alone["b"])
    attached = {"b": copy.deepcopy(alone["b"]).exit_heads(), "a": copy.deepcopy(alone["a"]).exit_heads()}
    reversed_model.remove_exits([1, 2, 3])
    reversed_model.add_adapters(attached)
    assert generate(make_engine(reversed_model), [5, 6, 7], **settings).token_ids == texts["b"].token_ids


def test_drafts_of_two_adapters_are_counted_apart() -> None:
    both, _ = sharing(a="lens", b="lens")
    engine = make_engine(both)
    settings: dict[str, Any] = {"threshold": 0.0, "exits": [1], "max_new_tokens": 12, "ignore_eos": True}
    for name in ("a", "b", "b", None):
        generate(engine, random_ids(6), adapter=name, draft="exits", adaptive=False, **settings)
    counted = Counter({key: drafted for key, (drafted, _) in engine.pricing.acceptance.counts.items()})
    assert set(counted) == {("exit", "a", 1), ("exit", "b", 1)}
    once = make_engine(both)
    for name in ("a", None):
        generate(once, random_ids(6), adapter=name, draft="exits", adaptive=False, **settings)
    assert once.pricing.acceptance.counts == {
        key: count for key, count in engine.pricing.acceptance.counts.items() if key == ("exit", "a", 1)
    }


def test_a_look_up_is_not_an_adapter_of_that_name() -> None:
    """Sources of drafts of all kinds are in one table."""
    both, _ = with_adapters(tiny_model("llama", torch.float64), {"lookup": [ExitConfig(layer=3)]})
    engine = make_engine(both)
    generate(engine, random_ids(4) * 4, adapter="lookup", adaptive=False, threshold=0.0, max_new_tokens=20)
    keys = set(engine.pricing.acceptance.counts)
    assert ("exit", "lookup", 3) in keys
    assert keys - {("exit", "lookup", 3)} <= {("lookup", n) for n in (2, 3, 4)}


def test_what_an_adapter_lacks_is_refused_by_name() -> None:
    both, _ = sharing(a="lens", b="lens")
    engine = make_engine(both)
    for settings, says in (
        ({"adapter": "aa"}, r"no adapter 'aa'; did you mean 'a'\? \(it has: a, b\).*last part of the directory"),
        ({"adapter": "a", "exits": [2]}, r"adapter 'a' has no exit at layer 2 \(it has: 1, 3\)"),
        ({"adapter": "a", "threshold": {2: 0.5}}, r"threshold is given for 2.*active ones of adapter 'a' are \[1, 3\]"),
        ({"adapter": "b", "rule": "gate"}, "gate"),
        ({"adapter": 3}, "adapter is 3"),
    ):
        with pytest.raises(UserError, match=says):
            generate(engine, [5, 6], mode="threshold", **settings)
    with pytest.raises(UserError, match=r"no adapter 'a' \(it has: none\)"):
        generate(make_engine(tiny_model("llama", torch.float64)), [5, 6], mode="lossless", adapter="a")
    with pytest.warns(UserWarning, match="adapter has no effect without a mode that uses exits"):
        GenerationConfig(mode="full", adapter="a")


def test_records_and_notes_are_of_the_adapter() -> None:
    """What tuning left of the other adapter's exit at a layer says nothing of this one's."""
    both, _ = sharing(a="lens", b="lens")
    sets = both.exit_sets()
    for name, layer, record in (
        ("a", 1, {"tested": False, "threshold": 0.3}), ("a", 3, {"tested": True, "threshold": 0.4}),
        ("b", 1, {"tested": True, "threshold": 0.6}), ("b", 2, {"tested": False, "threshold": 1.0}),
        ("b", 3, {"tested": False, "threshold": 0.8}),
    ):  # fmt: skip
        sets[name][layer].record = ExitRecord(**record)
    engine = make_engine(both)
    for name, thresholds in (("a", {3: 0.4}), ("b", {1: 0.6}), (None, {3: 0.4})):
        found = engine.intake.plan(GenerationConfig(mode="threshold", adapter=name)).rule
        assert found is not None
        assert dict(found.thresholds) == thresholds
    notes = [note for note in engine.notes if "no token will leave" in note]
    assert len(notes) == 3
    assert "[1] of adapter 'a'," in notes[0]
    assert "[2, 3] of adapter 'b'," in notes[1]
    assert "[1, 2]," in notes[2]


def test_what_to_expect_of_drafts_is_of_the_adapter() -> None:
    both, _ = sharing(a="lens", b="lens")
    for right, (name, heads) in zip((0.6, 0.9), both.exit_sets().items(), strict=True):
        curve = Calibration(scores=(0.5,), coverage=(0.4,), precision=(right,))
        heads[1].record = ExitRecord(rule="probability", threshold=0.5, calibration=curve)
        engine = make_engine(both)
        engine.add([5, 6], GenerationConfig(rule="probability", adapter=name))
        drafting = engine.roster.waiting[-1].drafting
        assert drafting is not None
        assert drafting.sources["exit", name, 1].prior == right


# ---- costs


def test_a_layer_costs_what_the_dearest_exit_there_does() -> None:
    both, alone = sharing(a="block", b="block")
    fused = FusedModel(both, "none")
    assert ideal(fused).draft.keys() == {1, 2, 3}
    for layer in (1, 3):
        dearest = max(ideal(FusedModel(alone[name], "none")).draft[layer] for name in NAMES)
        assert ideal(fused).draft[layer] == dearest
    best: dict[Any, float] = {("context", far): 8.0 for _, far in [(0, 127)]}
    best |= {(part, rows): 4.0 for part in ("layers", "head") for rows in SIZES}
    best |= {("test", key): {"a": 5.0, "b": 7.0}[key[0]] for key in fused.heads}
    best |= {("gate", key): 0.5 for key in fused.heads if key[0] == "a"}
    found = _table(fused, best, 0.0)
    assert found.draft == {1: 7.0 + 2.0, 2: 7.0 + 1.0, 3: 7.0 + 2.0}  # a block's attention takes what a layer does
    assert found.test == {1: 7.0 + 2.0, 2: 7.0 + 1.0, 3: 7.0 + 2.0}


def test_boundaries_are_the_layers_of_all_adapters() -> None:
    configs = {"a": [ExitConfig(layer=1), ExitConfig(layer=4, kind="block")], "b": [ExitConfig(layer=2)]}
    both, _ = with_adapters(tiny_model("llama", torch.float64), configs)
    runner: Runner = make_engine(both).runner
    assert (runner.early, runner.bounds) == ((1, 2), (0, 1, 2, 4))

"""A stage by itself: what it builds, what it runs, and what it gives to the next one."""

import dataclasses
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from exitlm.model.config import ModelConfig
from exitlm.model.decoder import EarlyExitModel
from exitlm.model.layers import DecoderLayer
from exitlm.parallel.pipeline.stage import FINAL, Stage
from exitlm.parallel.tied import canonical
from exitlm.train.head_loss import HeadLosses
from exitlm.train.objective import LossSettings
from tests.model.families import FAMILIES, tiny_hf_config
from tests.parallel.cases import WAYS, exits_of, llama
from tests.parallel.chain import backward, forward, gradients, plan_of, split_of, stages_of
from tests.parallel.reference import Objective, Reference, Values, random_table

EXITS = exits_of("2 norm shared", "3 mlp own", "4 block exits", "5 lens exits")
CONFIG = llama(6, tie_word_embeddings=True)
COUNTS = (2, 2, 2)


@pytest.mark.parametrize(("way", "splits"), list(product(WAYS, (False, True))))
def test_no_output_is_a_view(way: Any, splits: bool) -> None:
    """A schedule that splits the backward detaches outputs in place, which views refuse."""
    table = random_table(2, 8, 48, 0)
    for exits in (EXITS, EXITS[:1], ()):
        losses = HeadLosses(how=way, splits=splits)
        stages = stages_of(CONFIG, exits, split_of(CONFIG, exits, COUNTS), losses)
        for inputs, outputs in forward(stages, table, plan_of(exits, table)):
            for out in outputs:
                assert not out._is_view()
                assert out.requires_grad
                assert out.untyped_storage().data_ptr() != inputs[0].untyped_storage().data_ptr()
                out.detach_()


@pytest.mark.parametrize("splits", [False, True])
def test_no_output_is_a_view_where_features_travel(splits: bool) -> None:
    table, exits = random_table(2, 8, 48, 0), EXITS
    losses = HeadLosses(settings=LossSettings(distill=0.5), splits=splits)
    stages = stages_of(CONFIG, exits, split_of(CONFIG, exits, COUNTS), losses, carries=True)
    passed = forward(stages, table, plan_of(exits, table))
    assert [len(outputs) for _, outputs in passed] == [2, 2, 1]
    for _, outputs in passed:
        for out in outputs:
            assert not out._is_view()
            out.detach_()


@pytest.mark.parametrize("place", ["next", "end"])
@pytest.mark.parametrize("counts", [(6,), (1, 5), (2, 2, 2), (3, 1, 2), (1, 1, 1, 1, 1, 1)])
def test_stages_have_every_tensor_of_the_model(counts: tuple[int, ...], place: str) -> None:
    """Once, but for copies of the matrices that heads share; by the names that they have in the whole model."""
    for tied in (False, True):
        config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
        stages = stages_of(config, EXITS, split_of(config, EXITS, counts, place=place), HeadLosses())
        model = EarlyExitModel(config)
        model.add_exits(EXITS)
        found = [(name, p.shape) for stage in stages for name, p in stage.tensors()]
        whole = {canonical(name, config, EXITS): p.shape for name, p in model.named_parameters()}
        assert {canonical(name, config, EXITS): shape for name, shape in found} == whole
        twice = {name for name, _ in found if [other for other, _ in found].count(name) > 1}
        assert twice <= {"lm_head.weight"}
        assert [name for name, _ in found if "layers." in name] == [n for n in whole if "layers." in n]


def test_matrices_that_heads_of_a_stage_share_are_one_parameter() -> None:
    (stage,) = stages_of(CONFIG, EXITS, split_of(CONFIG, EXITS, (6,)), HeadLosses())
    heads = stage.model.exit_heads()
    assert heads[4].output.weight is heads[5].output.weight
    assert stage.model.lm_head.weight is stage.model.model.embed_tokens.weight


def test_nothing_beyond_the_last_tuned_exit_is_built() -> None:
    exits = exits_of("2 norm own", "3 mlp own")
    split = split_of(CONFIG, exits, (2, 1), depth=3, frozen=True)
    stages = stages_of(CONFIG, exits, split, HeadLosses(), frozen=True)
    names = [name for stage in stages for name, _ in stage.tensors()]
    assert {name.split(".")[2] for name in names if "layers." in name} == {"0", "1", "2"}
    assert not [name for name in names if name.startswith(("model.norm", "lm_head"))]


class Calls:
    """Which layers ran, by their global index."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stages: list[Stage]) -> None:
        self.seen: list[int] = []
        index = {id(layer): i for s in stages for i, layer in s.model.model.layers.by_number().items()}
        for name in ("forward", "parts"):
            plain = getattr(DecoderLayer, name)

            def run(layer: DecoderLayer, *inputs: Any, plain: Any = plain, **options: Any) -> Any:
                if id(layer) in index:
                    self.seen.append(index[id(layer)])
                return plain(layer, *inputs, **options)

            monkeypatch.setattr(DecoderLayer, name, run)


def test_a_dropped_layer_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the forward nor in the backward, and its gradient is none."""
    table = random_table(2, 8, 48, 0)
    stages = stages_of(CONFIG, EXITS, split_of(CONFIG, EXITS, COUNTS), HeadLosses())
    plan = plan_of(EXITS, table, dropped={0: frozenset({1, 4, 5}), 1: frozenset({0})})
    calls = Calls(monkeypatch, stages)
    backward(forward(stages, table, plan))
    assert calls.seen == [0, 2, 3]
    assert not [name for name in gradients(stages, CONFIG, EXITS) if name.startswith("model.layers.4.")]
    calls.seen.clear()
    forward(stages, table, plan, microbatch=1)
    assert calls.seen == [1, 2, 3, 4, 5]


def test_recomputed_layers_run_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    table = random_table(2, 8, 48, 0)
    stages = stages_of(CONFIG, EXITS, split_of(CONFIG, EXITS, COUNTS), HeadLosses(), recompute=True)
    calls = Calls(monkeypatch, stages)
    backward(forward(stages, table, plan_of(EXITS, table)))
    assert sorted(calls.seen) == sorted([*range(6), *range(6)])


def test_a_frozen_stage_runs_its_layers_once_and_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    table = random_table(2, 8, 48, 0)
    losses = HeadLosses()
    stages = stages_of(CONFIG, EXITS, split_of(CONFIG, EXITS, COUNTS, frozen=True), losses, frozen=True)
    exits = {id(p) for stage in stages for p in stage.model.exit_parameters()}
    for p in (p for stage in stages for p in stage.parameters() if id(p) not in exits):
        p.requires_grad_(False)
    calls, plan, x = Calls(monkeypatch, stages), plan_of(EXITS, table, final=False), table.ids
    options = {"labels": table.labels, "documents": table.documents, "microbatch": 0, "plan": plan}
    for stage in stages:
        out = stage(x, **options)
        assert not out.hidden.requires_grad
        before = len(calls.seen)
        end = stage(out.hidden, **options, taps=out.taps) if out.taps else None
        if end is not None:
            end.backward()
        assert len(calls.seen) == before
        x = out.hidden
    assert calls.seen == list(range(6))
    reference = Reference(CONFIG, EXITS, Values(), frozen=True)
    objective = Objective(weights={e.layer: plan.weights[e.layer] for e in EXITS})
    expected = reference.find(table, range(2), objective, plan.shares).gradients()
    found = gradients(stages, CONFIG, EXITS)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)


def test_measuring_leaves_no_gradient_and_no_graph() -> None:
    table = random_table(2, 8, 48, 0)
    losses = HeadLosses(how="eager")
    stages = stages_of(CONFIG, EXITS, split_of(CONFIG, EXITS, COUNTS), losses)
    with torch.no_grad():
        passed = forward(stages, table, plan_of(EXITS, table, measure=True))
    assert not passed[-1][1][0].requires_grad
    expected = Reference(CONFIG, EXITS, Values()).find(
        table,
        range(2),
        Objective(weights=dict.fromkeys(plan_of(EXITS, table).weights, 1.0)),
        plan_of(EXITS, table).shares,
    )
    for head, (tokens, loss, hits, sure, *_) in {h: s.tolist() for h, s in losses.take().items()}.items():
        sums = expected.sums[head]
        assert (tokens, hits) == (sums.tokens, sums.accuracy)
        assert (loss, sure) == pytest.approx((sums.loss, sums.confidence), rel=1e-12)
    assert losses.take() == {}


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_documents_of_a_row_do_not_see_each_other(family: str, across: bool) -> None:
    """As if each had a row of its own; unless the run says so."""
    config = ModelConfig.from_hf(tiny_hf_config(family).to_dict())
    table = random_table(6, 12, config.vocab_size, 3)
    exits = exits_of("2 norm own", "4 block own")
    split = split_of(config, exits, (2, 2))
    stages = stages_of(config, exits, split, HeadLosses(), across_documents=across)
    plan = plan_of(exits, table)
    backward(forward(stages, table, plan))
    reference = Reference(config, exits, Values())
    reference.across = across
    found, weights = gradients(stages, config, exits), Objective(weights=plan.weights)
    for name, gradient in reference.find(table, range(6), weights, plan.shares).gradients().items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)


def test_a_head_that_rests_is_not_run() -> None:
    table = random_table(2, 8, 48, 0)
    losses = HeadLosses()
    stages = stages_of(CONFIG, EXITS, split_of(CONFIG, EXITS, COUNTS), losses)
    plan = plan_of(EXITS, table)
    some = dataclasses.replace(plan, weights={layer: w for layer, w in plan.weights.items() if layer in (3, FINAL)})
    backward(forward(stages, table, some))
    assert set(losses.take()) == {3, FINAL}
    assert not [name for name in gradients(stages, CONFIG, EXITS) if name.startswith(("exits.2", "exits.4", "exits.5"))]


def test_an_exit_at_a_boundary_is_the_same_function_on_either_side() -> None:
    exits, table = exits_of("2 norm own", "4 block own"), random_table(3, 8, 48, 1)
    found: list[dict[str, Tensor]] = []
    for place in ("next", "end"):
        split = split_of(CONFIG, exits, COUNTS, place=place)
        assert split.owners == ({2: 1, 4: 2} if place == "next" else {2: 0, 4: 1})
        stages = stages_of(CONFIG, exits, split, HeadLosses())
        backward(forward(stages, table, plan_of(exits, table)))
        found.append(gradients(stages, CONFIG, exits))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_gradient_of_the_whole_model(family: str) -> None:
    config = ModelConfig.from_hf(tiny_hf_config(family).to_dict())
    exits, table = exits_of("1 norm own", "2 mlp shared", "3 block shared"), random_table(3, 9, config.vocab_size, 0)
    stages = stages_of(config, exits, split_of(config, exits, (1, 2, 1)), HeadLosses(), recompute=True)
    plan = plan_of(exits, table)
    backward(forward(stages, table, plan))
    objective, found = Objective(weights=plan.weights), gradients(stages, config, exits)
    expected = Reference(config, exits, Values()).find(table, range(3), objective, plan.shares).gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)

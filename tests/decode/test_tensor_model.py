"""The parts of a model on tensor ranks against the whole model, in float64: logits, gates, keys and values, tokens."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from exitlm.decode.kernels.ranks import Ranks
from exitlm.decode.kernels.scores import Scores, digest
from exitlm.decode.kernels.tensor_model import TensorModel, local_part
from exitlm.errors import UserError
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from exitlm.parallel.tensor import check_tensor
from tests.decode.models import attach
from tests.decode.tensor_cases import KINDS, OUTPUTS, TensorCase, cuttable, drawn, run_cases
from tests.model.families import FAMILIES, tiny_model
from tests.parallel.launch import launch

FOUR_HEADS = {"num_key_value_heads": 4}


def every_head() -> list[tuple[ExitConfig, ...]]:
    """All kinds x outputs x candidates, three to a model, every second one with a gate; heads with output "exits" share
    one matrix, so that exits with and without candidates are never in one model."""
    groups = []
    for candidates, output in itertools.product((0, 17), OUTPUTS):
        made: list[dict[str, Any]] = [dict(kind=kind) for kind in KINDS] + [dict(kind="lens", branch=True)]
        for at in range(0, len(made), 3):
            groups.append(
                tuple(
                    ExitConfig(
                        layer=layer, output=output, candidates=candidates, rank=5, gate=bool(layer % 2), init="random",
                        **values,
                    )
                    for layer, values in enumerate(made[at : at + 3], 1)
                )
            )  # fmt: skip
    return groups


def test_every_kind_of_exit_on_two_ranks() -> None:
    run_cases(2, [TensorCase(family="llama", exits=exits, seed=i) for i, exits in enumerate(every_head())])


def test_every_kind_of_exit_on_four_ranks() -> None:
    """97 rows of the vocabulary in parts of 25, 25, 25 and 22, and 17 candidates in parts of 5, 5, 5 and 2; tied."""
    cases = [
        TensorCase(family="gemma3_text", exits=exits, seed=i, settings=FOUR_HEADS)
        for i, exits in enumerate(every_head()[1::2])
    ]
    run_cases(4, cases)


def test_every_family_that_training_cuts() -> None:
    """Biases, norms of heads, four norms around a layer, windows, scaled embeddings, layers without rotation; static
    shapes, too."""
    assert len(cuttable()) == len(FAMILIES) - 2
    exits = (ExitConfig(layer=1, kind="mlp"), ExitConfig(layer=2, kind="block"), ExitConfig(layer=3, gate=True))
    cases = []
    for family, (tied, compile) in itertools.product(cuttable(), ((True, "none"), (False, "static"))):
        settings: dict[str, Any] = {"tie_word_embeddings": tied}
        if family not in ("mistral", "qwen2"):
            settings["attention_bias"] = True
        if family in ("llama", "smollm3"):
            settings["mlp_bias"] = True
        cases.append(TensorCase(family=family, exits=exits, settings=settings, compile=compile))
    run_cases(2, cases)


@pytest.mark.parametrize(("ranks", "count"), [(2, 20), (4, 8)])
def test_drawn_models(ranks: int, count: int) -> None:
    run_cases(ranks, [drawn(seed, ranks) for seed in range(count)])


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "count"), [(2, 200), (4, 100)])
def test_many_drawn_models(ranks: int, count: int) -> None:
    run_cases(ranks, [drawn(seed, ranks) for seed in range(100, 100 + count)])


def test_exits_of_several_adapters_and_few_candidates() -> None:
    """Two adapters at one layer; fewer candidates than ranks."""
    exits = (ExitConfig(layer=1, kind="mlp", output="own"), ExitConfig(layer=2, kind="norm", candidates=2))
    more = (ExitConfig(layer=2, kind="block", output="exits"), ExitConfig(layer=3, kind="embed", output="exits"))
    run_cases(4, [TensorCase(family="llama", exits=exits, more=more, settings=FOUR_HEADS)])


def test_lower_precision_has_the_streams_dtype() -> None:
    """On a CPU sums are float32 whatever the weights are; what is rounded is the same, but for its order."""
    exits = (ExitConfig(layer=1, kind="mlp", gate=True), ExitConfig(layer=3, kind="block", candidates=17))
    known: dict[str, Any] = {"family": "llama", "exits": exits, "tolerance": 1e-5}
    run_cases(
        2,
        [
            TensorCase(dtype=torch.float32, **known),
            TensorCase(dtype=torch.bfloat16, **known),
            TensorCase(dtype=torch.float32, quant="fp16", **known),
        ],
    )


def refusal(model: EarlyExitModel) -> str:
    """What a rank says to a model that can't be cut."""
    group = dist.group.WORLD
    assert group is not None
    with pytest.raises(UserError) as caught:
        TensorModel(model, "none", group=group)
    return str(caught.value)


@pytest.mark.parametrize(("family", "ranks"), [("phi3", 2), ("olmo2", 2), ("llama", 3), ("llama", 4)])
def test_what_training_refuses_is_refused_in_the_same_words(family: str, ranks: int) -> None:
    model = tiny_model(family)
    with pytest.raises(UserError) as caught:
        check_tensor(model.config, [], ranks, True, 8 * ranks)
    assert launch(ranks, refusal, model) == [str(caught.value)] * ranks


def held(model: EarlyExitModel) -> dict[str, int]:
    """Bytes that a rank keeps of each parameter, by the storage that it lies in."""
    group = dist.group.WORLD
    assert group is not None
    part = local_part(model, range(4), Ranks(group), torch.device("cpu"))
    whole = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    cut = {name: p for name, p in part.named_parameters() if p.shape != model.get_parameter(name).shape}
    assert not whole & {p.untyped_storage().data_ptr() for p in cut.values()}
    return {name: p.untyped_storage().nbytes() for name, p in part.named_parameters()}


def test_a_rank_keeps_its_part_alone() -> None:
    """Matrices have a storage of their own, so that the whole ones can go; tied ones are one."""
    model = attach(
        tiny_model("llama", vocab_size=96, tie_word_embeddings=True),
        [ExitConfig(layer=1, kind="mlp", output="exits"), ExitConfig(layer=2, output="exits")],
    )
    whole = {name: p.untyped_storage().nbytes() for name, p in model.named_parameters()}
    for rank in launch(2, held, model):
        assert set(rank) == set(whole)
        for name, size in whole.items():
            is_cut = "norm" not in name and ".lens." not in name
            assert rank[name] == (size // 2 if is_cut else size), name


# ---- what is read of logits that lie on several ranks


def cut_rows(logits_MK: Tensor, ranks: int) -> Scores:
    """What is read of logits whose columns are cut."""
    each = -(-logits_MK.shape[1] // ranks)
    return Scores.of_parts(torch.stack([digest(logits_MK[:, r * each : (r + 1) * each]) for r in range(ranks)]), each)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("columns", [1, 2, 5, 33])
def test_a_digest_of_parts_is_that_of_the_whole(ranks: int, columns: int) -> None:
    """Ties within a part and between parts go to the lowest index; large numbers overflow nothing."""
    generator = torch.Generator().manual_seed(columns)
    logits = torch.randint(-3, 4, (40, columns), generator=generator).double() * torch.tensor([[1.0], [400.0]]).repeat(
        20, 1
    )
    found, whole = cut_rows(logits, ranks), Scores.of(logits)
    assert found.best == whole.best
    assert found.finite == whole.finite == [True] * 40
    assert found.probability == pytest.approx(torch.softmax(logits, -1).amax(-1).tolist(), rel=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_is_found_in_any_part(value: float) -> None:
    logits = torch.zeros(6, 6)
    logits[range(5), range(5)] = value
    assert cut_rows(logits, 3).finite == Scores.of(logits).finite == [False] * 5 + [True]

"""Tensor and sequence parallelism: the gradient of one process, whatever is cut, and what can't be cut is refused."""

import dataclasses
from typing import Any

import pytest
from torch.distributed.tensor import DTensor

from exitlm.errors import UserError
from exitlm.model.config import ModelConfig
from exitlm.model.exits import ExitConfig
from exitlm.parallel.mesh import Layout
from exitlm.parallel.tensor import check_tensor
from tests.model.families import FAMILIES, tiny_hf_config
from tests.parallel.cases import Case, Meshes, exits_of, llama, run_cases, trainer_of
from tests.parallel.launch import launch

HEADS = exits_of("1 embed shared", "2 norm low_rank", "3 mlp own", "4 block exits", "5 lens exits")
GATED = tuple(dataclasses.replace(e, gate=True) for e in HEADS)
CANDIDATES = (  # with all on the second rank, and some on either
    ExitConfig(layer=1, kind="norm", candidates=6),
    ExitConfig(layer=3, kind="mlp", candidates=14, gate=True),
    ExitConfig(layer=4, kind="lens", branch=True, output="low_rank", rank=3),
)
RARE_FIRST = (48, 47, 46, 40, 41, 42, 3, 4, 10, 11, 20, 24, 25, 26)


def family(name: str) -> ModelConfig:
    """A tiny model of a family."""
    return ModelConfig.from_hf(tiny_hf_config(name).to_dict())


@pytest.mark.parametrize("sequence", [True, False])
def test_every_kind_of_head_has_the_gradient_of_one_process(sequence: bool) -> None:
    layout, model = Layout(tensor=2, sequence=sequence), llama(5, vocab_size=49, tie_word_embeddings=True)
    cases = [
        Case(layout=layout, model=model, exits=HEADS, settings=("objective.exit_forward=eager",)),
        Case(layout=layout, model=model, exits=GATED, settings=("objective.distill=0.5", "objective.gate=0.7")),
        Case(
            layout=layout,
            model=model,
            exits=CANDIDATES,
            candidate_ids=RARE_FIRST,
            settings=("objective.distill=0.5", "objective.distill_temperature=1.5", "objective.gate=0.7"),
        ),
        Case(
            layout=layout,
            model=model,
            exits=HEADS,
            settings=("objective.exit_forward=checkpoint", "objective.confidence_weighted=true"),
        ),
    ]
    run_cases([dataclasses.replace(case, microbatches=2) for case in cases])


def test_three_ranks_have_uneven_parts_of_the_vocabulary() -> None:
    """17, 17 and 15 of 49 rows, of the embedding and of every output matrix."""
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24}
    model = llama(5, vocab_size=49, tie_word_embeddings=True, **heads)
    layout = Layout(tensor=3)
    run_cases(
        [
            Case(
                layout=layout, model=model, exits=HEADS, length=6, microbatches=1, settings=("objective.distill=0.5",)
            ),
            Case(
                layout=layout,
                model=dataclasses.replace(model, vocab_size=50, tie_word_embeddings=False),
                exits=CANDIDATES,
                candidate_ids=RARE_FIRST,
                length=6,
                microbatches=1,
            ),
        ]
    )


def test_every_family_that_can_be_cut_has_the_gradient_of_one_process() -> None:
    """Biases, norms of heads, four norms around a layer, windows, scaled embeddings, layers without rotation."""
    cut = [name for name in FAMILIES if family(name).qk_norm != "full" and not family(name).fused_projections]
    assert len(cut) == len(FAMILIES) - 2
    exits = exits_of("2 mlp shared", "3 block own")
    run_cases(
        [
            Case(
                layout=Layout(tensor=2, sequence=name != "qwen3"),
                model=family(name),
                exits=exits,
                microbatches=1,
                size=1,
            )
            for name in cut
        ]
    )


def boundaries(case: Case) -> list[tuple[bool, tuple[int, ...]]]:
    """Whether each output of the first stage is a DTensor, and its shape."""
    trainer = trainer_of(case, Meshes().of(case.layout))
    seen: list[tuple[bool, tuple[int, ...]]] = []

    def hook(module: Any, inputs: Any, out: Any) -> None:
        seen.append((isinstance(out, DTensor), tuple(out.shape)))

    if trainer.stages[0].first:
        trainer.stages[0].register_forward_hook(hook)
    trainer.step()
    return seen


@pytest.mark.parametrize("sequence", [True, False])
def test_stages_exchange_plain_parts_of_the_sequence(sequence: bool) -> None:
    layout = Layout(tensor=2, pipeline=2, sequence=sequence)
    case = Case(layout=layout, exits=exits_of("1 norm shared"), model=llama(2), microbatches=2, size=1)
    shape = (1, 4, 16) if sequence else (1, 8, 16)
    assert launch(4, boundaries, case) == [[(False, shape)] * 2, [(False, shape)] * 2, [], []]


@pytest.mark.parametrize(
    ("name", "tensor", "length", "says"),
    [
        ("phi3", 2, 8, "fused"),
        ("olmo2", 2, 8, "norm queries and keys over all heads"),
        ("llama", 4, 8, "num_key_value_heads = 2; use 1 or 2"),
        ("llama", 2, 7, "seq_len .* = 7; use 1"),
        ("llama", 5, 10, "num_attention_heads = 4"),
    ],
)
def test_what_cannot_be_cut_is_refused(name: str, tensor: int, length: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_tensor(family(name), [], tensor, True, length)
    check_tensor(family(name), [], 1, True, length)
    check_tensor(family("llama"), [], 2, False, 7)

"""What an optimizer works on: this process's part of every parameter, one gradient and one norm for all of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from exitlm.parallel.mesh import Layout
from exitlm.parallel.shards import part_of
from tests.parallel.cases import Case, Meshes, exits_of, llama, trainer_of, truth
from tests.parallel.launch import launch

EXITS = exits_of("1 norm shared", "2 lens exits", "3 mlp own", "4 block exits")
TIED = llama(4, vocab_size=49, tie_word_embeddings=True)


def parts() -> None:
    """Compare with torch's own distribution, over one dimension of ranks and over two."""
    line = init_device_mesh("cpu", (4,))
    for shape in ((8, 3), (49, 4), (3, 5), (1, 7), (5,)):
        full = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
        for placement in [Replicate(), *(Shard(d) for d in range(len(shape)))]:
            here = distribute_tensor(full, line, [placement])
            assert torch.equal(part_of(full, here), here.to_local()), (shape, placement)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for rows, style in ((49, ColwiseParallel()), (6, RowwiseParallel())):
        linear = nn.Linear(8, rows, bias=False).double()
        full = torch.arange(8.0 * rows, dtype=torch.float64).reshape(rows, 8)
        nn.init.zeros_(linear.weight)
        with torch.no_grad():
            linear.weight.copy_(full)
        module = nn.Sequential(linear)
        parallelize_module(module, grid["tensor"], {"0": style})
        fully_shard(module, mesh=grid["data"])
        assert isinstance(linear.weight, DTensor)
        assert torch.equal(part_of(full, linear.weight), linear.weight.to_local())


def test_a_part_of_a_tensor_is_where_torch_has_it() -> None:
    """Also where sizes do not divide, and where two dimensions of ranks cut the same one."""
    launch(4, parts)


def test_a_plain_parameter_is_its_own_part() -> None:
    full = torch.ones(3)
    assert part_of(full, nn.Parameter(full)) is full


def clipped(case: Case) -> dict[str, Any]:
    """The norm and, by name, the parts of gradients before and after a clip at half of it."""
    trainer = trainer_of(case, Meshes().of(case.layout))
    report = trainer.step()
    shards, everything = trainer.shards, {0: 0.5}
    before = [local.grad.clone() for local in shards.local if local.grad is not None]
    norm = shards.norms([0], lambda name: 0)[0]
    shards.multiply(everything, lambda name: 0)
    halves = all(torch.equal(local.grad, 0.5 * g) for local, g in zip(shards.local, before, strict=True) if g.numel())
    return {"reported": report.grad_norm, "norm": norm, "halves": halves, "after": shards.norms([0], lambda name: 0)[0]}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pipeline=4),
        Layout(pipeline=2, schedule="zbv", stages_per_rank=2),
        Layout(tensor=2, pipeline=2),
        Layout(tensor=2, sequence=False),
        Layout(data=2, tensor=2),
        Layout(data=2, pipeline=2, shard=False),
    ],
    ids=str,
)
def test_the_norm_counts_every_number_once(layout: Layout) -> None:
    """However many ranks hold it: norms that tensor ranks replicate, copies of tied matrices on several stages (or two
    on one rank), parameters that are whole on every data rank."""
    case = Case(layout=layout, exits=EXITS, model=TIED, size=1)
    expected = float(sum(g.pow(2).sum() for g in truth(case).gradients.values())) ** 0.5
    for rank in launch(layout.world, clipped, case):
        assert rank["reported"] == rank["norm"] == pytest.approx(expected, rel=1e-12)
        assert rank["after"] == pytest.approx(0.5 * expected, rel=1e-12)
        assert rank["halves"]


def names(case: Case) -> tuple[list[str], list[str]]:
    """The tensors of this process, and those that it leads."""
    trainer = trainer_of(case, Meshes().of(case.layout))
    return trainer.shards.names, sorted(trainer.shards.tied.leads & set(trainer.shards.names))


def test_a_tied_matrix_has_one_name_and_one_rank_that_leads() -> None:
    case = Case(layout=Layout(pipeline=4), exits=EXITS, model=TIED, settings=("parallel.layers_per_stage=[1,1,1,1]",))
    found = launch(4, names, case)
    holders = [rank for rank, (mine, _) in enumerate(found) if "model.embed_tokens.weight" in mine]
    leaders = [rank for rank, (_, leads) in enumerate(found) if "model.embed_tokens.weight" in leads]
    assert (holders, leaders) == ([0, 1, 3], [0])  # exit 1 reads it on the second stage, the final head on the last
    assert not any("lm_head.weight" in mine for mine, _ in found)
    everything = sorted(name for _, leads in found for name in leads)
    assert len(everything) == len(set(everything))
    assert set(everything) == {name for mine, _ in found for name in mine}


def trained(case: Case, steps: int, table: Any) -> dict[str, Tensor]:
    """This process's parts of all parameters after some optimizer steps, by name and piece."""
    trainer = trainer_of(case, Meshes().of(case.layout), table)
    start = [local.detach().clone() for local in trainer.shards.local]
    for _ in range(steps):
        assert trainer.step().grad_norm > 0
    assert not any(torch.equal(a, b) for a, b in zip(start, trainer.shards.local, strict=True) if b.numel() > 40)
    out: dict[str, Tensor] = {}
    for name, whole, local in zip(trainer.shards.names, trainer.shards.whole, trainer.shards.local, strict=True):
        piece: list[int] = []
        if isinstance(whole, DTensor):
            coordinate = whole.device_mesh.get_coordinate()
            assert coordinate is not None
            piece = [at for at, placement in zip(coordinate, whole.placements, strict=True) if placement != Replicate()]
        key = f"{name} {piece}"
        assert key not in out or torch.equal(out[key], local)
        out[key] = local.detach().clone()
    return out


@pytest.mark.parametrize(
    ("layout", "steps"),
    [
        (Layout(pipeline=4), 50),
        (Layout(pipeline=4, schedule="zbv", stages_per_rank=2), 5),
        (Layout(data=2, tensor=2, pipeline=2), 4),
        (Layout(data=2, tensor=2, sequence=False, shard=False), 4),
        (Layout(data=2, pipeline=2, shard=False, schedule="interleaved", stages_per_rank=2), 5),
    ],
    ids=str,
)
def test_copies_stay_equal_to_the_last_bit(layout: Layout, steps: int) -> None:
    layers = max(4, layout.stages)
    exits = exits_of("1 norm shared", "2 lens exits", "3 mlp own", f"{layers} block exits")
    """Of tied matrices on several stages, and of what tensor and data ranks have in common."""
    case = Case(
        layout=layout,
        exits=exits,
        model=llama(layers, vocab_size=49, tie_word_embeddings=True),
        size=1,
        length=4,
        settings=("train.clip=1.0", "train.lr=0.01", f"train.steps={steps}", "exits.place=end"),
    )
    table = case.table(steps * case.job().geometry.rows)
    found = launch(layout.world, trained, case, steps, table)
    held: dict[str, list[Tensor]] = {}
    for rank in found:
        for name, value in rank.items():
            held.setdefault(name, []).append(value)
    shared = [values for values in held.values() if len(values) > 1]
    assert shared
    assert all(torch.equal(values[0], value) for values in shared for value in values)

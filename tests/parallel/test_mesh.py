"""Which rank has which stages, which ranks talk to each other, and how long they wait."""

import time

import pytest
import torch
import torch.distributed as dist

from exitlm.errors import UserError
from exitlm.parallel.mesh import Launch, Layout, Mesh, stages_per_rank
from tests.parallel.cases import Case, exits_of, trainer_of
from tests.parallel.launch import launch


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble", "zbv"])
@pytest.mark.parametrize("pipeline", [1, 2, 4, 8])
def test_every_stage_is_on_one_rank(schedule: str, pipeline: int) -> None:
    layout = Layout(pipeline=pipeline, schedule=schedule, stages_per_rank=stages_per_rank(schedule, pipeline, 0))
    found = [layout.stages_of(rank) for rank in range(pipeline)]
    assert sorted(stage for stages in found for stage in stages) == list(range(layout.stages))
    for rank, stages in enumerate(found):
        assert all(layout.rank_of(stage) == rank for stage in stages)


def test_a_rank_has_every_nth_stage_or_a_pair_of_mirror_images() -> None:
    assert Layout(pipeline=4, schedule="interleaved", stages_per_rank=2).stages_of(1) == (1, 5)
    assert Layout(pipeline=4, schedule="zbv", stages_per_rank=2).stages_of(1) == (1, 6)


@pytest.mark.parametrize(
    ("variables", "says"), [({"RANK": "zero"}, "RANK is 'zero'"), ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE makes 1")]
)
def test_an_environment_of_no_launcher_is_refused(
    variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        Launch.from_environment()


@pytest.mark.parametrize(("schedule", "asked"), [("interleaved", 1), ("zbv", 3), ("1f1b", 2), ("filled", 2)])
def test_a_number_of_stages_that_a_schedule_does_not_know_is_refused(schedule: str, asked: int) -> None:
    with pytest.raises(UserError, match="stages per rank"):
        stages_per_rank(schedule, 4, asked)
    assert stages_per_rank("interleaved", 4, 3) == 3


def places() -> list[tuple[tuple[int, ...], ...]]:
    """Of several layouts: this process's place, and the ranks of its groups."""
    out = []
    for layout in (Layout(data=2, tensor=2, pipeline=2), Layout(data=4, pipeline=2, shard=False), Layout(pipeline=8)):
        mesh = Mesh(layout, torch.device("cpu"))
        groups = [
            mesh.pipeline,
            mesh.tensor,
            mesh.all.get_group("shard"),
            mesh.all.get_group("replicate"),
            mesh.upstream,
        ]
        place = (mesh.pipeline_rank, mesh.data_rank, mesh.tensor_rank)
        out.append((place, *(tuple(dist.get_process_group_ranks(group)) for group in groups if group is not None)))
        tensor, rows = torch.tensor(float(dist.get_rank())), mesh.data_mesh
        dist.all_reduce(tensor, group=mesh.upstream)
        assert tensor == sum(dist.get_process_group_ranks(mesh.pipeline))
        assert rows.size() == layout.data
    return out


def test_tensor_ranks_are_neighbours_and_pipeline_ranks_far_apart() -> None:
    found = launch(8, places)
    for rank, (mixed, whole, straight) in enumerate(found):
        pipeline, rest = divmod(rank, 4)
        data, tensor = divmod(rest, 2)
        column, row = (rest, rest + 4), (4 * pipeline + 2 * data, 4 * pipeline + 2 * data + 1)
        replicas = (4 * pipeline + tensor, 4 * pipeline + 2 + tensor)
        assert mixed == ((pipeline, data, tensor), column, row, replicas, (rank,), column)
        every = tuple(range(4 * pipeline, 4 * pipeline + 4))
        assert whole == ((pipeline, rest, 0), column, (rank,), (rank,), every, column)
        assert straight == ((rank, 0, 0), tuple(range(8)), (rank,), (rank,), (rank,), tuple(range(8)))


def waited(case: Case, seconds: float, timeout: float) -> float:
    """How long this process waited in a step for rank 1, which does not come for ``seconds`` (0: dies)."""
    trainer = trainer_of(case, Mesh(case.layout, torch.device("cpu"), timeout))
    dist.barrier()
    begin = time.monotonic()
    if dist.get_rank() == 1:
        if seconds == 0.0:
            raise KeyError("dies")
        time.sleep(seconds)
        return 0.0
    with pytest.raises(RuntimeError):
        trainer.step()
    spent = time.monotonic() - begin
    assert spent < timeout + 2.0
    raise AssertionError(f"gave up after {spent:.1f} s")


@pytest.mark.parametrize("seconds", [0.0, 6.0])
@pytest.mark.parametrize("layout", [Layout(data=2, pipeline=2), Layout(tensor=2, data=2)], ids=["DP PP", "TP DP"])
def test_a_rank_that_fails_or_hangs_ends_the_others_within_the_timeout(seconds: float, layout: Layout) -> None:
    """In every group that they may wait in: torch's own timeout of a group is half an hour."""
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="dies" if seconds == 0.0 else "gave up after [23]"):
        launch(4, waited, Case(layout=layout, exits=exits_of("4 norm shared")), seconds, 2.0, timeout=2.0)
    assert time.monotonic() - begin < 2.0 * seconds + 10.0

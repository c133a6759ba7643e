"""Pipelines whose stages are processes: texts are those of one process, whoever is killed, and no process is left."""

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import exitlm
from exitlm import UserError
from exitlm.decode.kernels.share import Share
from exitlm.decode.options import EngineConfig
from exitlm.decode.remote.job import Weights
from exitlm.decode.remote.launch import Joining, is_loopback
from exitlm.decode.remote.stage import OnDisk
from tests.conftest import Run
from tests.decode.remote.processes import (
    PATIENCE,
    children_of,
    engine_of,
    exitlm_process,
    is_gone,
    kill,
    texts,
    wait_for,
    write_model,
)
from tests.decode.remote.sockets import make_certificate, public_part
from tests.decode.remote.test_lost import decode, requests
from tests.model.families import tiny_model
from tests.native.cases import needs_native
from tests.parallel.launch import free_port

pytestmark = pytest.mark.usefixtures("cache")
FLOAT64: dict[str, Any] = {"dtype": "float64", "quant": "none"}
NATIVE: dict[str, Any] = {"dtype": "float32", "quant": "stored"}
ARITHMETICS = {"float64": FLOAT64, "native": NATIVE}
ALL = requests(12, 0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[list[int]]:
    """What one process gives, in float64."""
    return texts(exitlm.load(directory, **FLOAT64), ALL)


@pytest.fixture(scope="module")
def model(directory: Path) -> Iterator[exitlm.LLM]:
    """Two stages, which every test leaves as good as they were."""
    found = exitlm.load(directory, engine={"pipeline": 2, "stage_timeout": 2}, **FLOAT64)
    yield found
    found.close()


# ---- texts


def test_texts_of_two_processes_are_those_of_one(model: exitlm.LLM, expected: list[list[int]]) -> None:
    engine = engine_of(model)
    assert texts(model, ALL) == expected
    assert engine.generate(*ALL[0]).stats.kernels == "torch, 2 stages"
    assert engine.memory.hidden.used == 0


@pytest.mark.parametrize(("arithmetic", "stages"), [
    pytest.param("native", 3, marks=needs_native), pytest.param("native", 2, marks=[needs_native, pytest.mark.slow]),
    pytest.param("float64", 3, marks=pytest.mark.slow), pytest.param("float64", 4, marks=pytest.mark.slow),
])  # fmt: skip
def test_texts_of_several_processes_are_those_of_one(directory: Path, arithmetic: str, stages: int) -> None:
    given = ARITHMETICS[arithmetic]
    one = exitlm.load(directory, **given)
    several = exitlm.load(directory, engine={"pipeline": stages}, **given)
    try:
        assert len(children_of(engine_of(several))) == stages - 1
        assert texts(several, ALL) == texts(one, ALL)
        found, alone = (llm.engine.generate(*ALL[1]) for llm in (several, one))
        assert found.exit_layers == alone.exit_layers
        assert engine_of(several).fused.kernels_name.startswith(one.engine.fused.kernels_name)
    finally:
        several.close()


def test_exits_that_are_on_no_disk_are_sent_and_all_processes_end_with_the_engine(directory: Path) -> None:
    """Added in memory, to a model whose files have others."""
    one, two = (exitlm.load(directory, engine={"pipeline": count}, **FLOAT64) for count in (1, 2))
    for llm in (one, two):
        llm.remove_exits([1, 3])
        llm.add_exits([1, 3], kind="norm", seed=3)
    try:
        assert texts(two, ALL) == texts(one, ALL)
        assert engine_of(two).lost == 0
        (pid,) = children_of(engine_of(two)).values()
        assert not is_gone(pid)
        two.remove_exits([1])
        assert is_gone(pid)
    finally:
        two.close()
        two.close()


# ---- what each process holds


def test_a_stage_reads_its_layers_alone(directory: Path) -> None:
    whole = exitlm.load(directory, **FLOAT64).model
    weights = Weights(
        source=str(directory), digest=OnDisk().digest(str(directory)), dtype="float64", device="cpu", quant="none",
        compile="none", rounds=False, options=EngineConfig(),
    )  # fmt: skip
    share = Share(layers=range(1, 3), bounds=(0, 1, 3, 4))
    part = OnDisk().load(weights, share.layers)
    assert sorted(part.model.layers.by_number()) == [1, 2]
    assert part.exit_sets() == {}
    for name, tensor in part.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name])


def private(pid: int) -> int:
    """Bytes that a process has for itself and not from files."""
    (line,) = (each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
def test_a_process_takes_the_memory_of_its_layers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 8}
    directory = write_model(tmp_path / "model", exits=(), **sizes)
    counts = [1, 1, 6]
    found = exitlm.load(directory, engine={"pipeline": 3, "layers_per_stage": counts}, **FLOAT64)
    try:
        texts(found, ALL[:1])
        small, large = (private(pid) for _, pid in sorted(children_of(engine_of(found)).items()))
    finally:
        found.close()
    layer = sum(p.numel() * p.element_size() for p in found.model.model.layers.by_number()[1].parameters())
    assert large - small > 0.7 * (6 - 1) * layer  # that they hold; malloc may keep more


# ---- who ends


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_costs_no_text(model: exitlm.LLM, expected: list[list[int]], times: int) -> None:
    engine = engine_of(model)
    lost = engine.lost
    for _ in range(times // 2):
        with pytest.warns(UserWarning, match="stage 2 of 2 was lost"):
            assert decode(engine, ALL, {3: 1, 12: 1}, lambda n: kill(engine, n)) == expected
    assert engine.lost == lost + times
    assert engine.memory.hidden.used == 0


def test_a_process_that_is_killed_while_another_thread_decodes(model: exitlm.LLM, expected: list[list[int]]) -> None:
    engine, found = engine_of(model), list[list[list[int]]]()
    thread = threading.Thread(target=lambda: found.append(texts(model, ALL * 4)))
    with warnings.catch_warnings(record=True):
        thread.start()
        wait_for(lambda: len(engine.roster.running) > 3, "texts are decoded")
        kill(engine, 1)
        thread.join()
    assert found == [expected * 4]


def test_a_process_that_is_stopped_is_replaced(model: exitlm.LLM, expected: list[list[int]]) -> None:
    engine = engine_of(model)
    pid = children_of(engine)[1]
    with pytest.warns(UserWarning, match=r"stage 2 of 2 was lost \(stage 2 \(process \d+\) did not answer in time\)"):
        assert decode(engine, ALL, {4: 1}, lambda n: os.kill(children_of(engine)[n], signal.SIGSTOP)) == expected
    assert is_gone(pid)
    assert children_of(engine)[1] != pid


HEAD = """
import sys, exitlm
model = exitlm.load(sys.argv[1], dtype="float64", quant="none", engine={"pipeline": 3})
print(*(process.pid for process in model.engine.pipeline._launcher.processes.values()), flush=True)
end = sys.stdin.readline()
if end == "raise\\n":
    raise ValueError("a program that breaks off")
"""


@pytest.mark.parametrize("end", [
    "kill", pytest.param("return", marks=pytest.mark.slow), pytest.param("raise", marks=pytest.mark.slow),
])  # fmt: skip
def test_no_process_outlives_its_head(directory: Path, end: str) -> None:
    command = [sys.executable, "-c", HEAD, str(directory)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as head:
        assert head.stdin is not None
        assert head.stdout is not None
        pids = [int(pid) for pid in head.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(map(is_gone, pids))
        if end == "kill":
            head.kill()
        else:
            head.stdin.write(f"{end}\n")
            head.stdin.close()
        head.wait(PATIENCE)
        wait_for(lambda: all(map(is_gone, pids)), "the stages have ended")


# ---- stages that join


def test_stages_join_by_address_and_a_spare_one_takes_over(
    directory: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    """With a key and a certificate. One with other weights is refused by name, and so is one with another key; the next
    one is taken."""
    key, other_key, certificate = tmp_path / "key", tmp_path / "other key", make_certificate(tmp_path)
    key.write_text("a key of sixteen and more\n")
    other_key.write_text("another key of as many\n")
    other = write_model(tmp_path / "other", seed=1)
    address = f"127.0.0.1:{free_port()}"
    join = ("--join", address, "--certificate", public_part(certificate), "--key-file")
    options = EngineConfig(
        pipeline=2, stages_at=address, stage_key_file=str(key), stage_certificate=str(certificate)
    )  # fmt: skip
    head = exitlm.load(directory, engine=options, **FLOAT64)
    started = [exitlm_process("stage", *join, other_key), exitlm_process("stage", other, *join, key)]
    errors: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=lambda: head.engine)
        thread.start()
        try:
            for wrong in started:
                errors.append(wrong.communicate(timeout=PATIENCE)[1])
                assert wrong.returncode == 2
            started.append(exitlm_process("stage", *join, key))
            thread.join(PATIENCE)
            assert not thread.is_alive()
            started.append(exitlm_process("stage", directory, *join, key))
            engine = engine_of(head)

            def end(number: int) -> None:
                started[2].kill()

            assert decode(engine, ALL, {5: 1}, end) == expected
            assert engine.lost == 1
            head.close()
            # without --once a stage waits for the next head
            assert started[3].poll() is None
        finally:
            head.close()
            for process in started:
                process.kill()
                process.communicate()
    assert "the head at " in errors[0]
    assert "does not know the key of this stage" in errors[0]
    assert "the weights of this stage have digest" in errors[1]
    said = [str(one.message) for one in caught]
    assert any("a stage was refused: " in each and "does not know the key" in each for each in said), said
    assert any("was refused: the weights of this stage have digest" in each for each in said), said


def test_other_machines_need_a_key_and_a_certificate(directory: Path, run: Run, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a key of sixteen and more\n")
    for host in ("0.0.0.0", "192.168.7.7", "::", "example.org", "127.0.0.1.example.org"):
        with pytest.raises(UserError, match=r"which needs a key .* and a certificate"):
            Joining(f"{host}:7070", "a key of sixteen and more", None, 1.0)
        with pytest.raises(UserError, match=r"which needs a key .* and a certificate"):
            Joining(f"{host}:7070", None, str(key), 1.0)
        code, out, error = run("stage", "--join", f"{host}:7070", "--key-file", key)
        assert (code, out) == (2, "")
        assert f"{host} is another machine, which needs the head's key (--key-file) and its certificate" in error
        assert error.count("\n") == 1
    head = exitlm.load(directory, engine={"pipeline": 2, "stages_at": "0.0.0.0:7070"})
    with pytest.raises(UserError, match="which needs a key"):
        head.generate([1, 2])
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))


def test_what_can_be_no_address_or_key(run: Run, tmp_path: Path, directory: Path) -> None:
    short = tmp_path / "short"
    short.write_text("guess me\n")
    for arguments, says in (
        (("--join", "here"), "'here' is no address; write HOST:PORT"),
        (("--join", "127.0.0.1:99999"), "'127.0.0.1:99999' is no address"),
        (("--join", "127.0.0.1:7070", "--key-file", short), "has 8 characters, which can be guessed"),
        (("--join", "127.0.0.1:7070", "--key-file", tmp_path / "absent"), "can't be read from"),
    ):
        code, out, error = run("stage", *arguments)
        assert (code, out) == (2, "")
        assert says in error
    taken = Joining("127.0.0.1:0", None, None, 1.0)
    head = exitlm.load(directory, engine={"pipeline": 2, "stages_at": taken.address})
    with pytest.raises(UserError, match=f"stages can't join at {taken.address}"):
        head.generate([1, 2])
    taken.close()


# ---- what is refused


@torch.no_grad()
def test_a_model_that_is_not_what_its_files_hold_is_refused(directory: Path) -> None:
    changed = exitlm.load(directory, engine={"pipeline": 2}, **FLOAT64)
    next(changed.model.model.layers.parameters()).mul_(1.5)
    with pytest.raises(UserError, match=r"read the weights from disk, and this model is not .* export\(\)"):
        changed.generate([1, 2])
    drawn = exitlm.LLM(tiny_model("llama"), engine={"pipeline": 2})
    with pytest.raises(UserError, match="read the weights from disk"):
        drawn.generate([1, 2])


def test_more_stages_than_layers_start_no_process(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    for engine, says in (
        ({"pipeline": 5}, "5 stages can't share 4 layers; use engine.pipeline from 1 to 4"),
        ({"pipeline": 2, "layers_per_stage": [1, 2]}, r"\[1, 2\] does not share 4 layers among 2 stages"),
    ):
        with pytest.raises(UserError, match=says):
            exitlm.load(directory, engine=engine).generate([1, 2])

"""The library without Python: under sanitizers, on an emulated ARM processor, with an instruction made of others, and
where memory is refused, its own program finds no fault."""

import importlib.util
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from exitlm.native import build, pack
from tests.native.programs import CSRC, X86_64, compiler, program, run

PROGRAM = CSRC / "program.cpp"
GENERIC = ("layers.cpp", "pool.cpp", "dispatch.cpp", "tiles_generic.cpp")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def case(rng: np.random.Generator, type: str, rows: int, cols: int, digits: int) -> bytes:
    """A packed matrix of random weights, some rows, their product in float64, and the error that is allowed."""
    gguf = pytest.importorskip("gguf")
    weights = rng.standard_normal((rows, cols)).astype(np.float32)
    if type in ("F32", "F16", "BF16"):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type]
        held = torch.from_numpy(weights).to(dtype)
        raw, values = pack.raw_of(held), held.double().numpy()
    elif type in ("Q4_K", "Q6_K"):  # the package has no quantiser for these: any bytes with small scales are a matrix
        size, scales = (144, (0, 2)) if type == "Q4_K" else (210, (208,))
        stored = rng.integers(0, 256, (rows, cols // 256, size)).astype(np.uint8)
        for at in scales:
            half = (0.01 * rng.random((rows, cols // 256, 1))).astype(np.float16)
            stored[:, :, at : at + 2] = half.view(np.uint8)
        raw = pack.RawMatrix(type, stored.reshape(rows, -1), cols)
        values = gguf.dequantize(raw.rows, gguf.GGMLQuantizationType[type]).astype(np.float64)
    else:
        raw = pack.RawMatrix(type, gguf.quantize(weights, gguf.GGMLQuantizationType[type]), cols)
        values = gguf.dequantize(raw.rows, gguf.GGMLQuantizationType[type]).astype(np.float64)
    count = int(rng.integers(1, 12))
    x = rng.standard_normal((count, cols)).astype(np.float32)
    wanted = (x.astype(np.float64) @ values.T).astype(np.float32)
    share = 1e-5 if type in ("F32", "F16", "BF16") else 2e-4 if digits == 2 else 2e-2
    packed, format = pack.pack(raw), pack.FORMATS.index(pack.format_of(type))
    head = struct.pack("<6i", format, rows, cols, digits, count, len(packed))
    most = struct.pack("<f", share * np.abs(wanted).max())
    return head + packed.tobytes() + x.tobytes() + wanted.tobytes() + most


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases of each type and number of digits."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("cases") / "cases.bin"
    sizes = ((32, 256), (96, 512))
    found = [case(rng, t, *size, digits) for t in pack.RAW_TYPES for size in sizes for digits in (1, 2)]
    path.write_bytes(b"".join(found))
    return path


def check(done: subprocess.CompletedProcess[str]) -> None:
    """It ran to its end and found nothing."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "36 cases" in done.stdout
    assert "\n0 failures" in done.stdout


def lacks_it(done: subprocess.CompletedProcess[str]) -> bool:
    """This processor, or this build, has not the instruction set that was asked for."""
    return "FAILED: the instruction set" in done.stdout


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizer: str, cases: Path, tmp_path: Path) -> None:
    flags = ["-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g"]
    target = build.host_target()
    assert target is not None
    library = tmp_path / target.library
    try:
        build.build(library, build.SOURCES, extra=flags)
    except build.NoCompiler as error:
        pytest.skip(str(error))
    command = [compiler(), "-std=c++20", *flags, f"-I{build.SOURCES}", str(PROGRAM), str(library), "-pthread"]
    subprocess.run([*command, f"-Wl,-rpath,{tmp_path}", "-o", str(tmp_path / "program")], check=True, timeout=600)
    ran = []
    for isa in ("avx512vnni", "avxvnni", "avx2", "neon", "generic"):
        done = run([tmp_path / "program", cases, isa])
        if not lacks_it(done):
            check(done)
            ran.append(isa)
    assert "generic" in ran


def test_refused_memory_is_an_error_and_changes_nothing(cases: Path, tmp_path: Path) -> None:
    """Each piece in turn. Threads other than the caller's ask for none: an exception there would end the process."""
    sources = {build.SOURCES / name: ["-Dposix_memalign=failing_memalign"] for name in GENERIC}
    sources |= {PROGRAM: ["-DFAILING_MEMORY"], CSRC / "failing_memory.cpp": []}
    check(run([program(tmp_path, sources), cases, "generic"]))


@pytest.mark.skipif(not X86_64, reason="needs an x86-64 processor")
def test_avx_vnni_with_its_instruction_made_of_others_computes_the_same(cases: Path, tmp_path: Path) -> None:
    sources = {build.SOURCES / name: [] for name in GENERIC}
    sources |= {PROGRAM: [], build.SOURCES / "tiles_avxvnni.cpp": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"]}
    flags = ["-O1", "-include", str(CSRC / "avxvnni_by_avx2.h"), "-DHAVE_AVXVNNI"]
    done = run([program(tmp_path, sources, flags), cases, "avxvnni"])
    if lacks_it(done):
        pytest.skip("this processor has no AVX2")
    check(done)


def test_an_emulated_arm_processor_computes_the_same(cases: Path, tmp_path: Path) -> None:
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None or importlib.util.find_spec("ziglang") is None:
        pytest.skip("needs qemu-aarch64 (Debian's qemu-user) and the package ziglang")
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl"]
    sources = {build.SOURCES / name: [] for name in GENERIC}
    sources |= {PROGRAM: [], build.SOURCES / "tiles_neon.cpp": ["-mcpu=generic+v8_2a+dotprod+fullfp16"]}
    flags = ["-O2", "-fno-sanitize=undefined", "-DHAVE_NEON"]
    made = program(tmp_path, sources, flags, zig, ["-static"])
    for isa in ("neon", "generic"):
        check(run([emulator, "-cpu", "max", made, cases, isa]))

"""The self test at load: it sees a fault in any function that an instruction set provides for the tiles. The faults are
made in copies of the generic kernels that pose as another instruction set's."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from exitlm.native import build
from tests.native.programs import PLAIN, X86_64, compiler, run

pytestmark = pytest.mark.slow
ISA = "avx2" if X86_64 else "neon"
MAIN = f"""
#include "exitcpu.h"
int main() {{ return exitcpu_use("{ISA}") ? 100 : exitcpu_check(); }}
"""
ALL = (0, 1, 2, 3, 4, 5, 6)  # formats, as in exitcpu.h
FAULTS = {
    "nothing": ("inline vi zero_i", "inline vi zero_i", ()),
    "low": ("b &= 15", "b &= 7", (0, 2)),
    "high": ("b >>= 4", "b >>= 3", (0, 2)),
    "nibbles times unsigned bytes": ("w.at[i] * (int8_t)x.at[i]", "w.at[i] * x.at[i]", (0, 2)),
    "a lane of nibbles": ("w.at[i] * (int8_t)x.at[i]", "w.at[i] * (int8_t)x.at[i ^ 1]", (0, 2)),
    "bytes without their bias": ("(w.at[i] - 128)", "w.at[i]", (1, 3)),
    "a bias taken twice": ("BIAS = 0.0f", "BIAS = 128.0f", (1, 3)),
    "the second digit": ("a.sum * 128", "a.sum * 64", (0, 1, 2, 3)),
    "a saturated sum": ("(float)a.sum", "(float)(int16_t)a.sum", (0, 1, 2, 3)),
    "small scales": ("return (float)*p;", "return (float)(int8_t)*p;", (2,)),
    "signed scales": ("return (float)(int8_t)*p;", "return (float)*p;", (3,)),
    "halves": ("value *= 5.192296858534828e33f", "value *= 2.596148429267414e33f", (0, 1, 2, 3, 4)),
    "bfloat16": ("(uint32_t)brain << 16", "(uint32_t)brain << 15", (5,)),
    "fma": ("return a * b + c;", "return a * b - c;", ALL),
    "store": ("{ *p = v; }", "{ *p = v + 1.0f; }", ALL),
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[Path]]:
    """A compiler and what all programs have in common."""
    place = tmp_path_factory.mktemp("common")
    (place / "main.cpp").write_text(MAIN)
    command = [compiler(), *PLAIN, "-O0", f"-DHAVE_{ISA.upper()}"]
    compiled = []
    for source in (place / "main.cpp", build.SOURCES / "dispatch.cpp", build.SOURCES / "tiles_generic.cpp"):
        compiled.append(place / f"{source.stem}.o")
        compile_one(command, source, compiled[-1])
    return command, compiled


def compile_one(command: Sequence[str], source: Path, out: Path) -> None:
    done = run([*command, "-c", source, "-o", out])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_tiles_is_seen(fault: str, objects: tuple[list[str], list[Path]], tmp_path: Path) -> None:
    right, wrong, formats = FAULTS[fault]
    command, common = objects
    text = (build.SOURCES / "tiles_generic.cpp").read_text()
    assert text.count(right) == 1
    text = text.replace(right, wrong).replace('"generic"', f'"{ISA}"').replace("kernels_generic", f"kernels_{ISA}")
    (tmp_path / "wrong.cpp").write_text(text)
    compile_one(command, tmp_path / "wrong.cpp", tmp_path / "wrong.o")
    linked = run([command[0], *common, tmp_path / "wrong.o", "-o", tmp_path / "program"])
    assert linked.returncode == 0, linked.stderr
    code = run([tmp_path / "program"]).returncode
    if code == 100:
        pytest.skip(f"this processor has no {ISA}")
    assert code == (1 + min(formats) if formats else 0)

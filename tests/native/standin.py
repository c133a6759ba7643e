"""A stand-in for the native library: sources of a few lines that export what loading needs.

What the functions answer can be changed by environment variables, so that one compilation serves many tests.
"""

from pathlib import Path

DISPATCH = """
#include <cstdlib>
#include "standin.h"
static int number(const char* name, int usual) {
    const char* given = std::getenv(name);
    return given ? std::atoi(given) : usual;
}
static int forks = 0;
EXPORT int exitcpu_abi(void) { return number("STANDIN_ABI", 2); }
EXPORT int exitcpu_check(void) { return number("STANDIN_CHECK", 0); }
EXPORT const char* exitcpu_digest(void) { return EXITCPU_DIGEST; }
EXPORT const char* exitcpu_isa(void) { return "stand-in"; }
EXPORT int exitcpu_standin_forks(void) { return forks; }
EXPORT int exitcpu_standin_sets(void) {
    int sets = generic();
#ifdef HAVE_AVX2
    sets += 1;
#endif
#ifdef HAVE_AVXVNNI
    sets += 2;
#endif
#ifdef HAVE_AVX512VNNI
    sets += 4;
#endif
#ifdef HAVE_NEON
    sets += 8;
#endif
    return sets;
}
#ifndef STANDIN_WITHOUT_FORKS
EXPORT void exitcpu_after_fork(void) { forks++; }
#endif
"""
HEADER = """
#define EXPORT extern "C" __attribute__((visibility("default")))
int generic();
"""
# A file of an instruction set compiles only with the flags of its set, and the others only without.
TILES = {
    "tiles_generic.cpp": "!defined(__AVX__) && !defined(__ARM_FEATURE_DOTPROD)",
    "tiles_avx2.cpp": "defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(__AVX512F__)",
    "tiles_avxvnni.cpp": "defined(__AVX2__) && defined(__AVXVNNI__) && !defined(__AVX512F__)",
    "tiles_avx512vnni.cpp": "defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)"
    " && defined(__AVX512VNNI__) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)",
    "tiles_neon.cpp": "defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)",
}


def write_sources(directory: Path) -> Path:
    """Write the sources into a new ``directory``, and return it."""
    directory.mkdir(parents=True)
    (directory / "standin.h").write_text(HEADER)
    (directory / "dispatch.cpp").write_text(DISPATCH)
    for name, condition in TILES.items():
        if name != "tiles_generic.cpp":
            condition += f" && defined(HAVE_{name[6:-4].upper()})"
        (directory / name).write_text(f"#if !({condition})\n#error wrong flags\n#endif\n")
    with (directory / "tiles_generic.cpp").open("a") as file:
        file.write('#include "standin.h"\nint generic() { return 0; }\n')
    return directory

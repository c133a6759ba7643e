"""Time and memory of loading the packaged model and of decoding with it, each in a process of its own.

    python benchmarks/load.py [--rounds 3]

``first``: with an empty cache directory (the GGUF is read and converted once). ``afterwards``: with the cache that this
left. Importing torch and transformers is timed apart. Peak memory is the high-water mark of resident pages after 64
tokens in the default format.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from measure import save, spread, table

CHILD = """
import json, resource, sys, time
begin = time.perf_counter()
import torch, transformers, exitlm, exitlm.llm
imported = time.perf_counter()
llm = exitlm.load("smollm2")
loaded = time.perf_counter()
llm.engine
packed = time.perf_counter()
llm.generate("Once upon a time", mode="lossless", max_new_tokens=64)
done = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"import, s": imported - begin, "load, s": loaded - imported, "pack, s": packed - loaded,
                  "first 64 tokens, s": done - packed, "peak memory, GiB": peak}))
"""


def child(cache: str) -> dict[str, float]:
    """Run once with this cache directory."""
    environment = {**os.environ, "EXITLM_CACHE": cache}
    out = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(out.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and write ``results/load.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    first: list[dict[str, float]] = []
    afterwards: list[dict[str, float]] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            first.append(child(cache))
            afterwards.append(child(cache))
    rows: list[dict[str, Any]] = []
    for name, found in (("first", first), ("afterwards", afterwards)):
        rows.append({"when": name, **{key: spread([run[key] for run in found]) for key in found[0]}})
    print(table(rows))
    print(save("load", {"rows": rows}))


if __name__ == "__main__":
    main()

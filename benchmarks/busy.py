"""Decoding on a CPU while nine other processes want its cores: no stall beyond what the others take.

    python benchmarks/busy.py [--processes 9] [--rounds 5]

In turn, with the others stopped and with them running: a thread that only counts, whose share of a core is its CPU time
of its wall time; and greedy decoding by the native kernels on all cores. With a share s of each core, decoding should
take 1 / s times as long: the figure is how much longer it takes than that. It is what a pass loses because a thread
of it has no core while another waits for it.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from measure import at_most, save, spread, table

import exitlm
from decode import QUESTION
from exitlm.decode.engine import Engine
from exitlm.decode.generation import GenerationConfig
from exitlm.decode.kernels.native_model import NativeModel
from exitlm.native import library

TOKENS = 48
SPIN_SECONDS = 2.0
BUSY = "import time\nwhile True: time.time()"


@contextmanager
def others(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Busy processes, stopped at first."""
    found = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        let(found, False)
        yield found
    finally:
        for process in found:
            process.kill()
            process.wait()


def let(processes: list[subprocess.Popen[bytes]], run: bool) -> None:
    """Let them run, or stop them."""
    for process in processes:
        os.kill(process.pid, signal.SIGCONT if run else signal.SIGSTOP)


def share() -> float:
    """Of a core, for a thread that never waits."""
    begin, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < SPIN_SECONDS:
        pass
    return (time.process_time() - used) / (time.perf_counter() - begin)


def main() -> None:
    """Run, and write ``results/busy.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    llm = exitlm.load("smollm2")
    engine = Engine(llm.model, tokenizer=llm.tokenizer)
    if not isinstance(engine.fused, NativeModel):
        raise SystemExit(f"the native kernels do not run here: {library.why_not()}")
    prompt = llm.encode(QUESTION, chat=True)
    config = GenerationConfig(mode="full", max_new_tokens=TOKENS, ignore_eos=True)

    def decode() -> float:
        return 1.0 / engine.generate(prompt, config).stats.tokens_per_second

    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    decode()
    with others(arguments.processes) as processes:
        for _ in range(arguments.rounds):
            for busy in (False, True):
                let(processes, busy)
                found[busy].append((share(), decode()))
        let(processes, False)
    rows = [
        {
            "beside": f"{arguments.processes} busy processes" if busy else "none",
            "share of a core": spread([share for share, _ in each]),
            "ms/token": spread([1e3 * seconds for _, seconds in each]),
        }
        for busy, each in found.items()
    ]
    print(table(rows))
    work = {busy: [share * seconds for share, seconds in each] for busy, each in found.items()}
    longer = [value / statistics.median(work[False]) for value in work[True]]
    claims = [at_most("time of a token, of what its share of the cores allows", spread(longer), 2.0)]
    print(table(claims))
    print(save("busy", {"threads": library.default_threads(), "tokens": TOKENS, "rows": rows, "claims": claims}))


if __name__ == "__main__":
    main()

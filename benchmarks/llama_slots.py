"""llama.cpp with as many sequences in its batches as it has slots: what its server does with so many clients, without
HTTP. It runs in a process of its own, by an interpreter that has llama_cpp.
"""

from __future__ import annotations

from llama import Llama
from measure import seconds

PROGRAM = """
import ctypes, json, sys
import llama_cpp as L
import numpy as np
path, threads, slots, room = sys.argv[1], *map(int, sys.argv[2:])
L.llama_backend_init()
silent = L.llama_log_callback(lambda *_: None)
L.llama_log_set(silent, None)
model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
params = L.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = slots * room, 512, 512, slots
params.n_threads = params.n_threads_batch = threads
context = L.llama_init_from_model(model, params)
V = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
batch = L.llama_batch_init(512, 0, 1)

def run(rows):  # (token, position, sequence, whether logits are wanted); the best token of each that is
    best = {}
    for at in range(0, len(rows), 512):
        part = rows[at : at + 512]
        for i, (token, position, sequence, wanted) in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        batch.n_tokens = len(part)
        if L.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        for i, (_, _, sequence, wanted) in enumerate(part):
            if wanted:
                best[sequence] = int(np.ctypeslib.as_array(L.llama_get_logits_ith(context, i), (V,)).argmax())
    return best

print("ready", flush=True)
for line in sys.stdin:
    prompts, count = json.loads(line)
    L.llama_memory_clear(L.llama_get_memory(context), True)
    last = [len(prompt) - 1 for prompt in prompts]
    best = run([(t, i, s, i == last[s]) for s, prompt in enumerate(prompts) for i, t in enumerate(prompt)])
    texts = [[best[s]] for s in range(len(prompts))]
    for step in range(1, count):
        best = run([(text[-1], last[s] + step, s, True) for s, text in enumerate(texts)])
        for s, text in enumerate(texts):
            text.append(best[s])
    print(json.dumps(texts), flush=True)
"""


class Slots:
    """Greedy texts of some prompts, decoded together."""

    def __init__(self, python: str, model: str, prompts: list[list[int]], count: int, threads: int) -> None:
        self.name, self.prompts, self.count = f"llama.cpp, {len(prompts)} slots", prompts, count
        room = max(len(prompt) for prompt in prompts) + count
        self.llama = Llama(python, PROGRAM, model, threads, len(prompts), -(-room // 256) * 256)

    def run(self, texts: dict[str, list[list[int]]]) -> float:
        """Seconds, prompts included; the texts go to ``texts`` under its name."""

        def decode() -> None:
            texts[self.name] = self.llama.ask([self.prompts, self.count])

        return seconds(decode)

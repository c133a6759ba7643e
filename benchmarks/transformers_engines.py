"""transformers' two ways to decode many prompts, on the weights of one of our models in float32, greedily.

Both write as many tokens as they are told to, whatever the model's end-of-text token says.
"""

from __future__ import annotations

import logging
import time

import torch
import transformers

import exitlm
from decode import transformers_model


class Padded:
    """transformers' ``generate`` on a batch that is padded on the left."""

    name = "transformers generate, padded, float32"

    def __init__(self, llm: exitlm.LLM, prompts: list[list[int]], count: int) -> None:
        self.model, self.prompts, self.count = transformers_model(llm), prompts, count
        self.config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0
        )

    def run(self, texts: dict[str, list[list[int]]]) -> float:
        """Seconds; the tokens go to ``texts``."""
        longest = max(map(len, self.prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in self.prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in self.prompts])
        begin = time.perf_counter()
        found = self.model.generate(ids, attention_mask=mask, generation_config=self.config)
        taken = time.perf_counter() - begin
        texts[self.name] = [row[longest:].tolist() for row in found]
        return taken


class Paged:
    """transformers' continuous batching, as its ``generate_batch`` does it. Its manager shares no blocks. It is made
    before the time begins and stopped afterwards: a manager that waits for requests keeps a processor busy."""

    name = "transformers generate_batch, float32"

    def __init__(self, llm: exitlm.LLM, prompts: list[list[int]], count: int) -> None:
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        self.model, self.prompts, self.count = transformers_model(llm), prompts, count
        self.config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0
        )
        self.missing = not hasattr(self.model, "continuous_batching_context_manager")

    def why_not(self) -> str | None:
        """Why this machine or the installed version can't run it; None if it can."""
        if self.missing:
            return "the installed transformers has none"
        try:
            self.run({})
        except Exception as error:
            return f"does not run here ({type(error).__name__}: {error})"
        return None

    def run(self, texts: dict[str, list[list[int]]]) -> float:
        """Seconds; the tokens go to ``texts``."""
        options = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512, allow_block_sharing=False)
        found: dict[str, list[int]] = {}
        with self.model.continuous_batching_context_manager(
            generation_config=self.config, continuous_batching_config=options, block=True
        ) as manager:
            begin = time.perf_counter()
            names = manager.add_requests(inputs=self.prompts, max_new_tokens=self.count)
            while len(found) < len(names) and manager.is_running():
                output = manager.get_result(timeout=1)
                if output is not None and output.is_finished():
                    found[output.request_id] = list(output.generated_tokens)
            taken = time.perf_counter() - begin
        if [len(found.get(name, ())) for name in names] != [self.count] * len(names):
            raise RuntimeError(f"it gave {len(found)} of {len(names)} texts")
        texts[self.name] = [found[name] for name in names]
        return taken

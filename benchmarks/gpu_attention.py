"""Ways to attend to a cache with few rows, on a GPU: what ``graphs.py`` chooses by. A section of ``gpu.py``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from measure import seconds

if TYPE_CHECKING:
    from gpu import Section


def attention(section: Section) -> None:
    """Microseconds of ways to attend to a cache with few rows: what the choices of ``graphs.py`` rest on."""
    from exitlm.decode.kernels.graphs import CudaRecorder, attend_in_chunks

    shapes = {"8b": (8, 4, 128), "135m": (3, 3, 64), "1.3b": (16, 1, 128)}
    lengths, rows_of = ((256, 1024, 4096, 16384), (1, 4, 16)) if not section.quick else ((256,), (1,))
    record = CudaRecorder(section.device) if section.device.type == "cuda" else None

    def microseconds(body: Callable[[], torch.Tensor], calls: int = 20) -> float:
        def many() -> torch.Tensor:
            for _ in range(calls):
                out = body()
            return out

        run: Callable[[], Any] = many if record is None else record(many).replay

        def wait() -> None:
            run()
            section.synchronize()

        wait()
        return min(seconds(wait) for _ in range(5)) / calls * 1e6

    def compare(found: dict[str, Any], name: str) -> None:
        heads, groups, size = shapes[name]
        options: dict[str, Any] = {"dtype": section.dtype, "device": section.device}
        for keys, rows in itertools.product(lengths, rows_of):
            query = torch.randn(rows, heads, groups, size, **options)
            store = torch.randn(2, heads, rows * keys, size, **options)
            mask = torch.zeros(rows, groups, keys, **options)
            mask[:, :, keys - 10 :] = -1e30
            times: dict[str, Any] = {}
            for way, body in ways(query, store, mask, attend_in_chunks).items():
                try:
                    times[way] = round(microseconds(body), 2)
                except RuntimeError as error:  # a kernel that does not take the shape
                    times[way] = str(error).splitlines()[0][:200]
            found[f"{rows} rows, {keys} keys"] = times
            section.row(
                f"attention {name}, {rows} rows, {keys} keys",
                ", ".join(f"{way}: {t}" for way, t in times.items()),
                "us",
            )

    for name in shapes:
        section.part(name, lambda found, name=name: compare(found, name), 3)


def ways(
    query_MKGd: torch.Tensor, store_2KSd: torch.Tensor, mask_MGS: torch.Tensor, in_chunks: Callable[..., torch.Tensor]
) -> dict[str, Callable[[], torch.Tensor]]:
    """What is compared, by name: rows of M sequences with S keys each. ``gather`` is what brings these together."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    (M, heads, _, size), keys = query_MKGd.shape, mask_MGS.shape[-1]
    scale, slots = size**-0.5, torch.arange(M * keys, device=query_MKGd.device)

    def gather() -> torch.Tensor:
        return store_2KSd.index_select(2, slots).view(2, heads, M, keys, size).transpose(1, 2)

    seen = gather()

    def with_backend(backend: SDPBackend, attn_mask: torch.Tensor | None) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query_MKGd, seen[0], seen[1], attn_mask=attn_mask, scale=scale)

    found: dict[str, Callable[[], torch.Tensor]] = {"gather": gather}
    if query_MKGd.is_cuda:
        found["efficient"] = lambda: with_backend(SDPBackend.EFFICIENT_ATTENTION, mask_MGS[:, None])
        found["cudnn"] = lambda: with_backend(SDPBackend.CUDNN_ATTENTION, mask_MGS[:, None])
        found["flash, no mask"] = lambda: with_backend(SDPBackend.FLASH_ATTENTION, None)
    found["math"] = lambda: with_backend(SDPBackend.MATH, mask_MGS[:, None])
    for count in (4, 16, 64):
        if keys // count >= 64:
            found[f"{count} chunks"] = lambda count=count: in_chunks(query_MKGd, seen, mask_MGS, scale, count)
    return found

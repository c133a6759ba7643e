"""Keys and runs of blocks for the tests of the cache. Not a test."""

from collections.abc import Sequence

from exitlm.decode.cache.block_allocator import next_key


def chain_keys(ids: Sequence[int], block_size: int, root: bytes = b"") -> list[bytes]:
    """Keys of the full blocks of ``ids``, behind a block whose key is ``root``."""
    keys: list[bytes] = []
    for end in range(block_size, len(ids) + 1, block_size):
        keys.append(next_key(keys[-1] if keys else root, ids[end - block_size : end]))
    return keys


def runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring numbers merged into (first block, count), in the order of ``blocks``."""
    merged: list[tuple[int, int]] = []
    for block in blocks:
        if merged and block == sum(merged[-1]):
            merged[-1] = merged[-1][0], merged[-1][1] + 1
        else:
            merged.append((block, 1))
    return merged

"""Block sizes of the triton kernels, and into how many programs keys are split."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Block sizes and how a kernel is compiled."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# By bytes of an element and BLOCK_D, smallest tile first; a tile is chosen by the longest run's M. The
# largest 16-bit ones follow FlexAttention's defaults for Hopper (torch/_inductor) and the rule that nothing
# may spill in a loop (README.md has their registers). None is measured by us yet. float32 has no matrix unit.
FORWARD = {
    (2, 64): (Config(16, 64, 4, 3), Config(64, 64, 4, 3), Config(128, 64, 4, 3)),
    (2, 128): (Config(16, 64, 4, 3), Config(64, 64, 4, 3), Config(128, 64, 8, 3)),
    (2, 256): (Config(16, 32, 4, 3), Config(64, 32, 8, 3), Config(128, 32, 8, 2)),
    (4, 64): (Config(16, 32, 4, 1), Config(64, 32, 8, 1)),
    (4, 128): (Config(16, 32, 8, 1),),
    (4, 256): (Config(16, 16, 8, 1),),
}
BACKWARD_QUERIES = {
    (2, 64): Config(64, 64, 4, 2), (2, 128): Config(64, 64, 8, 2), (2, 256): Config(32, 32, 4, 1),
    (4, 64): Config(32, 32, 8, 1), (4, 128): Config(16, 16, 8, 1), (4, 256): Config(16, 16, 8, 1),
}  # fmt: skip
BACKWARD_KEYS = {
    (2, 64): Config(64, 64, 8, 2), (2, 128): Config(32, 64, 8, 2), (2, 256): Config(32, 32, 8, 1),
    (4, 64): Config(16, 32, 4, 1), (4, 128): Config(16, 16, 4, 1), (4, 256): Config(16, 16, 4, 1),
}  # fmt: skip
INTERPRETED = Config(16, 16, 1, 1)  # small, so that small cases have many tiles and blocks
COMBINE_WARPS = 8
MOST_SPLITS = 16


def split_count(programs: int, blocks: int, processors: int) -> int:
    """Into how many programs to split a tile's keys, `blocks` for the longest: the power of two that ends
    first if a program costs its blocks and two more, and to combine costs two."""

    def cost(splits: int) -> int:
        waves = -(-programs * splits // processors)
        return waves * (-(-blocks // splits) + 2) + (2 if splits > 1 else 0)

    options = [2**i for i in range(MOST_SPLITS.bit_length()) if 2**i <= max(1, blocks)]
    return min(options, key=cost)


def forward_config(dtype: torch.dtype, width: int, m: int, device: torch.device) -> Config:
    """For runs of at most `m` queries of a key head."""
    if device.type == "cpu":
        return INTERPRETED
    options = FORWARD[dtype.itemsize, max(64, block_d(width))]
    return next((c for c in options if m <= c.block_m), options[-1])


def backward_configs(dtype: torch.dtype, width: int, device: torch.device) -> tuple[Config, Config]:
    """Of the pass over queries and of that over keys."""
    if device.type == "cpu":
        return INTERPRETED, INTERPRETED
    key = dtype.itemsize, max(64, block_d(width))
    return BACKWARD_QUERIES[key], BACKWARD_KEYS[key]


def block_d(width: int) -> int:
    """The power of two, at least 16, that holds `width`."""
    return max(16, 1 << (width - 1).bit_length())

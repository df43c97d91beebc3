"""Rows that say the same about (nearly) the same picture.

Two rows are near-duplicates if all their text is equal and so are their images but for re-encoding or
scaling: the 256 bits of a difference hash (is each cell of a 16 x 16 grid brighter than its left neighbour?)
of the first image differ in at most `MAX_BITS` places, those of the others in none. The earliest row stays.

Pairs are looked for where they can be: bits that differ in at most 15 places agree in one of 16 bands of 16
(pigeonhole), so rows are sorted by text and one band at a time and compared with their neighbours there, all
rows at once. Not found: a pair with more than `NEIGHBOURS` other rows of the same text and band between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from vfl_train.data.rows import Row

GRID = 16
HASH_BYTES = GRID * GRID // 8
MAX_BITS = 15  # scaled and re-encoded scenes of the phantom differ in up to 15, different ones in 29 or more
NEIGHBOURS = 64


def difference_hash(image: Image.Image) -> bytes:
    """32 bytes that small changes of an image hardly change."""
    grey = np.asarray(image.convert("L").resize((GRID + 1, GRID), Image.Resampling.BOX), dtype=np.int16)
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()


def fingerprints(row: Row, images: Sequence[Image.Image]) -> tuple[int, bytes]:
    """(63 bits that stand for the row's text and all images but the first, hash of the first image);
    `images`: its pictures, the frames of its videos among them."""
    hashes = [difference_hash(image) for image in images]
    digest = hashlib.blake2b(digest_size=8)
    for message in row.messages:
        digest.update(f"{message.role}\0{message.text.strip()}\0".encode("utf-8", "surrogatepass"))
    for other in hashes[1:]:
        digest.update(other)
    digest.update(bytes([min(len(hashes), 255)]))
    if row.videos:
        digest.update(repr([len(frames) for frames in row.videos]).encode("ascii"))
    key = int.from_bytes(digest.digest(), "big") >> 1
    return key, hashes[0] if hashes else bytes(HASH_BYTES)


def first_alike(text: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """The position of the earliest near-duplicate of each row, its own where it has none.

    Args:
        text: [n] integers, equal where the text is.
        hashes: [n, 32] uint8.
    """
    first = np.arange(len(text))
    bands = np.ascontiguousarray(hashes).view(np.uint16)  # [n, 16]
    words = np.ascontiguousarray(hashes).view(np.uint64)  # [n, 4]
    for band in bands.T:
        order = np.lexsort((first, band, text))
        same = (text[order][1:] == text[order][:-1]) & (band[order][1:] == band[order][:-1])
        depth = _depth(same)  # rows before this one in its run
        for back in range(1, min(NEIGHBOURS, int(depth.max(initial=0))) + 1):
            here = np.flatnonzero(depth >= back)
            a, b = order[here], order[here - back]
            near = np.bitwise_count(words[a] ^ words[b]).sum(axis=1) <= MAX_BITS
            low = np.minimum(a[near], b[near])
            np.minimum.at(first, np.maximum(a[near], b[near]), low)
    while not np.array_equal(first, first[first]):
        first = first[first]
    return first


def _depth(same_as_before: np.ndarray) -> np.ndarray:
    """How many elements of its run stand before each, from whether each but the first continues a run."""
    n = len(same_as_before) + 1
    starts = np.r_[True, ~same_as_before]
    begin = np.maximum.accumulate(np.where(starts, np.arange(n), 0))
    return np.arange(n) - begin

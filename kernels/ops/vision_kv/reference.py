"""The definition, one row at a time: every key a query may see, one softmax over them.

Slow and float64-capable; the other paths are tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def attention(
    q: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    suffix_k: torch.Tensor,
    suffix_v: torch.Tensor,
    row_image: Sequence[int],
    row_source: Sequence[Sequence[int]],
    spans: Sequence[Sequence[tuple[int, int]]],
    row_start: Sequence[int],
    row_lengths: Sequence[int],
    prefix_lengths: Sequence[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [R, Hq, S, D], lse [R, Hq, S]); shapes and meaning as `vision_kv_attention`."""
    groups = q.shape[1] // prefix_k.shape[1]
    out = torch.zeros_like(q)
    lse = torch.zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for row, image in enumerate(row_image):
        for i in range(row_lengths[row]):
            source = row_source[row] if i >= row_start[row] else (image,) * len(row_source[row])
            keys, values = [], []
            for begin, end, bank in _segments(image, source, spans, prefix_lengths[image]):
                keys.append(prefix_k[bank, :, begin:end])
                values.append(prefix_v[bank, :, begin:end])
            keys.append(suffix_k[row, :, : i + 1])
            values.append(suffix_v[row, :, : i + 1])
            k = torch.cat(keys, dim=1).repeat_interleave(groups, dim=0)  # [Hq, keys, D]
            v = torch.cat(values, dim=1).repeat_interleave(groups, dim=0)
            scores = torch.einsum("hd,hkd->hk", q[row, :, i].to(lse.dtype), k.to(lse.dtype)) * scale
            lse[row, :, i] = scores.logsumexp(-1)
            out[row, :, i] = torch.einsum("hk,hkd->hd", scores.softmax(-1).to(v.dtype), v)
    return out, lse


def _segments(
    image: int, source: Sequence[int], spans: Sequence[Sequence[tuple[int, int]]], length: int
) -> list[tuple[int, int, int]]:
    """(start, stop, image it is read from) of what a query sees of the prefix."""
    out, at = [], 0
    order = sorted((k for k, (a, b) in enumerate(spans[image]) if a < b), key=lambda k: spans[image][k])
    for k in order:
        start, stop = spans[image][k]
        out.append((at, start, image))
        if source[k] >= 0:
            out.append((*spans[source[k]][k], source[k]))
        at = stop
    return [*out, (at, length, image)]

"""Attention of text rows over shared image prefixes, each image span attended, dropped, or taken from another
image. `vision_kv_attention` is the one entrance; `reference` and `torch_path` are its implementations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from vfl_train.kernels.vision_kv import reference, torch_path

__all__ = ["vision_kv_attention"]

BACKENDS = ("torch", "reference")
Indices = torch.Tensor | Sequence


def vision_kv_attention(
    q: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    suffix_k: torch.Tensor,
    suffix_v: torch.Tensor,
    *,
    row_image: Indices,
    row_source: Indices,
    spans: Indices,
    row_start: Indices | None = None,
    row_lengths: Indices | None = None,
    prefix_lengths: Indices | None = None,
    scale: float | None = None,
    backend: str | None = None,
    validate: bool | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Rows of text tokens attend their own suffix, causally, and a prefix that holds images.

    Args:
        q: [R, Hq, S, D] queries, after position encoding.
        prefix_k, prefix_v: [N, Hkv, P, D], the prefixes of N images, shared by rows and never copied.
        suffix_k, suffix_v: [R, Hkv, S, D], each row's own keys and values.
        row_image: [R], whose prefix a row reads.
        row_source: [R, K]; per image span -1: dropped; n: read from image n's span of the same index
            (n = row_image: plain attention).
        spans: [N, K, 2], the token ranges [start, stop) of each prefix's K image spans (empty: start = stop).
        row_start: [R], first suffix query that is bound; earlier ones read their own image. [0]
        row_lengths, prefix_lengths: [R], [N], tokens that count, for ragged batches. [all]
        scale: of the scores. [D ** -0.5]
        backend: "torch" or "reference". [torch]
        validate: check the values of the index arguments. [yes on the CPU]

    Returns out [R, Hq, S, D], or (out, log-sum-exp [R, Hq, S]); rows past their length undefined. Gradients
    flow to all tensors on both backends.

    Raises ValueError naming the argument for a wrong shape, dtype, device or index, or a swap of unequal
    spans.
    """
    _check_tensors(q, prefix_k, prefix_v, suffix_k, suffix_v)
    rows, images = q.shape[0], prefix_k.shape[0]
    image = _integers(row_image, "row_image", (rows,))
    count = torch.as_tensor(spans).shape[1] if torch.as_tensor(spans).dim() == 3 else 0
    span_list = [[tuple(s) for s in each] for each in _integers(spans, "spans", (images, count, 2))]
    source = _integers(row_source, "row_source", (rows, count))
    start = [0] * rows if row_start is None else _integers(row_start, "row_start", (rows,))
    lengths = [q.shape[2]] * rows if row_lengths is None else _integers(row_lengths, "row_lengths", (rows,))
    ends = [prefix_k.shape[2]] * images
    if prefix_lengths is not None:
        ends = _integers(prefix_lengths, "prefix_lengths", (images,))
    if validate or (validate is None and q.device.type == "cpu"):
        _check_values(image, source, span_list, start, lengths, ends, q.shape[2], prefix_k.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors = q, prefix_k, prefix_v, suffix_k, suffix_v
    if backend in (None, "torch"):
        out, lse = torch_path.attention(*tensors, image, source, span_list, start, ends, scale)
    elif backend == "reference":
        out, lse = reference.attention(*tensors, image, source, span_list, start, lengths, ends, scale)
    else:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    return (out, lse) if return_lse else out


def _integers(value: Indices, name: str, shape: tuple[int, ...]) -> list:
    """`value` as nested lists of int. Raises ValueError."""
    tensor = torch.as_tensor(value)
    if tensor.numel() and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise ValueError(f"{name} must hold integers, not {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")
    return tensor.tolist()


def _check_tensors(
    q: torch.Tensor, pk: torch.Tensor, pv: torch.Tensor, sk: torch.Tensor, sv: torch.Tensor
) -> None:
    for name, t in (("q", q), ("prefix_k", pk), ("prefix_v", pv), ("suffix_k", sk), ("suffix_v", sv)):
        if t.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, not {t.dim()}")
        if t.dtype != q.dtype or not t.is_floating_point():
            raise ValueError(f"{name} must be of q's floating dtype {q.dtype}, not {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, not {t.device}")
    rows, heads, tokens, width = q.shape
    kv_heads = pk.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, which prefix_k's {kv_heads} do not divide")
    wanted = {"prefix_k": (pk, (*pk.shape[:3], width)), "prefix_v": (pv, (*pk.shape[:3], width))}
    wanted |= {
        "suffix_k": (sk, (rows, kv_heads, tokens, width)),
        "suffix_v": (sv, (rows, kv_heads, tokens, width)),
    }
    for name, (t, shape) in wanted.items():
        if tuple(t.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {list(shape)}, not {list(t.shape)}")


def _check_values(
    image: list[int],
    source: list[list[int]],
    spans: list[list[tuple[int, int]]],
    start: list[int],
    lengths: list[int],
    ends: list[int],
    tokens: int,
    prefix: int,
) -> None:
    def inside(name: str, values: list[int], low: int, high: int) -> None:
        for v in values:
            if not low <= v <= high:
                raise ValueError(f"{name} holds {v}, outside {low}..{high}")

    inside("row_image", image, 0, len(spans) - 1)
    inside("prefix_lengths", ends, 0, prefix)
    inside("row_lengths", lengths, 0, tokens)
    inside("row_start", start, 0, tokens)
    for n, each in enumerate(spans):
        for a, b in each:
            if not 0 <= a <= b <= ends[n]:
                raise ValueError(
                    f"spans holds [{a}, {b}) for image {n}, outside its prefix of {ends[n]} tokens"
                )
        full = sorted((a, b) for a, b in each if a < b)
        if any(b > c for (_, b), (c, _) in pairwise(full)):
            raise ValueError(f"spans of image {n} overlap")
    for n, each in zip(image, source, strict=True):
        inside("row_source", each, -1, len(spans) - 1)
        for k, s in enumerate(each):
            if s >= 0 and _width(spans[s][k]) != _width(spans[n][k]):
                raise ValueError(
                    f"spans {k} of images {n} and {s} have unequal lengths: row_source cannot swap them"
                )


def _width(span: tuple[int, int]) -> int:
    return span[1] - span[0]

"""What `vision_kv_attention` is given: shapes and types checked, index arguments read into `Rows`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from numbers import Real
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

Indices = torch.Tensor | Sequence
Span = tuple[int, int]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Values of index tensors on a device, by tensor: reading them again would wait for the device.
_read: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Rows(NamedTuple):
    """The values of all index arguments: hashable, so that what follows from them is worked out once."""

    image: tuple[int, ...]  # [R]
    source: tuple[tuple[int, ...], ...]  # [R, K]
    spans: tuple[tuple[Span, ...], ...]  # [N, K]
    start: tuple[int, ...]  # [R]
    lengths: tuple[int, ...]  # [R]
    ends: tuple[int, ...]  # [N], the prefixes' lengths
    tokens: int  # S
    prefix: int  # P


def read_rows(
    q: torch.Tensor,
    prefix_k: torch.Tensor,
    row_image: Indices,
    row_source: Indices,
    spans: Indices,
    row_start: Indices | None,
    row_lengths: Indices | None,
    prefix_lengths: Indices | None,
) -> Rows:
    """Raises ValueError naming the argument for a wrong shape or dtype; values are not looked at."""
    rows, images, tokens, prefix = q.shape[0], prefix_k.shape[0], q.shape[2], prefix_k.shape[2]
    known = _tensor(spans, "spans")
    count = known.shape[1] if known.dim() == 3 else 0
    span_values = _integers(spans, "spans", (images, count, 2))  # first: K is theirs
    return Rows(
        image=_integers(row_image, "row_image", (rows,)),
        source=_integers(row_source, "row_source", (rows, count)),
        spans=span_values,
        start=(0,) * rows if row_start is None else _integers(row_start, "row_start", (rows,)),
        lengths=(tokens,) * rows if row_lengths is None else _integers(row_lengths, "row_lengths", (rows,)),
        ends=(prefix,) * images
        if prefix_lengths is None
        else _integers(prefix_lengths, "prefix_lengths", (images,)),
        tokens=tokens,
        prefix=prefix,
    )


def _integers(value: Indices, name: str, shape: tuple[int, ...]) -> tuple:
    """`value` as nested tuples of int. Raises ValueError."""
    tensor = _tensor(value, name)
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise ValueError(f"{name} must hold integers, not {tensor.dtype}")
    if not torch.is_tensor(value) and 0 in shape and tuple(tensor.shape) == shape[: tensor.dim()]:
        tensor = tensor.reshape(shape)  # empty lists do not tell: [] is [0, K], [[]] is [1, 0, 2]
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")
    if tensor.device.type == "cpu":
        return _tuples(tensor.tolist(), len(shape))
    known = _read.get(tensor)
    # Inference tensors have no version, so a change in them would not be noticed.
    version = -1 if tensor.is_inference() else tensor._version
    if known is not None and known[0] == version != -1:
        return known[1]
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(f"{name} is on the device and has not been read: call once before capturing a graph")
    values = _tuples(tensor.tolist(), len(shape))
    _read[tensor] = version, values
    return values


def _tensor(value: Indices, name: str) -> torch.Tensor:
    """`value` itself if it is a tensor. Raises ValueError."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise ValueError(f"{name} must be a tensor or (nested) lists of integers: {e}") from e


def _tuples(nested: list, depth: int) -> tuple:
    """Lists in lists, `depth` levels, as tuples."""
    if depth == 1:
        return tuple(nested)
    if depth == 2:
        return tuple(map(tuple, nested))
    return tuple(_tuples(each, depth - 1) for each in nested)


def check_tensors(
    q: torch.Tensor, pk: torch.Tensor, pv: torch.Tensor, sk: torch.Tensor, sv: torch.Tensor
) -> None:
    """Raises ValueError naming the tensor whose shape, dtype or device does not fit."""
    for name, t in (("q", q), ("prefix_k", pk), ("prefix_v", pv), ("suffix_k", sk), ("suffix_v", sv)):
        if not torch.is_tensor(t):
            raise ValueError(f"{name} must be a tensor, not {type(t).__name__}")
        if t.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, not {t.dim()}")
        if t.dtype != q.dtype or t.dtype not in DTYPES:
            raise ValueError(f"{name} must be of q's floating dtype {q.dtype}, not {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, not {t.device}")
    rows, heads, tokens, width = q.shape
    kv_heads = pk.shape[1]
    if not heads or not width:
        raise ValueError(f"q must have heads of some width, not {heads} of {width}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, which prefix_k's {kv_heads} do not divide")
    wanted = {
        "prefix_k": (pk, (*pk.shape[:3], width)),
        "prefix_v": (pv, (*pk.shape[:3], width)),
        "suffix_k": (sk, (rows, kv_heads, tokens, width)),
        "suffix_v": (sv, (rows, kv_heads, tokens, width)),
    }
    for name, (t, shape) in wanted.items():
        if tuple(t.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {list(shape)}, not {list(t.shape)}")


def check_scale(scale: float) -> float:
    """`scale` as a float. Raises ValueError unless it is a finite number."""
    if not isinstance(scale, Real) or isinstance(scale, bool) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, not {scale!r}")
    return float(scale)


@lru_cache(maxsize=256)
def check_values(rows: Rows) -> None:
    """Raises ValueError naming the argument; what has passed once is not looked at again."""
    _inside("row_image", rows.image, 0, len(rows.spans) - 1)
    _inside("prefix_lengths", rows.ends, 0, rows.prefix)
    _inside("row_lengths", rows.lengths, 0, rows.tokens)
    _inside("row_start", rows.start, 0, rows.tokens)
    for n, each in enumerate(rows.spans):
        for a, b in each:
            if not 0 <= a <= b <= rows.ends[n]:
                raise ValueError(
                    f"spans holds [{a}, {b}) for image {n}, outside its prefix of {rows.ends[n]} tokens"
                )
        full = sorted((a, b) for a, b in each if a < b)
        if any(b > c for (_, b), (c, _) in pairwise(full)):
            raise ValueError(f"spans of image {n} overlap")
    for n, source in zip(rows.image, rows.source, strict=True):
        _inside("row_source", source, -1, len(rows.spans) - 1)
        for k, s in enumerate(source):
            if s >= 0 and _width(rows.spans[s][k]) != _width(rows.spans[n][k]):
                raise ValueError(
                    f"spans {k} of images {n} and {s} have unequal lengths: row_source cannot swap them"
                )


def _inside(name: str, values: Sequence[int], low: int, high: int) -> None:
    for v in values:
        if not low <= v <= high:
            raise ValueError(f"{name} holds {v}, outside {low}..{high}")


def _width(span: Span) -> int:
    return span[1] - span[0]

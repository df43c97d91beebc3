"""Attention of text rows over shared image prefixes, each image span attended, dropped, or taken from another
image. `vision_kv_attention` is the one entrance; `reference`, `torch_path` and `triton_path` implement it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from vfl_train.kernels.vision_kv import reference, torch_path, triton_path
from vfl_train.kernels.vision_kv.arguments import (
    Indices,
    check_scale,
    check_tensors,
    check_values,
    read_rows,
)

__all__ = ["vision_kv_attention"]

BACKENDS = ("triton", "torch", "reference")


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
        scale: of the scores, a finite number. [D ** -0.5]
        backend: "triton" (CUDA; on the CPU in triton's interpreter only), "torch" or "reference".
            [triton on CUDA where it is installed and takes q's dtype and width; else torch]
        validate: check the values of the index arguments. [yes; values that have passed are not checked
            again, so that on CUDA a plan is checked once] Without, results of bad values are undefined:
            memory outside of the tensors may be read.
        The index arguments may be lists or integer tensors anywhere. Tensors on the device are read once
        (again if changed in place), which waits for the device; lists never do. While a CUDA graph is
        captured nothing is read: the same call must have run before, and replays keep its values.

    Returns out [R, Hq, S, D], or (out, log-sum-exp [R, Hq, S]); rows past their length undefined. Gradients
    flow to all five tensors on all backends, from the log-sum-exp too. Under autocast nothing is cast: out is
    of q's dtype.

    Raises ValueError naming the argument for what is no tensor, list of integers or number where one belongs,
    a wrong shape, dtype, device or index, or a swap of unequal spans; and for a backend that does not take
    the tensors.
    """
    check_tensors(q, prefix_k, prefix_v, suffix_k, suffix_v)
    rows = read_rows(q, prefix_k, row_image, row_source, spans, row_start, row_lengths, prefix_lengths)
    if validate is None or validate:
        check_values(rows)
    scale = q.shape[-1] ** -0.5 if scale is None else check_scale(scale)
    tensors = q, prefix_k, prefix_v, suffix_k, suffix_v
    if backend is None:
        backend = "triton" if q.is_cuda and triton_path.refusal(q) is None else "torch"
    if backend == "triton":
        out, lse = triton_path.attention(*tensors, rows, scale)
    elif backend == "torch":
        with _no_autocast(q):
            out, lse = torch_path.attention(
                *tensors, rows.image, rows.source, rows.spans, rows.start, rows.ends, scale
            )
    elif backend == "reference":
        with _no_autocast(q):
            out, lse = reference.attention(
                *tensors, rows.image, rows.source, rows.spans, rows.start, rows.lengths, rows.ends, scale
            )
    else:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    return (out, lse) if return_lse else out


def _no_autocast(q: torch.Tensor) -> AbstractContextManager:
    """Products in the dtypes that the paths choose: autocast would round scores, and what is returned."""
    on = torch.is_autocast_enabled(q.device.type)
    return torch.autocast(q.device.type, enabled=False) if on else nullcontext()

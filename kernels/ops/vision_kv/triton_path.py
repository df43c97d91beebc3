"""One fused launch on CUDA (and, for tests, on the CPU under TRITON_INTERPRET=1): the tables of `plan` on the
device, and the operator `vfl::vision_kv_attention` with its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

from vfl_train.kernels.vision_kv.arguments import Rows
from vfl_train.kernels.vision_kv.configs import (
    COMBINE_WARPS,
    Config,
    backward_configs,
    block_d,
    forward_config,
    split_count,
)
from vfl_train.kernels.vision_kv.plan import (
    forward_tables,
    make_runs,
    prefix_readers,
    suffix_readers,
)
from vfl_train.kernels.vision_kv.torch_path import rows_contiguous

LOG2E = 1.4426950408889634
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 256


class Plan(NamedTuple):
    """What a launch needs besides the tensors: `tables` are views of `memory`, which was uploaded on `stream`
    up to `ready`. tables: tiles, queries, chunks, keys; for gradients the same again for the pass
    over queries, bounds and readers of prefix and suffix keys."""

    tables: list[torch.Tensor]
    config: list[int]  # block_m, block_n, warps, stages, splits
    memory: torch.Tensor
    stream: int
    ready: torch.cuda.Event | None


# Plans used while a CUDA graph was captured, by their memory. A replay reads that memory whatever the cache
# of plans has dropped, and nobody says when a graph is gone: they stay until the process ends.
_kept: dict[int, Plan] = {}


@cache
def importable() -> bool:
    """Whether triton is installed."""
    return find_spec("triton") is not None


@cache
def _kernels() -> ModuleType:
    """The kernels' module, imported at first use: triton is optional and slow to import."""
    from vfl_train.kernels.vision_kv import triton_kernels

    return triton_kernels


def refusal(q: torch.Tensor) -> str | None:
    """Why this backend does not take `q`, or None."""
    if not importable():
        return "backend 'triton' needs the package triton: pip install triton"
    if q.device.type == "cpu" and not interpreted():
        return (
            "backend 'triton' runs on CPU tensors only in triton's interpreter: set TRITON_INTERPRET=1 "
            "before triton is imported"
        )
    if q.device.type not in ("cpu", "cuda"):
        return f"backend 'triton' runs on CUDA, not on q's device {q.device}"
    if q.device.type == "cuda" and not compiled():
        return "backend 'triton' compiles for CUDA: triton was imported under TRITON_INTERPRET=1, unset it"
    if q.dtype not in DTYPES:
        return f"q must be float32, float16 or bfloat16 for backend 'triton', not {q.dtype}"
    if q.shape[-1] > WIDEST:
        return f"q has heads of {q.shape[-1]}, beyond the {WIDEST} of backend 'triton'"
    return None


def interpreted() -> bool:
    """Whether the kernels run in triton's interpreter."""
    return importable() and _kernels().INTERPRETED


def compiled() -> bool:
    """Whether triton compiles the kernels (neither this nor `interpreted`: it was imported half and half)."""
    return importable() and _kernels().COMPILED


def attention(
    q: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    suffix_k: torch.Tensor,
    suffix_v: torch.Tensor,
    rows: Rows,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [R, Hq, S, D], lse [R, Hq, S] float32); shapes and meaning as `vision_kv_attention`, whose checks
    have passed. Raises ValueError for tensors that this backend does not take and for a plan that would have
    to be made while a graph is captured."""
    if (reason := refusal(q)) is not None:
        raise ValueError(reason)
    tensors = q, prefix_k, prefix_v, suffix_k, suffix_v
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    plan = _plan_for(tensors, rows, gradients)
    if scale <= 0:  # the kernels take the largest score before they scale it
        q, scale = q * scale, 1.0
    return operator(q, prefix_k, prefix_v, suffix_k, suffix_v, plan.tables, plan.config, scale)


# --- the plan ------------------------------------------------------------------------------------


@torch.compiler.disable
def _plan_for(tensors: Sequence[torch.Tensor], rows: Rows, gradients: bool) -> Plan:
    """The plan on the device, safe to read on the current stream."""
    q, prefix_k = tensors[:2]
    heads, kv_heads, width = q.shape[1], prefix_k.shape[1], q.shape[3]
    key = rows, heads // kv_heads, kv_heads, width, q.dtype, q.device, gradients
    if not q.is_cuda:
        return _plan(*key, processors(q.device))
    plan = _plan(*key, processors(q.device))
    if torch.cuda.is_current_stream_capturing():
        _kept[id(plan.memory)] = plan
        return plan  # torch.cuda.graph has waited for the device
    stream = torch.cuda.current_stream(q.device)
    if stream.cuda_stream != plan.stream:
        assert plan.ready is not None
        stream.wait_event(plan.ready)
        plan.memory.record_stream(stream)
    return plan


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a plan serves training later, which saves its tables for backward
def _plan(
    rows: Rows,
    groups: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    gradients: bool,
    processors: int,
) -> Plan:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError("row_image and the other indices are new: call once before capturing a graph")
    runs = make_runs(rows)
    config = forward_config(dtype, width, max((run.size for run in runs), default=0) * groups, device)
    numbers = rows.lengths, rows.tokens, groups
    forward = forward_tables(runs, *numbers, config.block_m, config.block_n)
    arrays = list(forward)
    if gradients:
        by_query, by_key = backward_configs(dtype, width, device)
        again = forward_tables(runs, *numbers, by_query.block_m, by_query.block_n)
        arrays += again
        readers = [
            prefix_readers(runs, len(rows.spans), rows.prefix, groups, by_key.block_n),
            suffix_readers(runs, *numbers, by_key.block_n),
        ]
        arrays += [table for each in readers for table in each]
    blocks = int((forward.chunks[:, 2] + forward.chunks[:, 3]).max(initial=0))
    splits = split_count(len(forward.tiles) * kv_heads, blocks, processors)
    return _upload(arrays, [*config, splits], device)


def _upload(arrays: Sequence[np.ndarray], config: list[int], device: torch.device) -> Plan:
    """All tables in one copy, each at a multiple of 16 bytes: triton compiles for aligned pointers."""
    starts, size = [], 0
    for array in arrays:
        starts.append(size)
        size += -(-array.size // 4) * 4
    host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
    for start, array in zip(starts, arrays, strict=True):
        host[start : start + array.size] = torch.from_numpy(np.ascontiguousarray(array).ravel())
    memory = host.to(device, non_blocking=True)
    tables = [
        memory[start : start + array.size].view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]
    if device.type != "cuda":
        return Plan(tables, config, memory, 0, None)
    stream = torch.cuda.current_stream(device)
    ready = torch.cuda.Event()
    ready.record(stream)
    return Plan(tables, config, memory, stream.cuda_stream, ready)


@cache
def processors(device: torch.device) -> int:
    """Programs that run at the same time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# --- the operator --------------------------------------------------------------------------------


@torch.library.custom_op(
    "vfl::vision_kv_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor prefix_k, Tensor prefix_v, Tensor suffix_k, Tensor suffix_v, Tensor[] tables, "
    "int[] config, float scale) -> (Tensor, Tensor)",
)
def operator(q, prefix_k, prefix_v, suffix_k, suffix_v, tables, config, scale):
    """`attention` with its plan: `tables` and `config` as in `Plan`."""
    tensors = [rows_contiguous(t) for t in (q, prefix_k, prefix_v, suffix_k, suffix_v)]
    q, kv_heads = tensors[0], prefix_k.shape[1]
    _, heads, tokens, width = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    block_m, block_n, warps, stages, splits = config
    tiles, queries, chunks, keys = tables[:4]
    if not len(tiles):
        return out, lse
    m = len(queries) * (heads // kv_heads)
    shares = (splits, kv_heads, m) if splits > 1 else (0,)
    part = torch.empty(*shares, width, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(shares, dtype=torch.float32, device=q.device)
    shape = {"G": heads // kv_heads, "D": width, "BLOCK_M": block_m, "BLOCK_D": block_d(width)}
    kernels = _kernels()
    with _device_of(q):
        kernels.forward[(len(tiles), kv_heads, splits)](
            *tensors, out, lse, part, part_lse, tiles, queries, chunks, keys,
            *(s for t in (*tensors, out) for s in t.stride()[:3]), heads, tokens, m, scale * LOG2E, splits,
            **shape, BLOCK_N=block_n, SPLIT=splits > 1, UPCAST=_upcast(q), **_compiled(warps, stages),
        )  # fmt: skip
        if splits > 1:
            kernels.combine[(len(tiles), kv_heads)](
                out, lse, part, part_lse, tiles, queries, *out.stride()[:3], heads, tokens, m, splits,
                **shape, **_compiled(COMBINE_WARPS, 1),
            )  # fmt: skip
    return out, lse


@operator.register_fake
def _(q, prefix_k, prefix_v, suffix_k, suffix_v, tables, config, scale):
    return torch.empty_like(rows_contiguous(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "vfl::vision_kv_attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor delta, Tensor q, Tensor prefix_k, Tensor prefix_v, Tensor suffix_k, "
    "Tensor suffix_v, Tensor lse, Tensor[] tables, float scale, bool prefix) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_operator(dout, delta, q, prefix_k, prefix_v, suffix_k, suffix_v, lse, tables, scale, prefix):
    """Gradients of q and the four others; without `prefix`, those of the prefixes are empty."""
    dout = rows_contiguous(dout)
    tensors = [rows_contiguous(t) for t in (q, prefix_k, prefix_v, suffix_k, suffix_v)]
    dq, dpk, dpv, dsk, dsv = _empty_gradients(tensors, prefix)
    q = tensors[0]
    heads, tokens, width = q.shape[1:]
    kv_heads = suffix_k.shape[1]
    _, _, _, _, tiles, queries, chunks, keys, *readers = tables
    by_query, by_key = backward_configs(q.dtype, width, q.device)
    common = {"G": heads // kv_heads, "D": width, "BLOCK_D": block_d(width), "UPCAST": _upcast(q)}
    numbers = heads, tokens
    kernels = _kernels()
    with _device_of(q):
        if len(tiles):
            kernels.backward_queries[(len(tiles), kv_heads)](
                *tensors, dout, lse, delta, dq, tiles, queries, chunks, keys,
                *(s for t in (*tensors, dout, dq) for s in t.stride()[:3]), *numbers, scale * LOG2E, scale,
                **common, **_blocks(by_query),
            )  # fmt: skip
        for k, v, dk, dv, (bounds, each), causal in (
            (*tensors[3:], dsk, dsv, readers[2:], True),
            (*tensors[1:3], dpk, dpv, readers[:2], False),
        ):
            if len(bounds) > 1 and dk.numel():
                kernels.backward_keys[(len(bounds) - 1, kv_heads)](
                    q, k, v, dout, lse, delta, dk, dv, queries, bounds, each,
                    *(s for t in (q, k, v, dout, dk, dv) for s in t.stride()[:3]), *numbers, k.shape[2],
                    scale * LOG2E, scale, CAUSAL=causal, **common, **_blocks(by_key),
                )  # fmt: skip
    return dq, dpk, dpv, dsk, dsv


@backward_operator.register_fake
def _(dout, delta, q, prefix_k, prefix_v, suffix_k, suffix_v, lse, tables, scale, prefix):
    tensors = [rows_contiguous(t) for t in (q, prefix_k, prefix_v, suffix_k, suffix_v)]
    return _empty_gradients(tensors, prefix)


def _empty_gradients(tensors: Sequence[torch.Tensor], prefix: bool) -> tuple[torch.Tensor, ...]:
    """dq begins at zero: queries beyond a row's length are in no tile."""
    q, prefix_k, prefix_v, suffix_k, suffix_v = tensors
    prefixes = [torch.empty_like(t) if prefix else t.new_empty(0) for t in (prefix_k, prefix_v)]
    return torch.zeros_like(q), *prefixes, torch.empty_like(suffix_k), torch.empty_like(suffix_v)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, tables, _, scale = inputs
    ctx.save_for_backward(*tensors, *output, *tables)
    ctx.scale = scale


def _backward(ctx, dout, dlse):
    *tensors, out, lse = ctx.saved_tensors[:7]
    tables = ctx.saved_tensors[7:]
    delta = ((dout.float() * out.float()).sum(-1) - dlse).contiguous()
    prefix = any(ctx.needs_input_grad[1:3])
    grads = backward_operator(dout, delta, *tensors, lse, tables, ctx.scale, prefix)
    wanted = [g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)]
    return *wanted, [None] * len(tables), None, None


operator.register_autograd(_backward, setup_context=_setup_context)


def _upcast(q: torch.Tensor) -> bool:
    return q.dtype == torch.bfloat16 and interpreted()


def _compiled(warps: int, stages: int) -> dict[str, int | bool]:
    """How triton compiles; products and sums are fused by default up to triton 3.9 only."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _blocks(config: Config) -> dict[str, int | bool]:
    return {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, **_compiled(config.warps, config.stages)
    }  # fmt: skip


def _device_of(q: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(q.device) if q.is_cuda else nullcontext()

"""Ways to compute `vision_kv_attention`, for scripts/bench_kernel.py.

Every way gets the tensors as models hold them, [rows, tokens, heads, width] in memory, and may prepare once,
untimed: keys where its kernel wants them, masks, block masks. What every layer asks of it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from vfl_train.kernels import vision_kv_attention

Run = Callable[[], torch.Tensor]
WORKLOADS = ("plain", "sweep", "dropped", "swapped")


@dataclass(frozen=True)
class Shape:
    """`images` prefixes of `prefix` tokens that end with `vision` image tokens, each read by `rows` rows of
    `tokens` tokens; `heads` query heads, `kv_heads` key heads of `width`."""

    images: int
    rows: int
    tokens: int
    prefix: int
    vision: int
    heads: int
    kv_heads: int
    width: int

    @property
    def flops(self) -> float:
        """Of the two products over what a plain row sees."""
        keys = self.prefix + self.tokens / 2
        return 4 * self.images * self.rows * self.tokens * keys * self.heads * self.width

    def bytes(self, itemsize: int = 2) -> int:
        """Queries, output and all keys and values, once."""
        rows = self.images * self.rows * self.tokens
        keys = rows + self.images * self.prefix
        return itemsize * self.width * 2 * (rows * self.heads + keys * self.kv_heads)

    def replicated_bytes(self, itemsize: int = 2) -> int:
        """Keys and values with a copy of its prefix for each row."""
        keys = self.images * self.rows * (self.prefix + self.tokens)
        return itemsize * self.width * 2 * keys * self.kv_heads

    def dropped(self, workload: str) -> list[bool]:
        """For the rows of an image: whether its image tokens are not read."""
        return [workload == "dropped" or (workload == "sweep" and row == 0) for row in range(self.rows)]

    def indices(self, workload: str) -> dict[str, Any]:
        """The index arguments of `vision_kv_attention`. plain: all rows read their image. sweep: the first
        of each image's rows drops it, as where it branches. dropped: all do. swapped: all read the next."""
        image = [n for n in range(self.images) for _ in range(self.rows)]
        dropped = self.dropped(workload) * self.images
        donor = 1 if workload == "swapped" else 0
        source = [[-1 if drop else (n + donor) % self.images] for n, drop in zip(image, dropped, strict=True)]
        spans = [[(self.prefix - self.vision, self.prefix)]] * self.images
        return {"row_image": image, "row_source": source, "spans": spans}


@dataclass(frozen=True)
class Inputs:
    """q [rows, Hq, S, D]; prefix_k, prefix_v [images, Hkv, P, D]; suffix_k, suffix_v [rows, Hkv, S, D]."""

    q: torch.Tensor
    prefix_k: torch.Tensor
    prefix_v: torch.Tensor
    suffix_k: torch.Tensor
    suffix_v: torch.Tensor

    def all(self) -> tuple[torch.Tensor, ...]:
        """In the order of the arguments."""
        return self.q, self.prefix_k, self.prefix_v, self.suffix_k, self.suffix_v


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Random tensors."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(batch: int, tokens: int, heads: int) -> torch.Tensor:
        size = batch, tokens, heads, shape.width
        return torch.randn(size, generator=g, device=device).to(dtype).transpose(1, 2)

    rows = shape.images * shape.rows
    return Inputs(
        normal(rows, shape.tokens, shape.heads),
        *(normal(shape.images, shape.prefix, shape.kv_heads) for _ in "kv"),
        *(normal(rows, shape.tokens, shape.kv_heads) for _ in "kv"),
    )


def exact(shape: Shape, inputs: Inputs, workload: str) -> torch.Tensor:
    """The result in float64, [rows, Hq, S, D], image by image; written apart from the code under test."""
    groups, out = shape.heads // shape.kv_heads, []
    text = shape.prefix - shape.vision
    for n in range(shape.images):
        rows = slice(n * shape.rows, (n + 1) * shape.rows)
        donor = (n + 1) % shape.images if workload == "swapped" else n
        keys, values = (
            torch.cat([own[n, :, :text], own[donor, :, text:]], dim=1).double()
            for own in (inputs.prefix_k, inputs.prefix_v)
        )
        q = inputs.q[rows].double().unflatten(1, (shape.kv_heads, groups))
        before = torch.einsum("rhgsd,hpd->rhgsp", q, keys)
        hidden = torch.tensor(shape.dropped(workload), device=q.device)
        before[hidden, ..., text:] = -torch.inf
        own = torch.einsum("rhgsd,rhtd->rhgst", q, inputs.suffix_k[rows].double())
        later = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool, device=q.device).triu(1)
        scores = torch.cat([before, own.masked_fill(later, -torch.inf)], dim=-1) * shape.width**-0.5
        weights = scores.softmax(-1)
        mixed = torch.einsum("rhgsp,hpd->rhgsd", weights[..., : shape.prefix], values)
        mixed += torch.einsum(
            "rhgst,rhtd->rhgsd", weights[..., shape.prefix :], inputs.suffix_v[rows].double()
        )
        out.append(mixed.flatten(1, 2))
    return torch.cat(out)


# --- ours ------------------------------------------------------------------------------------------


def ours(backend: str, shape: Shape, inputs: Inputs, workload: str) -> Run:
    """The operator as the engine calls it, but for checks of values."""
    indices = shape.indices(workload)

    def run() -> torch.Tensor:
        out = vision_kv_attention(*inputs.all(), **indices, backend=backend, validate=False)
        assert isinstance(out, torch.Tensor)
        return out

    return run


# --- a copy of the prefix for each row, as transformers' cache holds it, and a mask -----------------------


def masked(backend: SDPBackend | None, shape: Shape, inputs: Inputs, workload: str) -> Run:
    """transformers' sdpa path: `repeat_kv`, then scaled_dot_product_attention with a mask; with `backend`
    None by PyTorch's own choice of kernel. The copy of the prefix for each row is not timed."""
    groups = shape.heads // shape.kv_heads
    k, v = (
        torch.cat([prefix.repeat_interleave(shape.rows, 0), suffix], dim=2)
        for prefix, suffix in ((inputs.prefix_k, inputs.suffix_k), (inputs.prefix_v, inputs.suffix_v))
    )
    total = shape.prefix + shape.tokens
    visible = torch.ones(shape.tokens, total, dtype=torch.bool, device=k.device).tril(shape.prefix)
    mask = visible.repeat(len(k), 1, 1, 1)
    dropped = torch.tensor(shape.dropped(workload) * shape.images, device=k.device)
    mask[dropped, ..., shape.prefix - shape.vision : shape.prefix] = False

    def repeat_kv(t: torch.Tensor) -> torch.Tensor:
        batch, heads, keys, width = t.shape
        return t[:, :, None].expand(batch, heads, groups, keys, width).reshape(batch, -1, keys, width)

    def run() -> torch.Tensor:
        return scaled_dot_product_attention(inputs.q, repeat_kv(k), repeat_kv(v), attn_mask=mask)

    if backend is None:
        return run

    def pinned() -> torch.Tensor:
        with sdpa_kernel(backend):
            return run()

    return pinned


# --- two calls and a merge: Hydragen in PyTorch ----------------------------------------------------------


def partial_attention(
    kind: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, log-sum-exp [B, H, M]) of one fused kernel of PyTorch; those on CUDA take fewer key heads."""
    aten = torch.ops.aten
    if kind == "cpu":
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    if kind == "cudnn":
        found = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
    else:
        found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return found[0], found[1].reshape(q.shape[:3])


def merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Attention over both sets of keys."""
    share = torch.sigmoid(other_lse - lse)[..., None]
    return torch.lerp(out.float(), other.float(), share).to(out.dtype)


def two_calls(kind: str, packed: bool, shape: Shape, inputs: Inputs, workload: str) -> Run:
    """All rows of an image against its prefix in one call, each row's suffix in another, merged by a compiled
    function. For plain rows alone: what a sweep needs beyond that is left to it for nothing. `packed`: the
    query heads of a key head are made one dimension first, a copy of q that gives the kernel fuller tiles."""
    assert workload == "plain"
    combine = torch.compile(merge, dynamic=False) if inputs.q.is_cuda else merge
    size = shape.images, shape.rows * shape.tokens, shape.heads, shape.width
    together = inputs.q.transpose(1, 2).view(size).transpose(1, 2)  # a view: an image's rows are neighbours
    groups, kv_heads = shape.heads // shape.kv_heads, shape.kv_heads
    grid = shape.images, kv_heads, groups, shape.rows, shape.tokens

    def run() -> torch.Tensor:
        own, own_lse = (
            t.unflatten(1, (kv_heads, groups)).unflatten(0, (shape.images, shape.rows))
            for t in partial_attention(kind, inputs.q, inputs.suffix_k, inputs.suffix_v, causal=True)
        )
        q = together.reshape(shape.images, kv_heads, -1, shape.width) if packed else together
        out, lse = partial_attention(kind, q, inputs.prefix_k, inputs.prefix_v, causal=False)
        out = out.view(*grid, shape.width).permute(0, 3, 1, 2, 4, 5)
        return combine(own, own_lse, out, lse.view(grid).permute(0, 3, 1, 2, 4)).reshape(inputs.q.shape)

    return run


# --- FlexAttention ---------------------------------------------------------------------------------------


# Each shape and option is compiled anew; beyond the default limit FlexAttention would fall back, silently.
torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000


@cache
def _compiled_flex(mode: str | None) -> Callable:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True, mode=mode)


def _flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, options: dict, tune: bool
) -> torch.Tensor:
    """Compiled on CUDA, where `tune` lets the compiler measure its configurations; as defined on a CPU."""
    call = _compiled_flex("max-autotune-no-cudagraphs" if tune else None) if q.is_cuda else flex_attention
    return call(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options or None)


@cache
def flattened_mask(shape: Shape, workload: str, device: torch.device) -> BlockMask:
    """The same for all images."""
    tokens, prefix, text = shape.tokens, shape.prefix, shape.prefix - shape.vision
    dropped = torch.tensor(shape.dropped(workload), device=device)

    def visible(b, h, i, j):
        inside = (j < text) | ((j < prefix) & ~dropped[i // tokens])
        own = j - prefix
        return inside | ((own >= 0) & (own // tokens == i // tokens) & (own <= i))

    length, compiled = shape.rows * tokens, device.type == "cuda"
    return create_block_mask(visible, None, None, length, prefix + length, device, _compile=compiled)


def flex_flattened(options: dict, tune: bool, shape: Shape, inputs: Inputs, workload: str) -> Run:
    """The rows of an image as one sequence, keys [prefix, all suffixes]: no copy for a row, full query
    blocks."""
    mask = flattened_mask(shape, workload, inputs.q.device)
    size = shape.images, shape.rows * shape.tokens

    def together(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(1, 2).reshape(*size, -1, shape.width).transpose(1, 2)

    k, v = (
        torch.cat([p, together(s)], dim=2)
        for p, s in ((inputs.prefix_k, inputs.suffix_k), (inputs.prefix_v, inputs.suffix_v))
    )
    q = together(inputs.q)

    def run() -> torch.Tensor:
        out = _flex(q, k, v, mask, options, tune)
        by_row = len(inputs.q), shape.tokens, shape.heads, shape.width
        return out.transpose(1, 2).reshape(by_row).transpose(1, 2)

    return run


@cache
def by_row_mask(shape: Shape, workload: str, device: torch.device) -> BlockMask:
    """One for each row."""
    tokens, prefix, rows = shape.tokens, shape.prefix, shape.rows
    text, banks, count = prefix - shape.vision, shape.images * prefix, shape.images * rows
    dropped = torch.tensor(shape.dropped(workload), device=device)

    def visible(b, h, i, j):
        inside = (j % prefix < text) | ~dropped[b % rows]
        own = j - banks - b * tokens
        return ((j < banks) & (j // prefix == b // rows) & inside) | ((own >= 0) & (own <= i))

    keys, compiled = banks + count * tokens, device.type == "cuda"
    return create_block_mask(visible, count, None, tokens, keys, device, _compile=compiled)


def flex_by_row(options: dict, tune: bool, shape: Shape, inputs: Inputs, workload: str) -> Run:
    """A batch of rows over one shared sequence of keys, [all prefixes, all suffixes]: no copy either."""
    mask = by_row_mask(shape, workload, inputs.q.device)
    k, v = (
        torch.cat([t.transpose(0, 1).flatten(1, 2) for t in pair], dim=1)[None]
        for pair in ((inputs.prefix_k, inputs.suffix_k), (inputs.prefix_v, inputs.suffix_v))
    )
    if not inputs.q.is_cuda:  # the definition on the CPU does not broadcast
        k, v = (t.expand(len(inputs.q), -1, -1, -1) for t in (k, v))
    return partial(_flex, inputs.q, k, v, mask, options, tune)

"""Plain torch, no copy of the prefix: one partial attention per stretch of keys, merged by their
log-sum-exp (as Hydragen, arXiv 2402.05099, merges a shared prefix with each row's own suffix).

All rows that read the same stretch of their image run as one product: rows, query tokens and the query heads
of a key head are packed into one dimension. Rows whose image spans are where they belong read the
whole prefix in one stretch; a dropped span is not read at all, a swapped one is read from its donor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

Stretch = tuple[int, int]


@dataclass
class Job:
    """Rows that read prefix keys [start, stop), by the image they read them from."""

    start: int
    stop: int
    rows: dict[int, list[int]] = field(default_factory=dict)


def attention(
    q: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    suffix_k: torch.Tensor,
    suffix_v: torch.Tensor,
    row_image: Sequence[int],
    row_source: Sequence[Sequence[int]],
    spans: Sequence[Sequence[Stretch]],
    row_start: Sequence[int],
    prefix_lengths: Sequence[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [R, Hq, S, D], lse [R, Hq, S]); shapes and meaning as `vision_kv_attention`."""
    groups = q.shape[1] // prefix_k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (suffix_k, suffix_v))
    out, lse = attend(q, k, v, scale, causal=True)
    if out.requires_grad:
        out, lse = out.clone(), lse.clone()  # written to below; the backward needs the originals
    touched = [
        r for r, n in enumerate(row_image)
        if any(s != n and a < b for s, (a, b) in zip(row_source[r], spans[n], strict=True))
    ]  # fmt: skip
    edited = set(touched)
    plain = [r for r in range(len(row_image)) if r not in edited]
    rows = [r for r in touched if row_start[r] > 0]  # their first queries read their own image
    jobs = _plain_jobs(plain, row_image, prefix_lengths)
    jobs += _touched_jobs(touched, row_image, row_source, spans, prefix_lengths)
    before = out[rows], lse[rows]
    for job in jobs:
        _merge_job(job, q, prefix_k, prefix_v, prefix_lengths, scale, out, lse)
    if rows:
        own, own_lse = before
        (job,) = _plain_jobs(range(len(rows)), [row_image[r] for r in rows], prefix_lengths)
        _merge_job(job, q[rows], prefix_k, prefix_v, prefix_lengths, scale, own, own_lse)
        start = torch.tensor([row_start[r] for r in rows], device=q.device)
        unbound = torch.arange(q.shape[2], device=q.device) < start[:, None]  # [rows, S]
        out[rows] = torch.where(unbound[:, None, :, None], own, out[rows])
        lse[rows] = torch.where(unbound[:, None], own_lse, lse[rows])
    return out, lse


def _plain_jobs(rows: Sequence[int], row_image: Sequence[int], lengths: Sequence[int]) -> list[Job]:
    """Whole prefixes; one job, padded to the longest (its keys beyond a row's prefix are masked). Rows
    without a prefix read none: a softmax over masked keys alone is not nothing."""
    job = Job(0, max((lengths[row_image[r]] for r in rows), default=0))
    for r in rows:
        if lengths[row_image[r]]:
            job.rows.setdefault(row_image[r], []).append(r)
    return [job]


def _touched_jobs(
    rows: Sequence[int],
    row_image: Sequence[int],
    row_source: Sequence[Sequence[int]],
    spans: Sequence[Sequence[Stretch]],
    lengths: Sequence[int],
) -> list[Job]:
    """What touched rows still see of their prefix and what they see of others', stretch by stretch."""
    jobs: dict[tuple[int, Stretch], Job] = {}
    for r in rows:
        image, at, mine = row_image[r], 0, []
        for k in sorted(range(len(spans[image])), key=lambda k: spans[image][k]):
            (start, stop), source = spans[image][k], row_source[r][k]
            if start == stop or source == image:
                continue
            mine.append((image, (at, start)))
            if source >= 0:
                mine.append((source, spans[source][k]))
            at = stop
        mine.append((image, (at, lengths[image])))
        for number, (bank, stretch) in enumerate(mine):  # numbered: a job holds a row once
            if stretch[0] < stretch[1]:
                job = jobs.setdefault((number, stretch), Job(*stretch))
                job.rows.setdefault(bank, []).append(r)
    return list(jobs.values())


def _merge_job(
    job: Job,
    q: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Add what the job's rows read to `out` and `lse`, in place."""
    if job.start >= job.stop:
        return
    for images in _runs(sorted(job.rows)):
        keys = slice(images[0], images[-1] + 1), slice(None), slice(job.start, job.stop)
        k, v = prefix_k[keys], prefix_v[keys]  # views: a run of neighbouring images
        most = max(len(job.rows[n]) for n in images)
        # Images with fewer rows repeat one; what it reads is thrown away.
        padded = [(job.rows[n] + job.rows[n][:1] * most)[:most] for n in images]
        index = torch.tensor(padded, device=q.device).flatten()
        bias = _length_bias([lengths[n] for n in images], job, q)
        part, part_lse = _read(q[index], k, v, most, scale, bias)
        if sum(len(job.rows[n]) for n in images) < len(index):
            real = [i * most + j for i, n in enumerate(images) for j in range(len(job.rows[n]))]
            keep = torch.tensor(real, device=q.device)
            index, part, part_lse = index[keep], part[keep], part_lse[keep]
        out[index], lse[index] = merge(out[index], lse[index], part, part_lse)


def _read(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, most: int, scale: float, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [N * most, Hq, S, D], `most` rows an image, against k, v [N, Hkv, keys, D]."""
    _, heads, tokens, width = q.shape
    images, kv_heads = k.shape[:2]
    groups = heads // kv_heads
    packed = q.view(images, most, kv_heads, groups, tokens, width).transpose(1, 2)
    packed = packed.reshape(images, kv_heads, most * groups * tokens, width)
    part, lse = attend(packed, k, v, scale, bias=bias)
    part = part.view(images, kv_heads, most, groups, tokens, width).transpose(1, 2)
    lse = lse.view(images, kv_heads, most, groups, tokens).transpose(1, 2)
    return part.reshape(q.shape), lse.reshape(q.shape[:3])


def _length_bias(lengths: Sequence[int], job: Job, like: torch.Tensor) -> torch.Tensor | None:
    """[N, 1, 1, keys]: -inf where a prefix has ended; None if none ends inside the job."""
    if min(lengths) >= job.stop:
        return None
    position = torch.arange(job.start, job.stop, device=like.device)
    ended = position >= torch.tensor(lengths, device=like.device)[:, None]
    return torch.zeros(ended.shape, dtype=like.dtype, device=like.device).masked_fill_(ended, -torch.inf)[
        :, None, None
    ]


def _runs(images: list[int]) -> list[list[int]]:
    """Ascending numbers in runs without gaps."""
    runs: list[list[int]] = []
    for n in images:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return runs


def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys from the attention over each, [..., S, D] and [..., S]."""
    share = torch.sigmoid(other_lse - lse)[..., None]
    mixed = torch.lerp(out.to(share.dtype), other.to(share.dtype), share)
    return mixed.to(out.dtype), torch.logaddexp(lse, other_lse)


def rows_contiguous(t: torch.Tensor) -> torch.Tensor:
    """`t` with a last stride of 1, copied only if it has another: fused kernels take any strides but that
    one, and PyTorch's do not check it (they would read other memory)."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool = False,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its log-sum-exp: q [B, H, S, D], k and v [B, H, keys, D], bias broadcast to
    [B, H, S, keys] -> (out [B, H, S, D], lse [B, H, S], at least float32).

    The fused kernels give no gradient for the log-sum-exp, so gradients take the plain formula.
    """
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    plain = needs_grad or not q.numel()  # the CPU's kernel divides by the number of queries
    if not plain:
        q, k, v = map(rows_contiguous, (q, k, v))
    if q.device.type == "cpu" and not plain:
        if bias is not None:
            bias = bias.expand(q.shape[0], 1, q.shape[2], k.shape[2])
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    if (
        q.device.type == "cuda"
        and not plain
        and bias is None
        and q.element_size() == 2
        and q.shape[-1] % 8 == 0
    ):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias
    if causal:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse

"""Random arguments of `vision_kv_attention`, and what of its results is defined."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Native where there is a GPU, in triton's interpreter elsewhere (tests/conftest.py).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TENSORS = ("q", "prefix_k", "prefix_v", "suffix_k", "suffix_v")


@dataclass(frozen=True)
class Shape:
    """Upper bounds; what is random about a case is drawn from `seed`."""

    seed: int = 0
    images: int = 3
    rows: int = 5
    tokens: int = 6
    kv_heads: int = 2
    groups: int = 2
    width: int = 16
    spans: int = 2
    longest_span: int = 40


def random_case(shape: Shape, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> dict:
    """A ragged batch: spans of the same lengths at different places of each image, rows plain, dropped,
    swapped, bound from some token on. Everything that may not be read is NaN."""
    g = torch.Generator().manual_seed(shape.seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    images, rows, tokens = integer(1, shape.images), integer(1, shape.rows), integer(1, shape.tokens)
    heads = integer(1, shape.kv_heads)
    widths = [integer(0, shape.longest_span) * (integer(0, 3) > 0) for _ in range(shape.spans)]
    spans, lengths = [], []
    for _ in range(images):
        at, mine = 0, []
        for width in widths:
            start = at + integer(0, 5)
            mine.append((start, start + width))
            at = start + width
        spans.append(mine)
        lengths.append(at + integer(0, 5))
    image = [integer(0, images - 1) for _ in range(rows)]
    source = [[n if integer(0, 1) else integer(-1, images - 1) for _ in widths] for n in image]
    row_lengths = [integer(1, tokens) for _ in range(rows)]

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=g, dtype=torch.float64).to(dtype)

    longest = max(lengths) + integer(0, 3)
    case = {
        "q": normal(rows, heads * shape.groups, tokens, shape.width),
        "prefix_k": normal(images, heads, longest, shape.width),
        "prefix_v": normal(images, heads, longest, shape.width),
        "suffix_k": normal(rows, heads, tokens, shape.width),
        "suffix_v": normal(rows, heads, tokens, shape.width),
    }
    for n, end in enumerate(lengths):
        for name in ("prefix_k", "prefix_v"):
            case[name][n, :, end:] = torch.nan
    for r, end in enumerate(row_lengths):
        for name in ("q", "suffix_k", "suffix_v"):
            case[name][r, :, end:] = torch.nan
    return {
        **{name: t.to(device) for name, t in case.items()},
        "row_image": image, "row_source": torch.tensor(source).view(rows, shape.spans),
        "spans": torch.tensor(spans).view(images, shape.spans, 2),
        "row_start": [integer(0, tokens) if integer(0, 1) else 0 for _ in range(rows)],
        "row_lengths": row_lengths, "prefix_lengths": lengths,
    }  # fmt: skip


def defined(out: torch.Tensor, case: dict) -> torch.Tensor:
    """`out` [R, H, S, ...] with zeros beyond each row's length."""
    inside = torch.arange(out.shape[2]) < torch.as_tensor(case["row_lengths"])[:, None]
    shape = (len(out), 1, out.shape[2]) + (1,) * (out.dim() - 3)
    return torch.where(inside.view(shape).to(out.device), out, torch.zeros_like(out))


def without_nan(case: dict) -> dict:
    """For backends that compute what is undefined too: zeros where nothing may be read."""
    return {k: v.nan_to_num() if k in TENSORS else v for k, v in case.items()}


def wide(case: dict) -> dict:
    """The same on the CPU in float64."""
    return {k: v.double().cpu() if k in TENSORS else v for k, v in case.items()}

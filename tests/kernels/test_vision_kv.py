"""vision_kv_attention: the torch path against the definition, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vfl_train.kernels import vision_kv_attention
from vfl_train.kernels.vision_kv import torch_path

GROUPS = (1, 2, 3, 7)


def case(seed: int, dtype: torch.dtype = torch.float32, groups: int = 2, starts: bool = True) -> dict:
    """A random ragged batch: images with two spans of the same lengths at different places, some rows
    plain, some with spans dropped or swapped."""
    g = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    images, rows, tokens, heads = integer(1, 3), integer(1, 6), integer(1, 7), integer(1, 2)
    widths = (integer(0, 6), integer(0, 4))
    spans, lengths = [], []
    for _ in range(images):
        a = integer(0, 3)
        c = a + widths[0] + integer(0, 3)
        spans.append([[a, a + widths[0]], [c, c + widths[1]]])
        lengths.append(c + widths[1] + integer(0, 2))
    longest = max(1, *lengths)
    image = [integer(0, images - 1) for _ in range(rows)]
    source = [[n if integer(0, 1) else integer(-1, images - 1) for _ in widths] for n in image]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    width = 8 * integer(1, 2)
    return {
        "q": normal(rows, heads * groups, tokens, width),
        "prefix_k": normal(images, heads, longest, width), "prefix_v": normal(images, heads, longest, width),
        "suffix_k": normal(rows, heads, tokens, width), "suffix_v": normal(rows, heads, tokens, width),
        "row_image": torch.tensor(image), "row_source": torch.tensor(source), "spans": torch.tensor(spans),
        "row_start": torch.tensor([integer(0, tokens) if starts else 0 for _ in range(rows)]),
        "row_lengths": torch.tensor([integer(1, tokens) for _ in range(rows)]),
        "prefix_lengths": torch.tensor(lengths),
    }  # fmt: skip


def real(out: torch.Tensor, arguments: dict) -> torch.Tensor:
    """`out` with what is undefined set to zero."""
    inside = torch.arange(out.shape[2]) < arguments["row_lengths"][:, None]
    shape = (len(out), 1, out.shape[2]) + (1,) * (out.dim() - 3)
    return torch.where(inside.view(shape), out, torch.zeros_like(out))


def wide(arguments: dict) -> dict:
    return {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.sampled_from(GROUPS))
def test_torch_path_equals_the_definition_in_float64(seed, groups):
    arguments = case(seed, torch.float64, groups)
    out, lse = vision_kv_attention(**arguments, backend="torch", return_lse=True)
    wanted, wanted_lse = vision_kv_attention(**arguments, backend="reference", return_lse=True)
    torch.testing.assert_close(real(out, arguments), real(wanted, arguments), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(real(lse, arguments), real(wanted_lse, arguments), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_one_softmax(dtype):
    """Root mean square error to float64 over many cases, beside the definition run in the same dtype."""
    ours, plain = [], []
    for seed in range(30):
        arguments = case(seed, dtype, GROUPS[seed % 4])
        exact = real(vision_kv_attention(**wide(arguments), backend="reference"), arguments)
        for backend, errors in (("torch", ours), ("reference", plain)):
            errors.append(
                (real(vision_kv_attention(**arguments, backend=backend), arguments) - exact).flatten()
            )
    ours_rms, plain_rms = (torch.cat(e).double().square().mean().sqrt() for e in (ours, plain))
    assert 0 < ours_rms <= 2 * plain_rms


def test_plain_source_is_plain_attention():
    """n = row_image, spans or not, is causal attention over prefix and suffix."""
    arguments = case(3, torch.float64, starts=False)
    arguments["row_source"] = arguments["row_image"][:, None].expand(-1, 2)
    out = real(vision_kv_attention(**arguments), arguments)
    for row, image in enumerate(arguments["row_image"].tolist()):
        end, tokens = int(arguments["prefix_lengths"][image]), arguments["q"].shape[2]
        k, v = (
            torch.cat([arguments[f"prefix_{x}"][image, :, :end], arguments[f"suffix_{x}"][row]], 1)
            for x in "kv"
        )
        mask = torch.ones(tokens, end + tokens, dtype=torch.bool).tril(end)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            arguments["q"][row], *(t.repeat_interleave(2, 0) for t in (k, v)), attn_mask=mask
        )
        length = int(arguments["row_lengths"][row])
        torch.testing.assert_close(out[row, :, :length], wanted[:, :length], atol=1e-12, rtol=1e-12)


def test_the_prefix_is_never_copied(monkeypatch):
    """Every partial attention over a prefix of neighbouring images reads the caller's memory."""
    arguments, seen = case(11), []
    attend = torch_path.attend

    def spy(q, k, v, *args, **kwargs):
        seen.append((k.untyped_storage().data_ptr(), v.untyped_storage().data_ptr()))
        return attend(q, k, v, *args, **kwargs)

    monkeypatch.setattr(torch_path, "attend", spy)
    vision_kv_attention(**arguments)
    ours = tuple(arguments[f"prefix_{x}"].untyped_storage().data_ptr() for x in "kv")
    assert len(seen) > 1 and all(pointers == ours for pointers in seen[1:])  # the first is the suffix


@pytest.mark.parametrize("seed", range(4))
def test_gradients(seed):
    arguments = case(seed, torch.float64)
    names = ("q", "prefix_k", "prefix_v", "suffix_k", "suffix_v")
    for name in names:
        arguments[name] = arguments[name][..., :8].clone().requires_grad_()

    def run(*tensors):
        return real(vision_kv_attention(**{**arguments, **dict(zip(names, tensors, strict=True))}), arguments)

    assert torch.autograd.gradcheck(run, [arguments[n] for n in names])


def test_empty_and_dropped_prefixes():
    """Everything dropped, or no prefix at all: the suffix alone."""
    arguments = case(5, torch.float64, starts=False)
    rows, images = len(arguments["q"]), len(arguments["prefix_k"])
    longest = arguments["prefix_k"].shape[2]
    alone = vision_kv_attention(
        **{**arguments, "prefix_lengths": torch.zeros(images, dtype=torch.long),
           "spans": torch.zeros(images, 2, 2, dtype=torch.long)}
    )  # fmt: skip
    dropped = vision_kv_attention(
        **{**arguments, "prefix_lengths": torch.full((images,), longest),
           "spans": torch.tensor([[[0, longest], [longest, longest]]] * images),
           "row_source": torch.full((rows, 2), -1)}
    )  # fmt: skip
    torch.testing.assert_close(alone, dropped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix_v": lambda a: a["prefix_v"][:, :, :-1]}, "prefix_v must have shape"),
        ({"suffix_k": lambda a: a["suffix_k"].double()}, "suffix_k must be of q's"),
        ({"q": lambda a: a["q"][0]}, "q must have 4"),
        ({"row_image": lambda a: a["row_image"] + 50}, "row_image holds"),
        ({"row_image": lambda a: a["row_image"].float()}, "row_image must hold integers"),
        ({"row_source": lambda a: a["row_source"] - 9}, "row_source holds"),
        ({"row_start": lambda a: a["row_start"] + 99}, "row_start holds"),
        ({"prefix_lengths": lambda a: a["prefix_lengths"] + 99}, "prefix_lengths holds"),
        ({"spans": lambda a: a["spans"] + 99}, "spans holds"),
        ({"backend": lambda a: "magic"}, "backend must be"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(change, message):
    arguments = case(2)
    with pytest.raises(ValueError, match=message):
        vision_kv_attention(**{**arguments, **{k: f(arguments) for k, f in change.items()}})


def test_unequal_spans_cannot_be_swapped():
    arguments = case(0)
    arguments["spans"] = torch.tensor([[[0, 2], [2, 2]], [[0, 1], [2, 2]]])
    arguments |= {k: torch.randn(2, 1, 4, 8) for k in ("prefix_k", "prefix_v")}
    arguments |= {k: torch.randn(1, 1, 2, 8) for k in ("q", "suffix_k", "suffix_v")}
    arguments |= {"row_image": [0], "row_start": None, "row_lengths": None, "prefix_lengths": None}
    with pytest.raises(ValueError, match="row_source cannot swap"):
        vision_kv_attention(**{**arguments, "row_source": [[1, 0]]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_empty_prefix_beside_a_full_one(dtype):
    """Nothing of a masked key may reach the row that has no prefix."""
    g = torch.Generator().manual_seed(0)
    q, sk, sv = (torch.randn(3, 2, 4, 8, generator=g, dtype=dtype) for _ in range(3))
    pk, pv = (torch.randn(2, 2, 5, 8, generator=g, dtype=dtype) for _ in range(2))
    indices = {
        "row_image": [0, 1, 0],
        "row_source": [[]] * 3,
        "spans": torch.zeros(2, 0, 2, dtype=torch.long),
    }
    indices |= {"prefix_lengths": [0, 5], "row_start": [0, 0, 2], "return_lse": True}
    ours = vision_kv_attention(q, pk, pv, sk, sv, backend="torch", **indices)
    wanted = vision_kv_attention(q, pk, pv, sk, sv, backend="reference", **indices)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)

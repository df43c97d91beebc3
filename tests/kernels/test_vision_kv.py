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


TENSORS = ("q", "prefix_k", "prefix_v", "suffix_k", "suffix_v")


@pytest.mark.parametrize("names", [*((name,) for name in TENSORS), TENSORS], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_last_stride(names, dtype):
    """Fused kernels take the last stride for 1, whatever it is."""
    for seed in range(6):
        arguments = case(seed, dtype)
        wanted = vision_kv_attention(**arguments, backend="torch", return_lse=True)
        for name in names:
            arguments[name] = arguments[name].transpose(2, 3).contiguous().transpose(2, 3)
        found = vision_kv_attention(**arguments, backend="torch", return_lse=True)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(real(a, arguments), real(b, arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_are_not_rounded_to_16_bit(dtype):
    """With gradients and by the definition the log-sum-exp is a float32 figure of the given values."""
    for seed in range(6):
        arguments = case(seed, dtype)
        exact = vision_kv_attention(**wide(arguments), backend="reference", return_lse=True)[1]
        for backend in ("torch", "reference"):
            leaves = {name: arguments[name].clone().requires_grad_() for name in TENSORS}
            _, lse = vision_kv_attention(**{**arguments, **leaves}, backend=backend, return_lse=True)
            assert lse.dtype == torch.float32
            torch.testing.assert_close(
                real(lse, arguments).double(), real(exact, arguments), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("gradients", [False, True])
def test_autocast_changes_nothing(backend, gradients):
    arguments = case(4)
    for name in TENSORS:
        arguments[name].requires_grad_(gradients)
    wanted = vision_kv_attention(**arguments, backend=backend, return_lse=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = vision_kv_attention(**arguments, backend=backend, return_lse=True)
    assert all(a.dtype == b.dtype == torch.float32 for a, b in zip(found, wanted, strict=True))
    assert all(
        torch.equal(real(a, arguments), real(b, arguments)) for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("spans", [0, 2])
def test_no_rows_and_no_spans_as_lists(rows, spans):
    g = torch.Generator().manual_seed(0)
    q, sk, sv = (torch.randn(rows, 2, 4, 8, generator=g) for _ in range(3))
    pk, pv = (torch.randn(2, 2, 5, 8, generator=g) for _ in range(2))
    indices = {
        "row_image": [1] * rows, "row_source": [[1] * spans] * rows, "row_start": [0] * rows,
        "row_lengths": [4] * rows, "spans": [[(k, k + 1) for k in range(spans)]] * 2,
    }  # fmt: skip
    ours = vision_kv_attention(q, pk, pv, sk, sv, backend="torch", **indices)
    wanted = vision_kv_attention(q, pk, pv, sk, sv, backend="reference", **indices)
    torch.testing.assert_close(ours, wanted)
    assert ours.shape == (rows, 2, 4, 8)


INDICES = ("row_image", "row_source", "spans", "row_start", "row_lengths", "prefix_lengths")
NO_INDICES = {"ragged": [[1], [1, 2]], "string": "0", "strings": ["a"], "object": object(), "huge": [2**70]}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize(
    "value", [*NO_INDICES.values(), [[[None]]], [], 1j], ids=[*NO_INDICES, "none", "empty", "complex"]
)
def test_what_holds_no_integers_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        vision_kv_attention(**{**case(2), name: value})


@pytest.mark.parametrize("name", [*TENSORS, *INDICES[:3]])
def test_none_is_named(name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        vision_kv_attention(**{**case(2), name: None})


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", [1.0], True, 1j], ids=str)
def test_a_scale_is_a_finite_number(scale):
    with pytest.raises(ValueError, match="scale must be a finite number"):
        vision_kv_attention(**case(2), scale=scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[..., :0], "q must have heads of some width"),
        (lambda t: t[:, :0], "q must have heads of some width"),
        (lambda t: t.to(torch.float8_e4m3fn), "q must be of q's floating dtype"),
        (lambda t: t.tolist(), "q must be a tensor"),
    ],
)
def test_tensors_that_no_path_takes(change, message):
    arguments = case(2)
    arguments |= {name: change(arguments[name]) for name in TENSORS}
    with pytest.raises(ValueError, match=message):
        vision_kv_attention(**arguments)

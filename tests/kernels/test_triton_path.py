"""The triton kernels against the definition in float64: natively where there is a GPU, else interpreted.

The bound everywhere: an error at most twice that of the plain computation in the same precision.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, TENSORS, Shape, defined, random_case, wide, without_nan

from vfl_train.kernels import vision_kv_attention
from vfl_train.kernels.vision_kv import arguments, triton_path

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUPS = (1, 2, 3, 6, 7, 8)

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not triton_path.interpreted(), reason="no GPU, and TRITON_INTERPRET is not 1"
)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """New memory holds NaN, so that what a kernel does not write, or reads too early, is seen."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(make):
    def empty(*args, **kwargs):
        out = make(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    return empty


def errors(case: dict, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences to float64 of out and log-sum-exp, where they are defined."""
    exact = vision_kv_attention(**wide(without_nan(case)), backend="reference", return_lse=True)
    found = vision_kv_attention(**case, backend=backend, return_lse=True)
    out, lse = (defined(f, case).double().cpu() - defined(e, case) for f, e in zip(found, exact, strict=True))
    return out.flatten(), lse.flatten()


def rms(parts: list[torch.Tensor]) -> float:
    return float(torch.cat(parts).square().mean().sqrt())


# --- forward ---------------------------------------------------------------------------------------


# A case is a seed, which is not worth shrinking.
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    seed=st.integers(0, 10**6), groups=st.sampled_from(GROUPS), spans=st.integers(0, 3),
    tokens=st.sampled_from([1, 2, 9]), width=st.sampled_from([8, 20, 64]), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(seed, groups, spans, tokens, width, dtype):
    """flash-attention's rule for a single case: twice the plain error and a rounding of the largest value."""
    case = random_case(Shape(seed, rows=4, tokens=tokens, groups=groups, width=width, spans=spans), dtype)
    ours, ours_lse = errors(case, "triton")
    plain, plain_lse = errors(without_nan(case), "reference")
    values = torch.cat([case[name].flatten() for name in ("prefix_v", "suffix_v")]).nan_to_num().abs().max()
    assert ours.abs().max() <= 2 * plain.abs().max() + torch.finfo(dtype).eps * float(values)
    assert ours_lse.abs().max() <= 2 * plain_lse.abs().max() + 1e-6  # float32, of a few units


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_one_softmax(dtype, record_property):
    """Root mean square error over many cases, beside the definition run in the same dtype."""
    cases = [random_case(Shape(seed, groups=GROUPS[seed % 6]), dtype) for seed in range(18)]
    ours, plain = (
        rms([errors(c, "triton")[0] for c in cases]),
        rms([errors(without_nan(c), "reference")[0] for c in cases]),
    )
    record_property("rms_error", (ours, plain))
    print(f"\n{dtype}: rms error {ours:.2e}, of one softmax in {dtype} {plain:.2e}")
    assert 0 < ours <= 2 * plain


@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_head_widths(width):
    case = random_case(Shape(width, images=2, rows=2, tokens=3, kv_heads=1, width=width), torch.float16)
    ours, plain = errors(case, "triton")[0], errors(without_nan(case), "reference")[0]
    assert 0 < rms([ours]) <= 2 * rms([plain])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_and_a_long_prefix_are_split(monkeypatch, dtype):
    """S = 1: more programs than tiles, each a share of the keys; some shares without keys."""
    monkeypatch.setattr(triton_path, "processors", lambda device: 1000)
    seen, make = [], triton_path._plan

    def plan(*args):
        seen.append(make(*args))
        return seen[-1]

    monkeypatch.setattr(triton_path, "_plan", plan)
    case = random_case(Shape(13, rows=6, tokens=1, kv_heads=1, groups=7, longest_span=90), dtype)
    ours, ours_lse = errors(case, "triton")
    plain, plain_lse = errors(without_nan(case), "reference")
    splits, chunks = seen[0].config[-1], seen[0].tables[2]
    assert splits >= 4 and (DEVICE == "cuda" or int(chunks[:, 2].min()) < splits)
    # The plain log-sum-exp is float32 throughout; a GPU's tensor cores add with a few bits less.
    floor = 1e-6 if DEVICE == "cuda" and dtype != torch.float32 else 0.0
    assert rms([ours]) <= 2 * rms([plain]) and rms([ours_lse]) <= 2 * rms([plain_lse]) + floor


def test_everything_dropped_is_the_suffix_alone():
    """Prefixes of nothing but a dropped span, of NaN: they are not even multiplied by zero. Suffixes longer
    than a block: the second row of a tile sees nothing of the first block."""
    case = random_case(Shape(1, tokens=24), torch.float32)
    assert case["q"].shape[2] == 13
    case |= {name: torch.cat([case[name]] * 2, dim=2) for name in ("q", "suffix_k", "suffix_v")}
    case["row_lengths"] = [26, 20, 24, 26, 1]
    case |= {name: case[name].nan_to_num() for name in ("q", "suffix_k", "suffix_v")}
    rows, images, longest = len(case["q"]), len(case["prefix_k"]), case["prefix_k"].shape[2]
    whole = torch.tensor([[[0, longest], [longest, longest]]] * images)
    dropped = {"row_source": torch.full((rows, 2), -1), "spans": whole, "row_start": None,
               "prefix_lengths": None}  # fmt: skip
    nothing = {"prefix_k": case["prefix_k"] * torch.nan, "prefix_v": case["prefix_v"] * torch.nan}
    ours = defined(vision_kv_attention(**{**case, **dropped, **nothing}, backend="triton"), case)
    for row, length in enumerate(case["row_lengths"]):
        q, k, v = (case[n][row, :, :length] for n in ("q", "suffix_k", "suffix_v"))
        plain = torch.nn.functional.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0), is_causal=True
        )
        torch.testing.assert_close(ours[row, :, :length], plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "tokens", "prefix", "spans"),
    [(0, 3, 4, 1), (2, 0, 4, 1), (2, 3, 0, 1), (2, 3, 4, 0), (0, 0, 0, 0)],
)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nothing_to_do(backend, rows, tokens, prefix, spans):
    """No rows, no tokens, no prefix, no spans: forward and backward."""
    leaves = [torch.randn(2 - 2 * (not rows), 2, prefix, 16, device=DEVICE) for _ in "kv"]
    leaves = [torch.randn(rows, 4, tokens, 16, device=DEVICE), *leaves]
    leaves += [torch.randn(rows, 2, tokens, 16, device=DEVICE) for _ in "kv"]
    for leaf in leaves:
        leaf.requires_grad_()
    images = len(leaves[1])
    out, lse = vision_kv_attention(
        *leaves, row_image=torch.zeros(rows, dtype=torch.long),
        row_source=torch.zeros(rows, spans, dtype=torch.long),
        spans=torch.zeros(images, spans, 2, dtype=torch.long), backend=backend, return_lse=True,
    )  # fmt: skip
    assert out.shape == (rows, 4, tokens, 16) and lse.shape == (rows, 4, tokens)
    (out.sum() + lse.sum()).backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]  # none where nothing reads a prefix
    assert len(gradients) >= 3 and all(torch.isfinite(x).all() for x in (out, lse, *gradients))


def test_strides():
    """[B, S, H, D] seen as [B, H, S, D], as models hold it, an expanded prefix, an odd last stride."""
    case = without_nan(random_case(Shape(8)))
    plain = defined(vision_kv_attention(**case, backend="triton"), case)
    for name in ("q", "suffix_k", "suffix_v"):
        case[name] = case[name].transpose(1, 2).contiguous().transpose(1, 2)
    case["prefix_k"] = case["prefix_k"].repeat_interleave(2, dim=3)[..., ::2]
    out = vision_kv_attention(**case, backend="triton")
    assert out.stride() == case["q"].stride()
    assert torch.equal(defined(out, case), plain)
    one = {**case, "prefix_v": case["prefix_v"][:1].expand_as(case["prefix_v"])}
    torch.testing.assert_close(
        defined(vision_kv_attention(**one, backend="triton"), case),
        defined(vision_kv_attention(**one, backend="torch"), case),
        atol=1e-6, rtol=1e-5,
    )  # fmt: skip


def test_addresses_beyond_32_bits():
    """Strides fit 32 bits, their products do not. (Memory that is never touched costs nothing.)"""
    case = without_nan(random_case(Shape(1, images=1, kv_heads=1), torch.float16))
    rows = len(case["q"])
    assert rows == 5
    far = {name: _far_apart(case[name], 2**29) for name in ("q", "suffix_k")}
    prefixes = {name: case[name].expand(3, -1, -1, -1) for name in ("prefix_k", "prefix_v")}
    far |= {"prefix_k": _far_apart(prefixes["prefix_k"], 2**30), "prefix_v": prefixes["prefix_v"]}
    shifted = {
        **case, **far, "row_image": [2] * rows,
        "row_source": torch.where(case["row_source"] == 0, 2, case["row_source"]),
        "spans": case["spans"].expand(3, -1, -1), "prefix_lengths": case["prefix_lengths"] * 3,
    }  # fmt: skip
    assert torch.equal(
        defined(vision_kv_attention(**shifted, backend="triton"), case),
        defined(vision_kv_attention(**case, backend="triton"), case),
    )


def _far_apart(t: torch.Tensor, stride: int) -> torch.Tensor:
    """A copy of `t` whose first dimension has this stride."""
    last = (len(t) - 1) * stride
    memory = torch.UntypedStorage((last + t[0].numel()) * t.itemsize, device=t.device)
    assert last >= 2**31
    strides = stride, *t[0].contiguous().stride()
    return torch.tensor([], dtype=t.dtype, device=t.device).set_(memory, 0, t.shape, strides).copy_(t)


@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0])
def test_scales(scale):
    case = without_nan(random_case(Shape(2)))
    ours = vision_kv_attention(**case, backend="triton", scale=scale)
    theirs = vision_kv_attention(**case, backend="reference", scale=scale)
    torch.testing.assert_close(defined(ours, case), defined(theirs, case), atol=1e-6, rtol=1e-5)


# --- backward --------------------------------------------------------------------------------------


def gradients(case: dict, backend: str) -> list[torch.Tensor]:
    """Of a random function of out and log-sum-exp, by tensor."""
    leaves = {name: case[name].clone().requires_grad_() for name in TENSORS}
    found = vision_kv_attention(**{**case, **leaves}, backend=backend, return_lse=True)
    g = torch.Generator().manual_seed(0)
    loss = sum(
        (defined(x, case) * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x)).sum() for x in found
    )
    return [x.double().cpu() for x in torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype):
    """Of all five tensors, from out and log-sum-exp; zero for keys that nobody reads; against the torch path,
    whose gradients gradcheck has passed."""
    ours, plain = ([[] for _ in TENSORS] for _ in range(2))
    for seed in range(4):
        case = random_case(Shape(seed, tokens=9, rows=3, groups=GROUPS[seed + 2]), dtype)
        exact = gradients(wide(without_nan(case)), "torch")
        found = gradients(case, "triton")
        for errors_of, these in ((ours, found), (plain, gradients(without_nan(case), "torch"))):
            for each, a, b in zip(errors_of, these, exact, strict=True):
                each.append((a - b).flatten())
        for name, gradient in zip(TENSORS, found, strict=True):
            assert not gradient[case[name].isnan().cpu()].any(), name
    for name, mine, theirs in zip(TENSORS, ours, plain, strict=True):
        assert 0 < rms(mine) <= 2 * rms(theirs), name


def test_frozen_prefixes_cost_no_gradient(monkeypatch):
    case, launched = random_case(Shape(3, rows=2)), []
    kernel = triton_path._kernels().backward_keys

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(kwargs["CAUSAL"]) or kernel[grid](*args, **kwargs)

    monkeypatch.setattr(triton_path._kernels(), "backward_keys", Spy())
    case["suffix_v"].requires_grad_()
    defined(vision_kv_attention(**case, backend="triton"), case).sum().backward()
    assert launched == [True]


def test_opcheck():
    """Schemas, fake tensors and autograd registration of both operators."""
    case = without_nan(random_case(Shape(6, rows=2, tokens=3, kv_heads=1, longest_span=8)))
    recorded = {}
    leaves = {name: case[name].requires_grad_() for name in TENSORS}
    for name in ("operator", "backward_operator"):
        recorded[name] = _recorded(name)
    try:
        vision_kv_attention(**{**case, **leaves}, backend="triton").sum().backward()
    finally:
        for each in recorded.values():
            each.undo()
    for each in recorded.values():
        torch.library.opcheck(each.operator, each.arguments)


class _recorded:
    """The arguments of the next call of one of `triton_path`'s operators."""

    def __init__(self, name: str) -> None:
        self.name, self.operator = name, getattr(triton_path, name)
        setattr(triton_path, name, self)

    def __call__(self, *args):
        self.arguments = tuple(a.detach() if torch.is_tensor(a) else a for a in args)
        return self.operator(*args)

    def undo(self) -> None:
        setattr(triton_path, self.name, self.operator)


# --- what is refused, and what is done once --------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.double(), "q must be float32, float16 or bfloat16"),
        (lambda t: t[..., :1].expand(*t.shape[:3], 300), "heads of 300"),
    ],
)
def test_tensors_it_does_not_take(change, message):
    case = random_case(Shape(0))
    case |= {name: change(case[name]) for name in TENSORS}
    with pytest.raises(ValueError, match=message):
        vision_kv_attention(**case, backend="triton")


def test_without_the_interpreter_the_cpu_is_refused(monkeypatch):
    case = random_case(Shape(0), device="cpu")
    monkeypatch.setattr(triton_path, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        vision_kv_attention(**case, backend="triton")
    assert vision_kv_attention(**case).device.type == "cpu"


def test_values_are_checked_once():
    case = without_nan(random_case(Shape(40)))
    arguments.check_values.cache_clear()
    for _ in range(3):
        vision_kv_attention(**case, backend="triton")
    assert arguments.check_values.cache_info().misses == 1
    with pytest.raises(ValueError, match="row_image holds 77"):
        vision_kv_attention(**{**case, "row_image": [77] * len(case["q"])}, backend="triton")


def test_plans_are_made_once():
    case = without_nan(random_case(Shape(41)))
    vision_kv_attention(**case, backend="triton")
    made = triton_path._plan.cache_info().misses
    lists = {k: v.tolist() if torch.is_tensor(v) and k not in TENSORS else v for k, v in case.items()}
    vision_kv_attention(**lists, backend="triton")
    assert triton_path._plan.cache_info().misses == made


def test_a_plan_made_for_inference_serves_training():
    """Tables that autograd saves must not be inference tensors."""
    case = without_nan(random_case(Shape(42)))
    triton_path._plan.cache_clear()
    leaves = {name: case[name].requires_grad_() for name in TENSORS}
    with torch.inference_mode(), torch.enable_grad():
        vision_kv_attention(**{**case, **leaves}, backend="triton")
    made = triton_path._plan.cache_info().misses
    vision_kv_attention(**{**case, **leaves}, backend="triton").sum().backward()
    assert made == triton_path._plan.cache_info().misses == 1
    assert all(leaf.grad is not None for leaf in leaves.values())


@pytest.mark.parametrize("compiled", [True, False])
def test_cuda_needs_compiled_kernels(monkeypatch, compiled):
    q = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(1, 1, 1, 16))
    monkeypatch.setattr(triton_path, "compiled", lambda: compiled)
    reason = triton_path.refusal(q)
    assert reason is None if compiled else "TRITON_INTERPRET" in reason

"""The compiled kernels on a GPU: sizes of real models, CUDA graphs, streams, index tensors on the device."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import TENSORS

from vfl_train.kernels import vision_kv_attention
from vfl_train.kernels.vision_kv import triton_path

pytestmark = pytest.mark.gpu


def sweep(
    dtype: torch.dtype, width: int, heads: int, kv_heads: int, tokens: int, prefix: int = 600, rows: int = 9
) -> dict:
    """Two images, each with rows that read it, one that drops it and one that swaps it."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=g, device="cuda").to(dtype)

    source = [[n] for n in (0, 1) for _ in range(rows)]
    source[0], source[1], source[rows] = [-1], [1], [0]
    return {
        "q": normal(2 * rows, heads, tokens, width),
        "prefix_k": normal(2, kv_heads, prefix, width), "prefix_v": normal(2, kv_heads, prefix, width),
        "suffix_k": normal(2 * rows, kv_heads, tokens, width),
        "suffix_v": normal(2 * rows, kv_heads, tokens, width),
        "row_image": [0] * rows + [1] * rows, "row_source": source,
        "spans": [[(15, prefix - 5)], [(12, prefix - 8)]],
    }  # fmt: skip


def double(case: dict) -> dict:
    return {k: v.double() if k in TENSORS else v for k, v in case.items()}


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens"), [(28, 4, 40), (14, 2, 1), (12, 2, 3), (8, 8, 17), (32, 4, 1)]
)
def test_every_configuration(dtype, width, heads, kv_heads, tokens):
    """Small, middle and large tiles, split and not, forward and backward."""
    case, results = sweep(dtype, width, heads, kv_heads, tokens), {}
    for name, arguments in (("exact", double(case)), ("triton", case), ("torch", case)):
        leaves = {each: arguments[each].detach().requires_grad_() for each in TENSORS}
        backend = "torch" if name == "exact" else name
        out, lse = vision_kv_attention(**{**arguments, **leaves}, backend=backend, return_lse=True)
        loss = out.double().square().sum() + lse.double().sum()
        results[name] = [out, lse, *torch.autograd.grad(loss, list(leaves.values()))]
    for number, (ours, plain, exact) in enumerate(
        zip(results["triton"], results["torch"], results["exact"], strict=True)
    ):
        # The plain log-sum-exp is float32 throughout; tensor cores add with a few bits less.
        floor = 1e-6 if number == 1 and dtype != torch.float32 else 0.0
        assert relative(ours, exact) <= 2 * relative(plain, exact) + floor


def test_the_default_on_cuda():
    case = sweep(torch.bfloat16, 64, 4, 2, 3)
    assert torch.equal(vision_kv_attention(**case), vision_kv_attention(**case, backend="triton"))
    assert vision_kv_attention(**double(case)).dtype == torch.float64  # by the torch path


def test_results_do_not_depend_on_timing():
    """Bit for bit, gradients too: no atomics."""
    case = sweep(torch.bfloat16, 128, 28, 4, 40)
    leaves = [case[name].requires_grad_() for name in TENSORS]

    def run():
        out = vision_kv_attention(**case)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("tokens", [40, 1])
def test_graph_capture(tokens):
    """Replays follow the tensors' contents, and outlive the plan's place in the cache."""
    case = sweep(torch.bfloat16, 128, 28, 4, tokens)
    vision_kv_attention(**case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = vision_kv_attention(**case)
    triton_path._plan.cache_clear()
    torch.full((1 << 20,), -1, dtype=torch.int32, device="cuda")  # takes freed memory, were there any
    for seed in range(2):
        case["q"].normal_(generator=torch.Generator("cuda").manual_seed(seed))
        graph.replay()
        assert torch.equal(captured, vision_kv_attention(**case))


def test_new_indices_while_capturing_are_refused():
    case = sweep(torch.bfloat16, 64, 4, 2, 3)
    vision_kv_attention(**case)
    on_device = torch.tensor(case["row_image"], device="cuda")
    for change in ({"row_source": [[-1]] * 18}, {"row_image": on_device}):
        with (
            pytest.raises(ValueError, match="before capturing a graph"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            vision_kv_attention(**{**case, **change})


def test_index_tensors_on_the_device():
    """Read once; again after a change in place."""
    case = sweep(torch.bfloat16, 64, 4, 2, 3)
    on_device = {**case, "row_source": torch.tensor(case["row_source"], device="cuda")}
    assert torch.equal(vision_kv_attention(**on_device), vision_kv_attention(**case))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # reads nothing
        vision_kv_attention(**on_device)
    on_device["row_source"].fill_(-1)
    dropped = vision_kv_attention(**{**case, "row_source": [[-1]] * 18})
    assert torch.equal(vision_kv_attention(**on_device), dropped)


def test_another_stream():
    """A plan made on one stream serves another."""
    case = sweep(torch.bfloat16, 128, 28, 4, 40)
    wanted = vision_kv_attention(**case)
    triton_path._plan.cache_clear()
    vision_kv_attention(**case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours = vision_kv_attention(**case)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(ours, wanted)

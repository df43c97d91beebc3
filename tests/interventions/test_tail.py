"""Whole-sequence branches: what they compute on every family, what they share, what they leave behind."""

from __future__ import annotations

import pytest
import torch
from pictures import picture
from tiny_models import FAMILIES, LAYERS, VARIANTS, tiny_vlm

from vfl_train.errors import ConfigError
from vfl_train.interventions import BASE, Row, drop, knockout, read_out, rerun, tail, uniform
from vfl_train.interventions.intervention import MODULES
from vfl_train.interventions.readout import Cost

QUESTION = "what text is written here ?"
ANSWER = (7, 11, 5)
ALL = [*FAMILIES, *VARIANTS]


def branches() -> list:
    """One layer and several, every kind, and kinds that meet in one branch."""
    found = [BASE]
    for k in range(LAYERS):
        found += [knockout([k], module) for module in MODULES]
        found += [uniform([k]), rerun([k]), rerun([k], "itself")]
    found += [knockout([1, 3]), uniform([0, 2]), rerun([1, 2]), rerun([1, 2], "itself")]
    found += [knockout([0]) + uniform([2]) + rerun([3]) + rerun([1], "itself")]
    return found


def rows_of(vlm) -> list[Row]:
    """Two images of one size with answers of unequal length, another size and question with none, two
    images in a prompt, and no image."""
    a, b = (vlm.prompt(QUESTION, [picture(i)]) for i in range(2))
    c = vlm.prompt("three cats, 12 dogs. " + QUESTION, [picture(2, (64, 32))])
    d, e = vlm.prompt(QUESTION, [picture(3), picture(4)]), vlm.prompt(QUESTION, [])
    asked = ((a, ANSWER), (b, (9, 30, 8, 14, 2)), (c, ()), (d, (7, 11)), (e, (9,)))
    return [Row(prompt, answer, branch) for prompt, answer in asked for branch in branches()]


def run(vlm, rows, path="engine", **settings) -> tuple[list, Cost]:
    cost = Cost()
    return list(read_out(vlm, rows, path, cost=cost, **settings)), cost


def logprobs(vlm, rows, path) -> torch.Tensor:
    return torch.tensor([p for r in run(vlm, rows, path)[0] for p in r.logprobs], dtype=torch.float64)


def assert_equal(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=5e-5, rtol=1e-5)
        assert (a.predicted, a.greedy, a.next_token) == (b.predicted, b.greedy, b.next_token)


@pytest.fixture(params=["qwen2_5_vl", "llava"])
def vlm(request):
    return tiny_vlm(request.param)


# --- every family -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_every_family_says_what_the_reference_says(family):
    vlm = tiny_vlm(family)
    rows = rows_of(vlm)
    ours, cost = run(vlm, rows)
    assert (cost.rows, cost.reference_rows, cost.reasons) == (len(rows), 0, {})
    assert_equal(ours, run(vlm, rows, "reference")[0])


@pytest.mark.parametrize("family", ALL)
def test_every_branch_is_felt(family):
    """Else the comparison above shows nothing."""
    vlm = tiny_vlm(family)
    rows = rows_of(vlm)[: len(branches())]
    base, *others = (torch.tensor(r.logprobs) for r in run(vlm, rows, "reference")[0])
    assert all((other - base).abs().max() > 1e-3 for other in others)


# --- the reference path against other means ------------------------------------------------------------


@torch.no_grad()
def plainly(vlm, prompt) -> torch.Tensor:
    """Log-probabilities of ANSWER from one plain forward."""
    ids = prompt.inputs["input_ids"]
    inputs, more = dict(prompt.inputs), torch.tensor([ANSWER])
    for key, t in prompt.inputs.items():
        if t.shape == ids.shape:
            filled = more if key == "input_ids" else torch.full_like(more, key == "attention_mask")
            inputs[key] = torch.cat([t, filled], dim=1)
    logits = vlm.model(**inputs, use_cache=False).logits[0, prompt.length - 1 :][: len(ANSWER)]
    return logits.log_softmax(-1).gather(1, torch.tensor(ANSWER)[:, None])[:, 0]


def zeroed(parameters) -> dict:
    """Set `parameters` to zero; returns what they were."""
    saved = {p: p.detach().clone() for p in parameters if p is not None}
    with torch.no_grad():
        for p in saved:
            p.zero_()
    return saved


def put_back(saved: dict) -> None:
    with torch.no_grad():
        for p, value in saved.items():
            p.copy_(value)


def of(*linears) -> list:
    return [p for linear in linears for p in (linear.weight, linear.bias)]


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("kind", [*MODULES, "uniform"])
def test_it_equals_zeroed_projections(family, kind):
    """A knockout zeroes what the projection out gives; attention is uniform when all queries are zero."""
    vlm = tiny_vlm(family)
    host, layer = vlm.prompt(QUESTION, [picture(0)]), vlm.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    linears = {
        "attention": [attention.o_proj], "mlp": [mlp.down_proj], "both": [attention.o_proj, mlp.down_proj],
        "uniform": [attention.q_proj],
    }[kind]  # fmt: skip
    branch = uniform([1]) if kind == "uniform" else knockout([1], kind)
    (found,), _ = run(vlm, [Row(host, ANSWER, branch)], "reference")
    saved = zeroed(of(*linears))
    try:
        expected = plainly(vlm, host)
    finally:
        put_back(saved)
    torch.testing.assert_close(torch.tensor(found.logprobs), expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "internvl"])
@pytest.mark.parametrize(
    ("layers", "at"), [([1], "end"), ([1], "itself"), ([0, 2], "end"), ([0, 2], "itself")]
)
def test_a_rerun_equals_a_deeper_model(family, layers, at):
    """A model whose list of layers holds these layers twice."""
    vlm = tiny_vlm(family)
    host, decoder = vlm.prompt(QUESTION, [picture(0)]), vlm.model.get_decoder()
    (found,), _ = run(vlm, [Row(host, ANSWER, rerun(layers, at))], "reference")
    order = [*range(LAYERS), *layers] if at == "end" else sorted([*range(LAYERS), *layers])
    own, depth = decoder.layers, decoder.config.num_hidden_layers
    types = getattr(decoder.config, "layer_types", None)
    try:
        decoder.layers, decoder.config.num_hidden_layers = (
            torch.nn.ModuleList(own[i] for i in order),
            len(order),
        )
        if types is not None:
            decoder.config.layer_types = [types[i] for i in order]
        expected = plainly(vlm, host)
    finally:
        decoder.layers, decoder.config.num_hidden_layers = own, depth
        if types is not None:
            decoder.config.layer_types = types
    torch.testing.assert_close(torch.tensor(found.logprobs), expected, atol=5e-5, rtol=1e-5)


# --- cost -------------------------------------------------------------------------------------------


def sweep(prompt, branch_of, answer=ANSWER) -> list[Row]:
    return [Row(prompt, answer), *(Row(prompt, answer, branch_of([k])) for k in range(LAYERS))]


@pytest.mark.parametrize("images", [1, 3])
def test_knockouts_of_all_layers_cost_half(vlm, images):
    """Base and one branch a layer, the last layer apart: (L - 1) + (L - 1) L / 2 layers of a sequence."""
    prompts = [vlm.prompt(QUESTION, [picture(seed)]) for seed in range(images)]
    tokens = prompts[0].length + len(ANSWER) - 1  # the last token is predicted, never fed
    _, cost = run(vlm, [row for prompt in prompts for row in sweep(prompt, knockout)])
    assert cost.token_layers == images * tokens * ((LAYERS - 1) + (LAYERS - 1) * LAYERS // 2)
    assert cost.last_layer_tokens == images * tokens * (LAYERS + 1)
    assert cost.head_tokens == images * len(ANSWER) * (LAYERS + 1)
    assert (cost.rows, cost.reference_rows) == (images * (LAYERS + 1), 0)


@pytest.mark.parametrize(("at", "deeper"), [("end", 0), ("itself", LAYERS * (LAYERS - 1) // 2)])
def test_what_reruns_cost(vlm, at, deeper):
    """The layer once more; right after itself, also those above it (of which the last is counted apart)."""
    prompt = vlm.prompt(QUESTION, [picture(0)])
    tokens = prompt.length + len(ANSWER) - 1
    _, cost = run(vlm, sweep(prompt, lambda k: rerun(k, at)))
    above = deeper - (LAYERS - 1) if at == "itself" else 0
    assert cost.token_layers == tokens * ((LAYERS - 1) + LAYERS + above)
    assert cost.last_layer_tokens == tokens * (1 + (LAYERS - 1) * (at == "itself"))


@pytest.mark.parametrize("kind", [knockout, uniform, rerun])
def test_a_branch_alone_costs_what_a_plain_forward_does(vlm, kind):
    """Its base is nobody's answer and stops where the branch leaves it; also of several in one pass."""
    prompts = [vlm.prompt(QUESTION, [picture(seed)]) for seed in range(3)]
    rows = [Row(prompt, ANSWER, kind([k])) for prompt, k in zip(prompts, (3, 0, 2), strict=True)]
    whole, _ = run(vlm, rows, "reference")
    for batch_tokens in (1, 8192):
        ours, cost = run(vlm, rows, batch_tokens=batch_tokens)
        assert_equal(ours, whole)
        spent = cost.token_layers + cost.last_layer_tokens
        tokens = prompts[0].length + len(ANSWER) - 1
        assert spent == tokens * 3 * (LAYERS + (kind is rerun))


@pytest.mark.parametrize("family", ALL)
def test_bases_that_nobody_reads_are_left_behind(family):
    """Some are read and some are not, in one pass, with branches that leave them at different layers."""
    vlm = tiny_vlm(family)
    rows = [row for i, row in enumerate(rows_of(vlm)) if row.branch or i < len(branches())]
    rows = [row for i, row in enumerate(rows) if i % 3 == 0]
    ours, cost = run(vlm, rows)
    assert cost.reference_rows == 0
    assert_equal(ours, run(vlm, rows, "reference")[0])


@pytest.mark.parametrize("batch_tokens", [1, 60, 120])
def test_the_token_budget_bounds_the_rows_alive(vlm, batch_tokens, monkeypatch):
    prompts = [vlm.prompt(QUESTION, [picture(seed)]) for seed in range(2)]
    rows = [row for prompt in prompts for row in sweep(prompt, knockout) + sweep(prompt, rerun)]
    whole, cheaper = run(vlm, rows)
    seen = []
    read = tail._Tail._read
    monkeypatch.setattr(tail._Tail, "_read", lambda self, out: (seen.append(out.shape), read(self, out))[1])
    ours, cost = run(vlm, rows, batch_tokens=batch_tokens)
    assert_equal(ours, whole)
    assert all(slots * width <= batch_tokens or slots <= 2 for slots, width, _ in seen), "base and one branch"
    assert cost.rows == len(rows) and cost.token_layers > cheaper.token_layers


# --- what is refused or goes to the reference path -------------------------------------------------------


def test_mixed_branches_go_to_the_reference_path(vlm):
    prompt = vlm.prompt(QUESTION, [picture(0)])
    mixed = [Row(prompt, ANSWER, knockout([1]) + drop([2]))]
    ours, cost = run(vlm, mixed)
    assert cost.reference_rows == 1 and "beside one on images" in next(iter(cost.reasons))
    assert_equal(ours, run(vlm, mixed, "reference")[0])


def test_deep_stack_of_an_unknown_family_goes_to_the_reference_path(monkeypatch):
    from vfl_train.models.families import Family

    vlm = tiny_vlm("qwen3_vl")
    rows = sweep(vlm.prompt(QUESTION, [picture(0)]), knockout)
    monkeypatch.setattr(vlm, "family", Family())
    ours, cost = run(vlm, rows)
    assert cost.reference_rows == len(rows) and "between its decoder layers" in next(iter(cost.reasons))
    assert_equal(ours, run(vlm, rows, "reference")[0])


def test_a_layer_that_runs_again_is_not_touched_in_another_way(vlm):
    prompt = vlm.prompt(QUESTION, [picture(0)])
    for branch in (rerun([1]) + knockout([1]), rerun([1]) + rerun([1], "itself"), drop([2]) + rerun([2])):
        for path in ("engine", "reference"):
            with pytest.raises(ConfigError, match="runs again and is touched"):
                run(vlm, [Row(prompt, ANSWER, branch)], path)
    with pytest.raises(ConfigError, match="time of a rerun"):
        rerun([1], "never")
    with pytest.raises(ConfigError, match=f"layer {LAYERS} is outside"):
        run(vlm, [Row(prompt, ANSWER, rerun([LAYERS]))])


@torch.no_grad()
@pytest.mark.parametrize("path", ["engine", "reference"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_untouched_afterwards(vlm, path, fails, monkeypatch):
    prompt = vlm.prompt(QUESTION, [picture(0)])
    plain = dict(prompt.inputs)
    before = vlm.model(**plain).logits
    modules = {id(m): set(m.__dict__) for m in vlm.layers.modules()}
    rows = [Row(prompt, ANSWER, branch) for branch in branches()]
    if fails:

        def boom(*args, **kwargs):
            raise RuntimeError("boom")

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="boom"):
            patch.setattr(vlm.layers[LAYERS - 1].mlp, "forward", boom)
            run(vlm, rows, path)
    else:
        run(vlm, rows, path)
    assert vlm.text_config._attn_implementation == "sdpa"
    assert all(set(m.__dict__) == modules[id(m)] for m in vlm.layers.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vlm.layers.modules())
    assert torch.equal(before, vlm.model(**plain).logits)

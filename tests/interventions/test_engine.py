"""The engine: what it computes and how often, what it leaves behind, what it hands to the reference path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pictures import picture
from tiny_models import LAYERS, tiny_vlm

from vfl_train.errors import ConfigError, NumericError
from vfl_train.interventions import BASE, NOISE, Row, drop, engine, knockout, read_out, swap
from vfl_train.interventions.layout import batches
from vfl_train.interventions.readout import Cost
from vfl_train.models.generation import generate

QUESTION = "what text is written here ?"
ANSWER = (7, 11, 5)


@pytest.fixture(params=["qwen2_5_vl", "llava"])
def vlm(request):
    return tiny_vlm(request.param)


def run(vlm, rows, path="engine", **settings) -> tuple[list, Cost]:
    cost = Cost()
    return list(read_out(vlm, rows, path, cost=cost, **settings)), cost


def assert_equal(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=2e-5, rtol=1e-5)
        assert (a.predicted, a.greedy, a.next_token) == (b.predicted, b.greedy, b.next_token)


def sweep(host, branch_of, answer=ANSWER, **row) -> list[Row]:
    return [Row(host, answer), *(Row(host, answer, branch_of(k), **row) for k in range(LAYERS))]


def test_every_kind_of_row_in_one_batch(vlm):
    a, b = (vlm.prompt(QUESTION, [picture(seed)]) for seed in (0, 1))
    other = vlm.prompt("who ?", [picture(2)])
    rows = [
        *sweep(a, lambda k: drop([k])),
        *sweep(a, lambda k: swap([k], "d"), donors={"d": b}),
        *sweep(b, lambda k: swap(range(k, LAYERS), "d"), (9,), donors={"d": a}),
        *sweep(a, lambda k: swap([k], NOISE)),
        *sweep(other, lambda k: drop(range(k + 1))),
        Row(a, (6, 9), drop([2])),  # another answer of the same prompt
        Row(a, ANSWER, drop([0, 2]) + drop([1], phase="decode")),
        Row(a, (), drop([1])),  # reads what comes next
    ]
    ours, cost = run(vlm, rows)
    assert cost.reference_rows == 0
    assert_equal(ours, run(vlm, rows, "reference")[0])


def test_phase_decode_shares_the_question_too(vlm):
    host = vlm.prompt(QUESTION, [picture(0)])
    rows = sweep(host, lambda k: drop([k], phase="decode"))
    ours, cost = run(vlm, rows)
    assert_equal(ours, run(vlm, rows, "reference")[0])
    suffix = len(ANSWER)  # the last prompt token and all answer tokens but the last
    assert cost.token_layers == formula(host.length - 1, suffix)


def formula(prefix: int, suffix: int, layers: int = LAYERS) -> int:
    """Token-layers of base and one branch a layer, the last layer apart."""
    return prefix * (layers - 1) + suffix * sum(k + 2 for k in range(layers - 1))


@pytest.mark.parametrize("images", [1, 3])
def test_token_layers_follow_the_formula(vlm, images):
    hosts = [vlm.prompt(QUESTION, [picture(seed)]) for seed in range(images)]
    prefix = hosts[0].spans[0][1]
    suffix = hosts[0].length - prefix + len(ANSWER) - 1  # the last token is predicted, never fed
    _, cost = run(vlm, [row for host in hosts for row in sweep(host, lambda k: drop([k]))])
    assert cost.token_layers == images * formula(prefix, suffix)
    assert cost.last_layer_tokens == cost.head_tokens == images * (LAYERS + 1) * len(ANSWER)
    assert cost.rows == images * (LAYERS + 1) and cost.reference_rows == 0


def test_a_pair_computes_two_prefixes(vlm):
    """Both directions of a pair, each the other's donor: no prefix runs twice."""
    a, b = (vlm.prompt(QUESTION, [picture(seed)]) for seed in (0, 1))
    rows = sweep(a, lambda k: swap([k], "d"), donors={"d": b})
    rows += sweep(b, lambda k: swap([k], "d"), donors={"d": a})
    prefix = a.spans[0][1]
    _, cost = run(vlm, rows)
    assert cost.token_layers == 2 * formula(prefix, a.length - prefix + len(ANSWER) - 1)


def test_prefix_keys_are_never_copied(vlm, monkeypatch):
    """What attention reads as prefix is the very memory that the layer wrote."""
    host = vlm.prompt(QUESTION, [picture(0)])
    kept, read = [], []
    keep, attend = engine._Sweep._keep, engine.vision_kv_attention

    def keeping(self, q, k, v, *args):
        kept.append((k.data_ptr(), v.data_ptr()))
        return keep(self, q, k, v, *args)

    def attending(q, k, v, *args, **kwargs):
        read.append((k.data_ptr(), v.data_ptr()))
        return attend(q, k, v, *args, **kwargs)

    monkeypatch.setattr(engine._Sweep, "_keep", keeping)
    monkeypatch.setattr(engine, "vision_kv_attention", attending)
    run(vlm, sweep(host, lambda k: drop([k])))
    assert kept and read[: len(kept)] == kept


@pytest.mark.parametrize("batch_tokens", [1, 25, 50])
def test_the_token_budget_splits_batches_and_changes_nothing(vlm, batch_tokens):
    a, b = (vlm.prompt(QUESTION, [picture(seed)]) for seed in (0, 1))
    rows = sweep(a, lambda k: swap([k], "d"), donors={"d": b}) + sweep(b, lambda k: drop([k]))
    ours, cost = run(vlm, rows, batch_tokens=batch_tokens)
    whole, cheaper = run(vlm, rows)
    assert_equal(ours, whole)
    assert cost.rows == len(rows) and cost.token_layers > cheaper.token_layers


def test_several_images_by_name(vlm):
    """The last image alone is exact here; text between the images is not the engine's."""
    host, donor = (vlm.prompt(QUESTION, [picture(s), picture(s + 1)]) for s in (0, 5))
    rows = [
        Row(host, ANSWER),
        Row(host, ANSWER, drop([1], spans=[1])),
        Row(host, ANSWER, swap([2], "d", spans=[1]), {"d": donor}),
        Row(host, ANSWER, drop([1], phase="decode")),
    ]
    ours, cost = run(vlm, rows)
    assert cost.reference_rows == 0
    assert_equal(ours, run(vlm, rows, "reference")[0])
    rows.append(Row(host, ANSWER, drop([1], spans=[0])))
    ours, cost = run(vlm, rows)
    assert cost.reference_rows == 1 and dict(cost.reasons) == {"text between images is bound": 1}
    assert_equal(ours, run(vlm, rows, "reference")[0])


def test_what_goes_to_the_reference_path_is_counted_and_right(vlm):
    host, text = vlm.prompt(QUESTION, [picture(0)]), vlm.prompt(QUESTION, [])
    mixed = knockout([1]) + drop([2])
    rows = [Row(host, ANSWER), Row(host, ANSWER, mixed), Row(text, ANSWER), Row(host, ANSWER, drop([3]))]
    ours, cost = run(vlm, rows)
    assert cost.rows == 4 and cost.reference_rows == 2 and set(cost.reasons.values()) == {1}
    assert_equal(ours, run(vlm, rows, "reference")[0])


def test_a_mask_that_is_not_causal_goes_to_the_reference_path(vlm, monkeypatch):
    """As sliding windows would have it."""

    def windowed(*args, **kwargs):
        mask = torch.ones(kwargs["q_length"], kwargs["kv_length"], dtype=torch.bool).tril().triu(-8)
        return mask.expand(kwargs["batch_size"], 1, -1, -1)

    host = vlm.prompt(QUESTION, [picture(0)])
    monkeypatch.setitem(engine.AttentionMaskInterface._global_mapping, engine.NAME, windowed)
    _, cost = run(vlm, [Row(host, ANSWER)])
    assert cost.reference_rows == 1 and "window" in next(iter(cost.reasons))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_one_switch_for_the_backend(vlm, backend, monkeypatch):
    host = vlm.prompt(QUESTION, [picture(0)])
    rows = sweep(host, lambda k: drop([k]))
    plain, _ = run(vlm, rows)
    monkeypatch.setattr(engine, "BACKEND", backend)
    assert_equal(run(vlm, rows)[0], plain)


# --- nothing is left behind (R18) -----------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("fails_at", [None, 0, 2, LAYERS - 1])
def test_the_model_is_untouched_afterwards(vlm, monkeypatch, fails_at):
    host = vlm.prompt(QUESTION, [picture(0)])
    plain = {k: v for k, v in host.inputs.items()}
    before = vlm.model(**plain).logits
    modules = {id(m): dict(m.__dict__) for m in vlm.layers.modules()}
    if fails_at is not None:
        attend = engine._Sweep._attend

        def failing(self, *args):
            if self.index == fails_at:
                raise RuntimeError("boom")
            return attend(self, *args)

        monkeypatch.setattr(engine._Sweep, "_attend", failing)
        with pytest.raises(RuntimeError, match="boom"):
            run(vlm, sweep(host, lambda k: drop([k])))
    else:
        run(vlm, sweep(host, lambda k: drop([k])))
    assert engine._SWEEP.get() is None
    assert vlm.text_config._attn_implementation == "sdpa"
    assert all(m.__dict__.keys() == modules[id(m)].keys() for m in vlm.layers.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vlm.layers.modules())
    assert torch.equal(before, vlm.model(**plain).logits)


def test_errors_are_those_of_the_reference_path(vlm):
    host = vlm.prompt(QUESTION, [picture(0)])
    for rows in (
        [Row(host, ANSWER, drop([LAYERS]))],
        [Row(host, ANSWER, drop([0], spans=[3]))],
        [Row(host, ANSWER, drop([1]) + drop([1], phase="decode"))],
    ):
        messages = []
        for path in ("engine", "reference"):
            with pytest.raises(ConfigError) as error:
                run(vlm, rows, path)
            messages.append(error.value.message)
        assert messages[0] == messages[1]


def test_base_rows_ride_with_their_branches(vlm):
    """Rows below their first layer share bits with the base: a branch that changes nothing equals it."""
    host = vlm.prompt(QUESTION, [picture(0)])
    (base, same), _ = run(vlm, [Row(host, ANSWER, BASE), Row(host, ANSWER, swap([2], "me"), {"me": host})])
    torch.testing.assert_close(torch.tensor(base.logprobs), torch.tensor(same.logprobs), atol=1e-6, rtol=0)


def test_long_prompts_are_not_computed_anew_for_every_few_rows(vlm):
    """Whatever the budget, rows of prompts that are there wait only for suffix tokens."""
    a, b = (vlm.prompt(QUESTION, [picture(seed)]) for seed in (0, 1))
    rows = [Row(a, ANSWER, swap([k], "d"), {"d": b}) for k in range(LAYERS)]
    rows += [Row(b, ANSWER, swap([k], "d"), {"d": a}) for k in range(LAYERS)]
    suffix = a.length - a.spans[0][1] + len(ANSWER)
    found = list(batches(rows, len(rows) * suffix))
    assert len(found) == 1 and 2 * a.length > suffix
    assert [len(batch) for batch in batches(rows, 2 * suffix)] == [2] * (len(rows) // 2)


def test_padding_counts_in_the_budget(vlm):
    """One long prompt among short ones: what the batch holds is counted as padded."""
    short, long = vlm.prompt("who ?", [picture(0)]), vlm.prompt(QUESTION * 8, [picture(1)])
    rows = [Row(long, ANSWER), *(Row(replace(short), ANSWER) for _ in range(6))]
    for batch in batches(rows, 4 * long.length):
        prompts = len({id(row.prompt) for row in batch}) * max(row.prompt.length for row in batch)
        assert len(batch) == 1 or prompts <= 4 * long.length


def test_logits_that_are_not_finite_are_an_error(vlm):
    host = vlm.prompt(QUESTION, [picture(0)])
    weight = vlm.layers[1].mlp.down_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        for path in ("engine", "reference"):
            with pytest.raises(NumericError, match="not finite"):
                run(vlm, [Row(host, ANSWER)], path)
        with pytest.raises(NumericError, match="not finite"):
            generate(vlm, [host], 3)
    finally:
        with torch.no_grad():
            weight.copy_(before)

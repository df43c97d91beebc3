"""When an intervention holds during generation, against its definition: one token a pass on a KV cache that
is edited (swap), or whose image keys are hidden (drop), as soon as the first bound token is fed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch
from pictures import picture
from tiny_models import LAYERS, tiny_vlm
from transformers import DynamicCache

from vfl_train.errors import ConfigError
from vfl_train.interventions import BASE, Intervention, Row, drop, read_out, swap
from vfl_train.interventions.generation import generate_under
from vfl_train.interventions.hooks import attention_named
from vfl_train.interventions.readout import Cost

STEPS = 5
QUESTION = "what text is written here ?"


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl", "llava", "gemma3"])
def vlm(request):
    return tiny_vlm(request.param)


@pytest.fixture
def prompts(vlm):
    return [vlm.prompt(QUESTION, [picture(seed)]) for seed in (0, 1)]


@dataclass
class Decoder:
    """Feeds a prompt and what follows to a model with a cache that forgets nothing."""

    vlm: object
    prompt: object

    def __post_init__(self):
        self.ids: list[int] = self.prompt.inputs["input_ids"][0].tolist()
        self.fed, self.cache = 0, DynamicCache()

    def feed(self, stop: int) -> torch.Tensor:
        """Logits [V] after the tokens before `stop`."""
        start, inputs = self.fed, {}
        if start == 0:
            ids = self.prompt.inputs["input_ids"]
            inputs = {k: v[:, :stop] if v.shape == ids.shape else v for k, v in self.prompt.inputs.items()}
        inputs["input_ids"] = torch.tensor([self.ids[start:stop]])
        inputs["attention_mask"] = torch.ones(1, stop, dtype=torch.long)
        if "image_grid_thw" in self.prompt.inputs:
            inputs["position_ids"] = self._positions()[..., start:stop]
        self.fed = stop
        return self.vlm.model(**inputs, past_key_values=self.cache, use_cache=True).logits[0, -1]

    def _positions(self) -> torch.Tensor:
        """M-RoPE: of the prompt as the model says, then counting on."""
        given = self.prompt.inputs
        of_prompt, _ = self.vlm.model.model.get_rope_index(
            given["input_ids"], given["mm_token_type_ids"], image_grid_thw=given["image_grid_thw"]
        )
        more = torch.arange(1, len(self.ids) - self.prompt.length + 1)
        return torch.cat([of_prompt, (of_prompt.max() + more).expand(3, 1, -1)], dim=-1)


@torch.no_grad()
def defined(vlm, host, donor, kind: str, layers, first_bound: int) -> tuple[list[int], list[float]]:
    """STEPS tokens and their log-probabilities; every token from position `first_bound` on is bound."""
    (start, stop), decoder = host.spans[0], Decoder(vlm, host)
    said, logprobs = [], []

    def hide(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[..., start:stop] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    with ExitStack() as undo, attention_named(vlm.text_config, "eager"):
        logits = decoder.feed(min(first_bound, host.length))
        begun = False
        while True:
            if decoder.fed == len(decoder.ids):
                logprobs.append(float(logits.log_softmax(-1).max()))
                said.append(int(logits.argmax()))
                decoder.ids.append(said[-1])
                if len(said) == STEPS:
                    return said, logprobs
            if kind and decoder.fed >= first_bound and not begun:
                begun = True
                theirs = Decoder(vlm, donor)
                theirs.feed(stop)
                for k in layers:
                    if kind == "drop":
                        hook = vlm.layers[k].self_attn.register_forward_pre_hook(hide, with_kwargs=True)
                        undo.callback(hook.remove)
                        continue
                    for name in ("keys", "values"):
                        ours = getattr(decoder.cache.layers[k], name)
                        ours[:, :, start:stop] = getattr(theirs.cache.layers[k], name)[:, :, start:stop]
            logits = decoder.feed(decoder.fed + 1)


def cases(host) -> list[tuple[str, list[int], dict, int]]:
    """(kind, layers, when by our words, first bound position)."""
    when = [({"phase": "text"}, host.spans[0][1]), ({"phase": "decode"}, host.length - 1)]
    when += [({"phase": "decode", "from_step": t}, host.length - 1 + t) for t in (1, 3)]
    return [(kind, layers, words, first) for kind in ("drop", "swap") for layers in ([1], list(range(LAYERS)))
            for words, first in when]  # fmt: skip


def branch_of(kind: str, layers: list[int], words: dict):
    return drop(layers, **words) if kind == "drop" else swap(layers, "d", **words)


@pytest.mark.parametrize("path", ["reference", "engine"])
def test_generation_is_as_defined(vlm, prompts, path):
    host, donor = prompts
    wanted = [([*defined(vlm, host, donor, "", [], host.length)], BASE)]
    wanted += [
        ([*defined(vlm, host, donor, kind, layers, first)], branch_of(kind, layers, words))
        for kind, layers, words, first in cases(host)
    ]
    assert len({round(logprobs[-1], 3) for (_, logprobs), _ in wanted}) > 12, "few are felt at all"
    kept = [(said, logprobs, b) for (said, logprobs), b in wanted if vlm.image_token_id not in said]
    rows = [Row(host, tuple(said), b, {"d": donor} if b else {}) for said, _, b in kept]
    cost = Cost()
    for found, (said, logprobs, branch) in zip(read_out(vlm, rows, path, cost=cost), kept, strict=True):
        assert found.logprobs == pytest.approx(logprobs, abs=3e-5), branch
        assert list(found.predicted) == said, branch
    undrafted = [Row(r.prompt, (), r.branch, r.donors) for r in rows]
    for found, (said, _, branch) in zip(
        generate_under(vlm, undrafted, STEPS, path, cost=cost), kept, strict=True
    ):
        assert list(found) == said[: len(found)], branch
        assert len(found) == STEPS or found[-1] in vlm.eos_token_ids
    assert cost.reference_rows == 0


@pytest.mark.parametrize("path", ["reference", "engine"])
def test_nothing_changes_before_the_step_and_something_after(vlm, prompts, path):
    host = prompts[0]
    answer = (7, 11, 5, 9)
    rows = [Row(host, answer), Row(host, answer, drop(range(LAYERS), "decode"))]
    rows += [Row(host, answer, drop(range(LAYERS), "decode", from_step=t)) for t in range(len(answer) + 2)]
    base, decode, *from_step = (r.logprobs for r in read_out(vlm, rows, path))
    assert from_step[0] == pytest.approx(decode, abs=2e-6)
    for t, found in enumerate(from_step):
        assert found[:t] == pytest.approx(base[:t], abs=2e-6)
        assert all(abs(a - b) > 1e-3 for a, b in zip(found[t : t + 1], base[t : t + 1], strict=True))


def test_the_engine_generates_without_any_intervention(vlm, prompts):
    """Rows of a prompt whose answers alone are read: no answer becomes part of the shared prefix."""
    rows = [Row(prompts[0]), Row(prompts[0], (7, 8, 9, 10), targets=(prompts[0].length + 3,))]
    for path in ("engine", "reference"):
        assert len(generate_under(vlm, rows[:1], STEPS, path)[0]) == STEPS
    ours, theirs = (next(read_out(vlm, rows[1:], path)) for path in ("engine", "reference"))
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-5)


def test_a_step_without_a_meaning_is_refused(vlm, prompts):
    for settings in ({"kind": "drop", "phase": "text"}, {"kind": "knockout", "phase": "decode"}):
        with pytest.raises(ConfigError, match="only a drop or swap of phase decode"):
            Intervention(layers=frozenset([1]), from_step=2, **settings)
    with pytest.raises(ConfigError, match="no answer token -1"):
        drop([1], "decode", from_step=-1)
    mixed = drop([1], "decode", from_step=7) + drop([1], "decode", from_step=9)
    for path in ("engine", "reference"):
        with pytest.raises(ConfigError, match="different queries"):
            list(read_out(vlm, [Row(prompts[0], (7,), mixed)], path))

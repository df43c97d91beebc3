"""Prompts with examples in them: interventions on the examples' images alone and on the question's alone, on
both paths, against definitions written here."""

from __future__ import annotations

import pytest
import torch
from pictures import picture
from tiny_models import LAYERS, tiny_vlm
from transformers import DynamicCache

from vfl_train.data.rows import Image, Message, Text, assistant_message
from vfl_train.interventions import Row, drop, read_out, swap
from vfl_train.interventions.generation import generate_under
from vfl_train.interventions.hooks import attention_named
from vfl_train.interventions.readout import Cost

ANSWER = (7, 11, 5)
LAST = {  # the question's turn, given the number of its image
    "image first": lambda i: (Image(i), Text("what text is written ?")),
    "image last": lambda i: (Text("what text is written ?"), Image(i)),
    "text on both sides": lambda i: (Text("three cats,"), Image(i), Text("who ?")),
}


def conversation(vlm, shots: int, form: str = "image first", seed: int = 0):
    """Examples of an image, a question and an answer, then a question about an image."""
    return vlm.prompt_of(turns(shots, form), [picture(seed + i) for i in range(shots + 1)])


def turns(shots: int, form: str = "image first") -> list[Message]:
    found: list[Message] = []
    for i in range(shots):
        found += [Message("user", (Image(i), Text("who ?"))), assistant_message(("cats", "dogs")[i % 2])]
    return [*found, Message("user", LAST[form](shots))]


def which(shots: int) -> dict[str, frozenset[int]]:
    return {
        "all": frozenset(range(shots + 1)),
        "examples": frozenset(range(shots)),
        "question": frozenset([shots]),
    }


# --- the definitions -----------------------------------------------------------------------------


@torch.no_grad()
def arguments_of_decoder(vlm, prompt) -> dict[str, torch.Tensor]:
    """What the model hands its decoder for a prompt and ANSWER: embeddings and positions of every token."""
    seen = {}

    def keep(module, args, kwargs):
        seen.update({k: kwargs[k] for k in ("inputs_embeds", "position_ids")})

    inputs, shape = dict(prompt.inputs), prompt.inputs["input_ids"].shape
    for key, tensor in prompt.inputs.items():
        if tensor.shape == shape:
            tail = ANSWER if key == "input_ids" else (int(key == "attention_mask"),) * len(ANSWER)
            inputs[key] = torch.cat([tensor, torch.tensor([tail])], dim=1)
    handle = vlm.model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    try:
        seen["logits"] = vlm.model(**inputs).logits[0]
    finally:
        handle.remove()
    return {**seen, "inputs": inputs}


def of_answer(logits: torch.Tensor, prompt) -> list[float]:
    scores = logits[prompt.length - 1 :][: len(ANSWER)].log_softmax(-1)
    return scores.gather(1, torch.tensor(ANSWER)[:, None])[:, 0].tolist()


@torch.no_grad()
def dropped(vlm, prompt, layers, touched) -> list[float]:
    """Pair by pair: may this token see that one at these layers?"""
    length = prompt.length + len(ANSWER)
    in_image = [any(a <= i < b for a, b in prompt.spans) for i in range(length)]
    hidden = torch.zeros(length, length, dtype=torch.bool)
    after = min(prompt.spans[s][1] for s in touched)
    for query in range(after, length):
        for s in touched:
            if not in_image[query]:
                hidden[query, slice(*prompt.spans[s])] = True

    def hide(module, args, kwargs):
        mask = kwargs["attention_mask"]
        return args, {**kwargs, "attention_mask": mask.masked_fill(hidden, torch.finfo(mask.dtype).min)}

    handles = [vlm.layers[k].self_attn.register_forward_pre_hook(hide, with_kwargs=True) for k in layers]
    try:
        with attention_named(vlm.text_config, "eager"):
            return of_answer(arguments_of_decoder(vlm, prompt)["logits"], prompt)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def swapped(vlm, prompt, donor, layers, touched) -> list[float]:
    """Stretch by stretch through a cache: before text is read, the touched images that lie behind it hold the
    donor's keys and values; before an image is, their own."""
    decoder = vlm.model.get_decoder()
    theirs, ours = DynamicCache(), DynamicCache()
    given = arguments_of_decoder(vlm, donor)
    decoder(**_from(given, 0, donor.length), past_key_values=theirs, use_cache=True)
    given, end, at, out = arguments_of_decoder(vlm, prompt), prompt.length + len(ANSWER), 0, []
    own: dict[tuple[int, int, str], torch.Tensor] = {}
    stretches = [(stop, is_image) for a, b in prompt.spans for stop, is_image in ((a, False), (b, True))]
    for stop, is_image in [*stretches, (end, False)]:
        if stop == at:
            continue
        for s in touched:
            span = slice(*prompt.spans[s])
            for k in layers if span.stop <= at else ():
                for name in ("keys", "values"):
                    tensor = getattr(ours.layers[k], name)
                    mine = own.setdefault((s, k, name), tensor[:, :, span].clone())
                    other = getattr(theirs.layers[k], name)[:, :, slice(*donor.spans[s])]
                    tensor[:, :, span] = mine if is_image else other
        out.append(decoder(**_from(given, at, stop), past_key_values=ours, use_cache=True)[0][0])
        at = stop
    return of_answer(vlm.model.get_output_embeddings()(torch.cat(out)), prompt)


def _from(given: dict, start: int, stop: int) -> dict[str, torch.Tensor]:
    return {
        "inputs_embeds": given["inputs_embeds"][:, start:stop],
        "position_ids": None if given["position_ids"] is None else given["position_ids"][..., start:stop],
        "attention_mask": torch.ones(1, stop, dtype=torch.long),
    }


# --- both paths ----------------------------------------------------------------------------------


def run(vlm, rows, path: str) -> tuple[list, Cost]:
    cost = Cost()
    return [r.logprobs for r in read_out(vlm, rows, path, cost=cost)], cost


@pytest.mark.parametrize("form", LAST)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "internvl", "gemma3"])
def test_drops_of_examples_and_question_are_as_defined(family, form):
    vlm, shots = tiny_vlm(family), 4
    prompt = conversation(vlm, shots, form)
    assert len(prompt.spans) == shots + 1
    cases = [(layers, spans) for layers in ([1], range(LAYERS)) for spans in which(shots).values()]
    wanted = [dropped(vlm, prompt, layers, spans) for layers, spans in cases]
    rows = [Row(prompt, ANSWER, drop(layers, spans=spans)) for layers, spans in cases]
    for path in ("reference", "engine"):
        found, cost = run(vlm, rows, path)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours == pytest.approx(theirs, abs=3e-5)
        # The engine runs what binds nothing before the last image and says why it does not run the rest.
        between = sum(min(spans) < shots for _, spans in cases) if path == "engine" else 0
        assert (cost.rows, cost.reference_rows) == (len(rows), between)
        assert dict(cost.reasons) == ({"text between images is bound": between} if between else {})
    base = run(vlm, [Row(prompt, ANSWER)], "engine")[0][0]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert max(abs(x - y) for x, y in zip(wanted[3 + a], wanted[3 + b], strict=True)) > 1e-3
    assert all(max(abs(x - y) for x, y in zip(base, w, strict=True)) > 1e-3 for w in wanted[3:])


@pytest.mark.parametrize("shots", [4, 8])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_swaps_of_examples_and_question_are_as_defined(family, shots):
    vlm = tiny_vlm(family)
    prompt, donor = (conversation(vlm, shots, seed=seed) for seed in (0, 20))
    cases = [(layers, spans) for layers in ([1], range(LAYERS)) for spans in which(shots).values()]
    wanted = [swapped(vlm, prompt, donor, layers, spans) for layers, spans in cases]
    rows = [Row(prompt, ANSWER, swap(layers, "d", spans=spans), {"d": donor}) for layers, spans in cases]
    for path in ("reference", "engine"):
        found, cost = run(vlm, rows, path)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours == pytest.approx(theirs, abs=3e-5)
        assert cost.reference_rows == (4 if path == "engine" else 0)
    assert len({round(w[0], 3) for w in wanted}) > 3, "the swaps are hardly felt: the test shows nothing"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_what_is_dropped_everywhere_is_forgotten(family):
    """Another image for the question changes nothing then. Another example does, though its image is dropped:
    the tokens of the question's image have seen it, and image queries are never bound."""
    vlm, shots = tiny_vlm(family), 4
    prompt = conversation(vlm, shots)
    another = {}
    for name, changed in (("question", shots), ("examples", 0)):
        images = [picture(30 + i if i == changed else i) for i in range(shots + 1)]
        another[name] = vlm.prompt_of(turns(shots), images)
    for name, forgotten in (("question", True), ("examples", False)):
        branch = drop(range(LAYERS), spans=which(shots)[name])
        rows = [Row(p, (), branch) for p in (prompt, another[name])]
        said = generate_under(vlm, rows, 4, "engine")
        assert said == generate_under(vlm, rows, 4, "reference")
        a, b = run(vlm, [Row(p, ANSWER, branch) for p in (prompt, another[name])], "reference")[0]
        assert (a == pytest.approx(b, abs=3e-5)) == forgotten
        assert said[0] == said[1] or not forgotten

"""Fixed prompts on which a saved model must answer as it did before it was saved.

The reference kept beside a model holds, for each prompt, the 32 largest next-token logits and 32 more
spread over the vocabulary, and the first tokens it writes: a few kilobytes, and enough to notice any change
of weights or preprocessing.

This file is read by a process that imports nothing of this package (see `reload`), so it imports nothing of
it either.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from PIL import Image

REFERENCE = "logits_reference.json"
SAMPLES = 4
_SIDE, _KEPT = 64, 32  # pixels, logits
_WRITTEN = 8  # tokens generated a prompt
_QUESTIONS = ("what is in the image ?", "how many objects are there ?", "what text is written ?")
# Largest difference of two logits, as a share of the largest logit. float32 leaves room for another order
# of summation, the 16-bit formats for the rounding of weights and activations.
BOUNDS = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 5e-3}


def sample_inputs(processor: Any, count: int = SAMPLES, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """`count` prompts with one image each, as the processor returns them (batch of one)."""
    rng = np.random.default_rng(seed)
    inputs = []
    for index in range(count):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels.repeat(_SIDE // 8, axis=0).repeat(_SIDE // 8, axis=1))
        content = [{"type": "image"}, {"type": "text", "text": _QUESTIONS[index % len(_QUESTIONS)]}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        made = processor(text=[text], images=[[image]], return_tensors="pt")
        inputs.append({key: value for key, value in made.items() if key != "labels"})  # PaliGemma's
    return inputs


@torch.no_grad()
def next_logits(model: Any, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Next-token logits [V] of each prompt, float32 on the CPU."""
    return [_last_logits(model, _moved(model, sample)) for sample in inputs]


def _moved(model: Any, sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A prompt on the model's device and in its number format."""
    device, dtype = model.device, model.dtype
    return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in sample.items()}


def _last_logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs, use_cache=False).logits[0, -1].float().cpu()


@torch.no_grad()
def greedy(model: Any, inputs: list[dict[str, torch.Tensor]]) -> list[list[tuple[int, torch.Tensor]]]:
    """The first tokens the model writes after each prompt, greedily, each with the logits [V] (float32, CPU)
    that it was chosen by. Not `generate`: its settings are the folder's, and some of them draw or punish."""
    out = []
    for sample in inputs:
        moved = _moved(model, sample)
        written: list[tuple[int, torch.Tensor]] = []
        for _ in range(_WRITTEN):
            logits = _last_logits(model, moved)
            token = int(logits.argmax())
            written.append((token, logits))
            if token in _placeholders(model):
                break  # with it in its input the model would ask for another image
            moved = _longer(moved, token)
        out.append(written)
    return out


def _placeholders(model: Any) -> set[int]:
    """Ids of the tokens that stand for images and videos."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return {i for i in (getattr(model.config, name, None) for name in names) if i is not None}


def _longer(inputs: dict[str, torch.Tensor], token: int) -> dict[str, torch.Tensor]:
    """`inputs` with one more text token at the end of everything that has one entry a token."""
    ids = inputs["input_ids"]
    more = {"input_ids": token, "attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}
    longer = {
        key: torch.cat([value, value.new_full((1, 1), more[key])], 1)
        if key in more and value.shape == ids.shape
        else value
        for key, value in inputs.items()
    }
    if (mask := inputs.get("cross_attention_mask")) is not None:  # the new token sees what the last one sees
        longer["cross_attention_mask"] = torch.cat([mask, mask[:, -1:]], 1)
    return longer


def relative_difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest |a - b| over all prompts, divided by the largest |b|."""
    largest = max(float(y.abs().max()) for y in b)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / max(largest, 1e-30)


def make_reference(model: Any, processor: Any, seed: int = 0) -> dict[str, Any]:
    """The reference of a model in eval mode, as plain JSON."""
    inputs = sample_inputs(processor, SAMPLES, seed)
    prompts = []
    for sample, written in zip(inputs, greedy(model, inputs), strict=True):
        logits = written[0][1]
        spread = torch.linspace(0, len(logits) - 1, min(_KEPT, len(logits))).long()
        ids = torch.cat([logits.topk(min(_KEPT, len(logits))).indices, spread]).unique()
        entry = {"tokens": _digest(sample["input_ids"]), "ids": ids.tolist(), "logits": logits[ids].tolist()}
        prompts.append({**entry, "written": [token for token, _ in written]})
    dtype = str(model.dtype).removeprefix("torch.")
    reference = {"seed": seed, "dtype": dtype, "device": model.device.type, "prompts": prompts}
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        reference["quantization"] = json.loads(json.dumps(quantization.to_dict(), default=str))
    return reference


def compare_reference(
    reference: dict[str, Any], inputs: list[dict[str, torch.Tensor]], logits: list[torch.Tensor]
) -> tuple[float, bool]:
    """(relative difference to the reference, whether the processor made the same tokens) over the prompts
    that both have."""
    pairs = list(zip(reference["prompts"], inputs, logits, strict=False))
    same = all(entry["tokens"] == _digest(sample["input_ids"]) for entry, sample, _ in pairs)
    ours = [full[torch.tensor(entry["ids"])] for entry, _, full in pairs]
    return relative_difference(ours, [torch.tensor(entry["logits"]) for entry, _, _ in pairs]), same


def compare_written(
    reference: dict[str, Any], written: list[list[tuple[int, torch.Tensor]]]
) -> tuple[int, int, float] | None:
    """(prompts, prompts with the same tokens, gap) of what was written now against the reference; None where
    the reference is older than this. The gap is how much better this model likes its own token than the
    reference's where the two part, as a share of the largest logit: rounding alone keeps it tiny."""
    both = zip(reference["prompts"], written, strict=False)
    pairs = [(entry["written"], now) for entry, now in both if "written" in entry]
    same, gap = 0, 0.0
    for then, now in pairs:
        parted = next((i for i, (a, (b, _)) in enumerate(zip(then, now, strict=True)) if a != b), None)
        if parted is None:
            same += 1
            continue
        token, logits = now[parted]
        gap = max(gap, float(logits[token] - logits[then[parted]]) / max(float(logits.abs().max()), 1e-30))
    return (len(pairs), same, gap) if pairs else None


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(str(ids.flatten().tolist()).encode()).hexdigest()[:16]

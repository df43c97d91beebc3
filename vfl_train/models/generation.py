"""The model's own output: greedy argmax of the raw logits, batched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, LogitsProcessor

from vfl_train.errors import NumericError
from vfl_train.models.batching import alike, stack

if TYPE_CHECKING:
    from vfl_train.interventions.readout import Prompt
    from vfl_train.models.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Generated:
    """`tokens` as generated, the end token included unless the length cap cut the answer."""

    tokens: tuple[int, ...]
    text: str


def check_finite(best: torch.Tensor) -> None:
    """Raises NumericError unless all of `best`, the largest logits, are finite: an argmax of NaN looks like
    any other token."""
    if not bool(best.isfinite().all()):
        raise NumericError("the model's logits are not finite", "try --dtype float32 or bfloat16")


class _Finite(LogitsProcessor):
    """Looks at the raw logits of every step and leaves them as they are."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        check_finite(scores.amax(-1))
        return scores


@contextmanager
def _greedy(vlm: VisionLanguageModel) -> Iterator[GenerationConfig]:
    """A generation config of ours alone: transformers fills what a passed config leaves open from the
    model's own (repetition penalties, sampling), so that one is set aside meanwhile."""
    own, eos = vlm.base.generation_config, list(vlm.eos_token_ids)
    config = GenerationConfig(do_sample=False, num_beams=1, eos_token_id=eos, pad_token_id=vlm.pad_token_id)
    vlm.base.generation_config = config
    try:
        yield config
    finally:
        vlm.base.generation_config = own


@torch.no_grad()
def generate(
    vlm: VisionLanguageModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 32,
    batch_tokens: int = 8192,
    batch_size: int | None = None,
) -> list[Generated]:
    """Greedy outputs of `prompts`, in order. Sampling settings and penalties of the model's generation
    config are ignored, its end tokens are used. Prompts of equal length share a batch of at most
    `batch_tokens` tokens and `batch_size` prompts, so there is no padding. Raises NumericError."""
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].length)
    out: dict[int, Generated] = {}
    with _greedy(vlm) as config:
        config.max_new_tokens = max_new_tokens
        while order:
            length = prompts[order[0]].length
            size = max(1, batch_tokens // (length + max_new_tokens))
            size = min(size, batch_size or size)
            kind = alike(vlm, prompts[order[0]])
            batch = [i for i in order[:size] if (prompts[i].length, alike(vlm, prompts[i])) == (length, kind)]
            order = [i for i in order if i not in batch]
            inputs = stack(vlm, [(prompts[i], ()) for i in batch])
            ids = vlm.model.generate(**inputs, generation_config=config, logits_processor=[_Finite()])[
                :, length:
            ]
            for i, row in zip(batch, ids.tolist(), strict=True):
                tokens = _until_end(row, vlm.eos_token_ids)
                out[i] = Generated(tokens, vlm.decode(tokens))
    return [out[i] for i in range(len(prompts))]


def _until_end(tokens: Sequence[int], eos: Sequence[int]) -> tuple[int, ...]:
    for i, token in enumerate(tokens):
        if token in eos:
            return tuple(tokens[: i + 1])
    return tuple(tokens)

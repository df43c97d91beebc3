"""Attention with equal weights on every key that a query may see.

A query of zeros scores all keys alike, so the softmax over those that the mask leaves gives them equal
weights. It is set after projection, norms and RoPE, in transformers' attention interface; the rest is SDPA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vfl_train.errors import ConfigError
from vfl_train.interventions.hooks import Rows, attention_named
from vfl_train.interventions.reference import check_attention

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel

NAME = "vfl_uniform"
RowsAt = Callable[[int], Rows | None]  # layer -> the batch rows whose attention is uniform there

_ROWS_AT: ContextVar[RowsAt | None] = ContextVar("vfl_uniform_rows", default=None)


def _attention(module: torch.nn.Module, query: torch.Tensor, *args, **kwargs):
    """Attention function: SDPA, with the queries of the wanted rows zeroed."""
    rows_at = _ROWS_AT.get()
    if rows_at is None:
        raise RuntimeError("uniform attention outside of its context")
    if (reason := check_attention(module, kwargs)) is not None:
        raise ConfigError(f"{reason}, which uniform attention does not compute here")
    rows = rows_at(int(module.layer_idx))  # type: ignore[arg-type]
    if rows is not None:
        query = query.clone()
        query[rows] = 0
    return sdpa_attention_forward(module, query, *args, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def uniform_attention(vlm: VisionLanguageModel, rows_at: RowsAt) -> Iterator[None]:
    """Uniform attention for the forwards inside; the model is untouched again afterwards."""
    token = _ROWS_AT.set(rows_at)
    try:
        with attention_named(vlm.text_config, NAME):
            yield
    finally:
        _ROWS_AT.reset(token)

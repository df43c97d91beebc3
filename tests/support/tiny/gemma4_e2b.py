"""Gemma 4 in the form of E2B and E4B: embeddings of each token for every layer, the last layers read keys and
values of earlier ones, causal everywhere."""

from __future__ import annotations

import torch
from tiny.gemma4 import TEMPLATE, gemma4
from transformers import Gemma4Processor


def build(seed: int = 0) -> tuple[torch.nn.Module, Gemma4Processor]:
    return gemma4(seed, TEMPLATE, hidden_size_per_layer_input=8, num_kv_shared_layers=2)

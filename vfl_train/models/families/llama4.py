"""Llama 4. Layers without RoPE scale their queries by how far they stand in the sequence that the layer is
given, from position 8191 on: a suffix by itself would be counted from its own start, so the engine runs none.
Chunked attention, 8192 tokens, is in the model's own masks, which the reference path keeps.
"""

from __future__ import annotations

from vfl_train.models.families.family import Family

LLAMA4 = Family(
    mlp="feed_forward",
    linears=(
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj",
    ),
    moe=("feed_forward.experts", "feed_forward.router"),
    connectors=("multi_modal_projector",),
    reference_only="layers count positions from the start of what they are given",
)  # fmt: skip

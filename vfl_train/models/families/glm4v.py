"""GLM-4.1V has one matrix for the gate and up projections of an MLP.

Source of the boxes: zai-org's GLM-V grounding skill (relative coordinates, 0 to 1000).
"""

from __future__ import annotations

from vfl_train.models.families.family import Family

GLM4V = Family(
    linears=(*Family().linears, "mlp.gate_up_proj"),
    box="relative-1000",
)

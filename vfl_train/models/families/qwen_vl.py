"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL differ in how they write boxes; Qwen3-VL adds image features of several
depths to the hidden states after its first decoder layers (deep stack).

Sources: Qwen2-VL, arXiv 2409.12191, 2.2 (coordinates normalised to [0, 1000)); Qwen2.5-VL, arXiv
2502.13923, 2.1 (coordinates of the input image's actual size); Qwen3-VL, arXiv 2511.21631 and its
2d_grounding cookbook (relative coordinates, 0 to 1000).
"""

from __future__ import annotations

from vfl_train.models.families.family import Family

QWEN2_VL = Family(box="relative-1000", video=True)
QWEN2_5_VL = Family(box="pixels", video=True)
QWEN3_VL = Family(box="relative-1000", adds_between_layers=True, video=True)

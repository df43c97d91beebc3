"""DeepSeek-VL 7B joins what two encoders (SigLIP at 384, SAM at 1024 pixels) see of an image, feature by
feature, in its aligner: to the decoder it is one image of 576 tokens.

The high-resolution tower is not what transformers calls the image encoder: `--also-adapt vision` leaves it.
"""

from __future__ import annotations

from vfl_train.models.families.family import Family

DEEPSEEK_VL_HYBRID = Family(connectors=(*Family().connectors, "model.aligner"))

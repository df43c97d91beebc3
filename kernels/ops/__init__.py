"""Attention for interventions on the vision KV cache.

Import it as vfl_train.kernels. The folder above has no __init__.py on purpose: with one, a checkout on the
path would shadow the package `kernels` of Hugging Face, which transformers imports where it is installed.
"""

from vfl_train.kernels.vision_kv import vision_kv_attention

__all__ = ["vision_kv_attention"]

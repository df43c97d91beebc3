"""Built-in probe pairs for real models, rendered with Pillow: nothing is downloaded."""

from vfl_train.functions.builtin.assemble import probe_set

__all__ = ["probe_set"]

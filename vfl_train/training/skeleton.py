"""A model without its weights (meta tensors): enough to plan, at no cost even for a large model."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vfl_train.errors import ConfigError
from vfl_train.models import VisionLanguageModel, load_processor, local_folder


def load_skeleton(
    name: str, revision: str | None = None, max_pixels: int | None = None
) -> VisionLanguageModel:
    """The module tree of a model on the meta device, with its processor (whose pixels `max_pixels` limits).
    Raises ConfigError, HubError."""
    folder = local_folder(name, revision, weights=False)
    processor = load_processor(name, revision, max_pixels)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"cannot read the configuration of {name}: {str(e).splitlines()[0]}") from e
    return VisionLanguageModel(model, processor, name, revision, folder)

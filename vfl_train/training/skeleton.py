"""A model without its weights (meta tensors): enough to plan, at no cost even for a large model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vfl_train.errors import ConfigError
from vfl_train.models import VisionLanguageModel, load_processor, resolve_name
from vfl_train.models.trust import check_config


def load_skeleton(name: str, revision: str | None = None) -> VisionLanguageModel:
    """The module tree of a model on the meta device, with its processor. Raises ConfigError, HubError."""
    path, local = resolve_name(name)
    processor = load_processor(name, revision)
    try:
        config = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=False, local_files_only=local
        )
        check_config({k: v for k, v in config.to_dict().items() if not k.startswith("_")}, path)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"cannot read the configuration of {name}: {str(e).splitlines()[0]}") from e
    return VisionLanguageModel(model, processor, name, revision, Path(path) if local else None)

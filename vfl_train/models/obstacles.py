"""What a model must have for interventions to mean anything on it, checked before any work starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from vfl_train.errors import ConfigError

if TYPE_CHECKING:
    from vfl_train.models.vlm import VisionLanguageModel

NOT_READING = ("norm", "mlp", "feed_forward", "experts")  # children of a layer that read no other token
ALONE = "only what is in keys and values can be dropped or swapped"


def check_readable(vlm: VisionLanguageModel) -> None:
    """Raises ConfigError, in one sentence that names what is missing, for a model on which images cannot be
    dropped or swapped."""
    if (reason := _obstacle(vlm)) is not None:
        raise ConfigError(
            f"{vlm.model_type} models are not supported: {reason}",
            "use a model that reads images by attention in every decoder layer",
        )
    _ = vlm.image_token_id  # raises its own sentence


def _obstacle(vlm: VisionLanguageModel) -> str | None:
    """What stands between this model and interventions, or None."""
    missing = [k for k in range(vlm.num_layers) if vlm.attention_name(k) not in _children(vlm, k)]
    if missing:
        found = [name for name in _children(vlm, missing[0]) if not name.endswith(NOT_READING)]
        return (
            f"{len(missing)} of {vlm.num_layers} decoder layers have {' and '.join(found) or 'nothing'} in "
            f"place of self-attention, and {ALONE}"
        )
    if vlm.config.is_encoder_decoder:
        return f"the decoder reads an encoder's output in place of the image, and {ALONE} of an image"
    if any(name.endswith("indexer") for name, _ in vlm.layers.named_modules()):
        return f"decoder layers pick the tokens that they read by an indexer, and {ALONE}"
    decoder = vlm.base.get_submodule(vlm.decoder_name.rpartition(".")[0])
    if not getattr(decoder, "_supports_attention_backend", False):
        kind = type(decoder).__name__
        return f"the attention of {kind} does not go through transformers' attention interface"
    return None


def _children(vlm: VisionLanguageModel, layer: int) -> dict[str, nn.Module]:
    return dict(vlm.layers[layer].named_children())

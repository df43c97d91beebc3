"""Backward where it is needed and nowhere else.

LoRA on layers from `a` on needs no gradient below layer a, none in the vision tower, and none of their
activations. Autograd knows that by itself, as long as nobody makes the embeddings require grad, which is what
the usual switches do: transformers' and PEFT's `enable_input_require_grads`, hence TRL's default
(`gradient_checkpointing=True`) and `prepare_model_for_kbit_training`. They hook the input embeddings of every
submodel, the vision tower's too, so that backward visits everything, and `disable_input_require_grads` does
not undo it. So the enable API is never called here: the layers' own flags are set, one by one, and the hidden
state that enters layer a is cut off from whatever was below. TRL forces reentrant checkpointing under ZeRO-3,
which needs exactly that hidden state to require grad; it is told of no checkpointing and forces nothing.

What is not covered: layers that keep state between calls (none of transformers' decoders do in training).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from vfl_train.errors import ConfigError

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel
    from vfl_train.training.plan import LayerPlan


def lowest_trained(vlm: VisionLanguageModel, plan: LayerPlan) -> int | None:
    """The decoder layer below which no gradient is needed; None where something before the decoder is
    trained too (`--also-adapt`), so that gradients must go through all of it."""
    decoder = f"{vlm.decoder_name}."
    inside = all(name.startswith(decoder) for name in plan.module_names)
    return plan.lowest_layer if inside else None


def limit_backward(vlm: VisionLanguageModel, plan: LayerPlan, recompute: bool = False) -> None:
    """Let backward end at the lowest trained layer of `plan`; call it once, after LoRA is on the model.

    Args:
        recompute: keep only the inputs of the layers that backward visits and run these layers again in
            backward (`--activation-checkpointing`), by torch's non-reentrant method, under ZeRO-3 too. Of
            layers below nothing is kept in either case.

    Raises:
        ConfigError: the layers of this model cannot be recomputed.
    """
    lowest = lowest_trained(vlm, plan)
    if lowest is not None:
        vlm.layers[lowest].register_forward_pre_hook(_cut_off, with_kwargs=True)
    if recompute:
        for module in _visited(vlm, lowest):
            if not isinstance(module, GradientCheckpointingLayer):
                raise ConfigError(
                    f"the layers of this {vlm.model_type} ({type(module).__name__}) cannot be recomputed",
                    "leave --activation-checkpointing out",
                )
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _visited(vlm: VisionLanguageModel, lowest: int | None) -> list[nn.Module]:
    """What is recomputed: the decoder layers that backward visits, and where it goes on into the vision
    tower, the tower's layers too."""
    layers: list[nn.Module] = list(vlm.layers[lowest or 0 :])
    if lowest is None:
        decoder = set(vlm.base.get_decoder().modules())
        others = (m for m in vlm.base.modules() if m not in decoder)
        layers += [m for m in others if isinstance(m, GradientCheckpointingLayer)]
    return layers


def _cut_off(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the lowest trained layer: its hidden state [B, T, D] without a past."""
    if args:
        return (args[0].detach(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}

"""What implementations of interventions put on a model while they run, and take off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vfl_train.models import VisionLanguageModel

Rows = Sequence[int] | slice  # of the batch
Again = Callable[[int, torch.Tensor, dict[str, Any]], Any]  # (layer, hidden, its arguments) -> its output


@contextmanager
def attention_named(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """The attention of the decoder with this text configuration is the registered function `name` inside.
    Not by the public setter: where the text configuration is the whole one, that would set vision and audio
    too, and forget what they had."""
    before = config._attn_implementation_internal
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = before


@contextmanager
def in_place_of(module: torch.nn.Module, forward: Callable) -> Iterator[None]:
    """`forward` in place of the module's, which may be its class's or one that somebody put on it."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def named(forward: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a decoder layer is given beside hidden states, by name: some models give a part by position."""
    return {**dict(zip(list(signature(forward).parameters)[1:], args, strict=False)), **kwargs}


def silenced_modules(vlm: VisionLanguageModel, layer: int, module: str) -> list[str]:
    """What a knockout of `module` silences, by name inside decoder layer `layer`."""
    names = {"attention": vlm.attention_name(layer), "mlp": vlm.family.mlp}
    return list(names.values()) if module == "both" else [names[module]]


def silence(rows: Rows) -> Callable:
    """Forward hook that zeroes the output of `rows`."""

    def hook(module, args, output):
        hidden = hidden_of(output).clone()
        hidden[rows] = 0
        return like(output, hidden)

    return hook


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a module returned."""
    return output[0] if isinstance(output, tuple) else output


def like(output: Any, hidden: torch.Tensor) -> Any:
    """`hidden` in the form in which `output` was returned."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def run_again(
    vlm: VisionLanguageModel,
    rows_of: Mapping[tuple[int, str], Rows],
    undo: ExitStack,
    again: Again | None = None,
) -> None:
    """Make decoder layers run once more on the whole batch, and the result count for some rows.

    Args:
        rows_of: (layer, `end` or `itself`) -> the rows that it counts for.
        undo: is given what removes the hooks.
        again: how a layer runs once more. None: with the arguments that it had.
    """
    given: dict[int, dict[str, Any]] = {}

    def keep(layer: int) -> Callable:
        def hook(module, args, kwargs):
            # Masks and positions differ between layers. What layers keep for later ones (shared keys and
            # values) is the first run's: the second writes to a copy.
            own = named(module.forward, args[1:], kwargs)
            given[layer] = {k: copy(v) if isinstance(v, MutableMapping) else v for k, v in own.items()}

        return hook

    def hook_of(layers: list[int], at: str) -> Callable:
        def hook(module, args, output):
            hidden = hidden_of(output)
            for layer in layers:
                if layer not in given:
                    continue  # the model skipped it: cross-attention in a prompt without images
                if again is None:  # `forward`, not the call: the hooks here must not find themselves
                    second = vlm.layers[layer].forward(hidden, **given[layer])
                else:
                    second = again(layer, hidden, given[layer])
                hidden, rows = hidden.clone(), rows_of[layer, at]
                hidden[rows] = hidden_of(second)[rows]
            return like(output, hidden)

        return hook

    for layer, at in rows_of:
        undo.callback(vlm.layers[layer].register_forward_pre_hook(keep(layer), with_kwargs=True).remove)
        if at == "itself":
            undo.callback(vlm.layers[layer].register_forward_hook(hook_of([layer], at)).remove)
    if at_end := sorted(layer for layer, at in rows_of if at == "end"):
        # Registered last: what the last layer does right after itself comes before.
        last = vlm.layers[vlm.num_layers - 1]
        undo.callback(last.register_forward_hook(hook_of(at_end, "end")).remove)

"""Forward passes that end, or begin, at the input of a decoder layer.

The model's own forward runs in both cases, so that positions, rotary embeddings, masks and whatever else a
decoder layer is given are its own, of every family. To begin at layer a, a batch brings the hidden states
that enter it (`PREFIX_STATES`) instead of pixel values: without pixels the vision tower is not run, the
layers below a return what they are given, and layer a gets the batch's hidden states. Whether that is all
that the model takes from the image is not guessed: `refusal` compares both ways on a real row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vfl_train.interventions.hooks import hidden_of, in_place_of
from vfl_train.training.prefix_store import without_pixels

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel

PREFIX_STATES = "prefix_states"  # batch entry [B, T, D]
_TOLERANCE = {torch.float32: 1e-4}  # of the last layer's output, relative; the same kernels run on both ways
_TOLERANCE_REDUCED = 1e-2


class _Reached(Exception):
    """Leaves the model as soon as the wanted layer has its input."""


@contextmanager
def beginning_at(vlm: VisionLanguageModel, model: nn.Module, layer: int) -> Iterator[None]:
    """Inside, `model` (the outermost module that is called: PEFT's) takes batches with `PREFIX_STATES` and
    begins them at decoder layer `layer`; batches without run as ever."""
    given: list[torch.Tensor] = []  # the hidden states of the batch under way, if it brought them

    def take(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        if PREFIX_STATES in kwargs:
            given.append(kwargs.pop(PREFIX_STATES))
        return args, kwargs

    def passing(forward: Callable, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if given else forward(hidden_states, *args, **kwargs)

    with ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(take, with_kwargs=True).remove)
        undo.callback(model.register_forward_hook(lambda *_: given.clear(), always_call=True).remove)
        for below in vlm.layers[:layer]:
            undo.enter_context(in_place_of(below, partial(passing, below.forward)))
        # First of all hooks there: others (frozen's) are to see the hidden states that count.
        start = vlm.layers[layer].register_forward_pre_hook(
            partial(_replace, given), with_kwargs=True, prepend=True
        )
        undo.callback(start.remove)
        yield


def _replace(
    given: list[torch.Tensor], module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict]:
    if not given:
        return args, kwargs
    old = args[0] if args else kwargs["hidden_states"]
    new = given[0].to(old.device)
    if new.shape != old.shape:
        raise ValueError(f"prefix states {tuple(new.shape)} where {tuple(old.shape)} are due")
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


@torch.no_grad()
def states_at(
    vlm: VisionLanguageModel, batch: Mapping[str, Any], layer: int, autocast: torch.dtype | None
) -> torch.Tensor:
    """The hidden states [B, T, D] that enter decoder layer `layer`; no layer from there on is run."""
    found: list[torch.Tensor] = []

    def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    handle = vlm.layers[layer].register_forward_pre_hook(leave, with_kwargs=True)
    try:
        _forward(vlm, batch, autocast)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0].detach()


@torch.no_grad()
def refusal(
    vlm: VisionLanguageModel, batch: Mapping[str, Any], layer: int, autocast: torch.dtype | None
) -> str | None:
    """Why a batch (of one row) that begins at `layer` is not what it is when it runs whole, or None."""
    if any(vlm.reads_across(index) for index in range(layer, vlm.num_layers)):
        return f"layers of this {vlm.model_type} from {layer} on read the image, which the cache would lack"
    given: dict[int, torch.Tensor] = {}
    returned: dict[int, torch.Tensor] = {}
    with ExitStack() as undo:
        for index in range(layer, vlm.num_layers):
            module = vlm.layers[index]
            undo.callback(
                module.register_forward_pre_hook(_keep_input(given, index), with_kwargs=True).remove
            )
            undo.callback(module.register_forward_hook(_keep_output(returned, index)).remove)
        _forward(vlm, batch, autocast)
        whole, last = dict(returned), vlm.num_layers - 1
        for index in range(layer, last):
            if not torch.equal(whole[index], given[index + 1]):
                return (
                    f"this {vlm.model_type} adds something to the hidden states after layer {index}, "
                    "which the cache would lack (deep stack: image features)"
                )
        short = {**without_pixels(batch), PREFIX_STATES: given[layer]}
        with beginning_at(vlm, vlm.model, layer):
            try:
                _forward(vlm, short, autocast)
            except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as e:
                return f"this {vlm.model_type} cannot run without its images: {str(e).splitlines()[0]}"
    difference = (returned[last] - whole[last]).float().norm() / whole[last].float().norm()
    if difference > _TOLERANCE.get(whole[last].dtype, _TOLERANCE_REDUCED):
        return (
            f"the layers of this {vlm.model_type} from {layer} on get more of the image than the hidden "
            f"states that enter layer {layer}: without it their output differs by {difference:.1%}"
        )
    return None


def _keep_input(store: dict[int, torch.Tensor], index: int) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        store[index] = (args[0] if args else kwargs["hidden_states"]).detach()

    return hook


def _keep_output(store: dict[int, torch.Tensor], index: int) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        store[index] = hidden_of(output).detach()

    return hook


def _forward(vlm: VisionLanguageModel, batch: Mapping[str, Any], autocast: torch.dtype | None) -> None:
    """The whole model in eval mode without its loss; the head sees one position."""
    inputs = {
        name: value.to(vlm.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    training = vlm.model.training
    vlm.model.eval()
    try:
        with torch.autocast(vlm.device.type, dtype=autocast, enabled=autocast is not None):
            vlm.model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        vlm.model.train(training)

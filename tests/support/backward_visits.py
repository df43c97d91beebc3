"""What backward visits and what forward keeps for it, layer by layer; under checkpointing, DDP and ZeRO too.

    with watch(vlm) as seen:                 # before or after the model is wrapped by DDP or DeepSpeed
        ... one or more training steps ...
    assert seen.backward == {"layer 8": steps, "layer 9": steps, ...}
    assert seen.below(8) == Counter()        # nothing below, nothing in the vision tower or connector
    assert seen.forward["layer 8"] == 2 * steps  # under recomputation: the attention ran twice a step

`vlm` is a VisionLanguageModel, or anything with `.layers` (decoder layers) and `.base` (the whole model);
its modules are the ones that wrappers run, so nothing has to be unwrapped. In a process group every rank
counts its own; write the counters to a file per rank (they are plain dictionaries) and compare in the test.

Keys: "layer 3" for decoder layer 3, "vision" for whatever is neither in the decoder nor the head (tower and
connector together; backward counts module visits there, so any number above 0 is wrong).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Seen:
    """`backward`: how often a gradient reached the output of each region. `forward`: how often its
    attention ran, recomputation included. `kept`: bytes saved for backward, parameters not counted (under
    ZeRO-3, which gathers them into other storage, they are)."""

    backward: Counter[str] = field(default_factory=Counter)
    forward: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)

    def below(self, layer: int) -> Counter[str]:
        """Everything that backward visited or kept bytes of below decoder layer `layer` or in the tower."""
        lower = {f"layer {i}" for i in range(layer)} | {"vision", "embedding"}
        found = self.backward + self.kept
        return Counter({name: n for name, n in found.items() if name in lower and n})


@contextmanager
def watch(vlm: Any) -> Iterator[Seen]:
    """Counts inside the block; see the module's text."""
    seen, inside = Seen(), [""]
    with ExitStack() as undo:

        def on(module: torch.nn.Module, name: str) -> None:
            handles = (
                module.register_forward_pre_hook(lambda *_: inside.append(name)),
                module.register_forward_hook(_at_output(seen, name, inside), always_call=True),
            )
            for handle in handles:
                undo.callback(handle.remove)

        for name, module in _regions(vlm):
            on(module, name)
        for index, layer in enumerate(vlm.layers):
            attention = getattr(layer, "self_attn", None)
            if attention is not None:
                count = attention.register_forward_pre_hook(
                    lambda *_, name=f"layer {index}": seen.forward.update([name])
                )
                undo.callback(count.remove)
        parameters = {p.untyped_storage().data_ptr() for p in vlm.base.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                seen.kept[inside[-1]] += tensor.numel() * tensor.element_size()
            return tensor

        undo.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        yield seen


def _at_output(seen: Seen, name: str, inside: list[str]) -> Callable:
    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        inside.pop()
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: seen.backward.update([name]))

    return hook


def _regions(vlm: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Decoder layers, the embedding, and every module that shares nothing with decoder and head."""
    text = {*vlm.base.get_decoder().modules(), vlm.base.get_output_embeddings()}
    yield from ((f"layer {i}", layer) for i, layer in enumerate(vlm.layers))
    yield "embedding", vlm.base.get_input_embeddings()
    for module in vlm.base.modules():
        if text.isdisjoint(module.modules()):
            yield "vision", module

"""What an intervention is: a value that says which text tokens may read what of the image, at which layers.

`drop`      bound queries do not see the keys of the touched spans at these layers.
`swap`      they see the post-RoPE K and V that the same layer computed for the donor's image instead
            (same prompt, equal grid; VFL, arXiv 2509.24791, visual token swapping).
`knockout`  the self-attention (or MLP, or both) output of these layers is zero for all tokens
            (TaLo, arXiv 2602.01167).
`uniform`   the self-attention of these layers weighs all keys that a query may see alike, for all tokens
            (TaLo's second form).
`rerun`     these layers run once more, all positions, on keys and values of their own: in ascending order
            after the last layer and before the final norm (`at="end"`; VFL's layer run twice), or each right
            after itself (`at="itself"`).

The last three know no images: `spans` and `phase` mean nothing to them.

Bound queries are all non-image tokens after the first touched span; with phase `decode` only those from
the last prompt token on, or, with `from_step` t, from the token on that predicts answer token t (0-based).
Either way they are bound to the end, through a whole generated answer. Tokens before the span and image
queries are never touched; positions stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfl_train.errors import ConfigError
from vfl_train.schemas import MODULES, RERUN_AT

if TYPE_CHECKING:
    from vfl_train.interventions.readout import Prompt

KINDS = ("drop", "swap", "knockout", "uniform", "rerun")
WHOLE_SEQUENCE = ("knockout", "uniform", "rerun")  # the kinds that touch every token, image and all
DIFFERENT_BOUNDS = "interventions of one branch bind different queries at the same layer"
NOISE = "noise"  # the donor name of a swap with random K and V of the host's norms


@dataclass(frozen=True)
class Intervention:
    """One intervention. `layers` are 0-based decoder layers; `spans` are image indices of the prompt
    (None: all of them); `donor` names the donor prompt of a swap; `module` is what a knockout silences; `at`
    is when a rerun happens; `from_step` the first answer token that phase `decode` touches."""

    kind: str
    layers: frozenset[int]
    spans: frozenset[int] | None = None
    phase: str = "text"
    donor: str | None = None
    module: str = "attention"
    at: str = "end"
    from_step: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"unknown intervention {self.kind!r}", f"use one of {', '.join(KINDS)}")
        if self.phase not in ("text", "decode"):
            raise ConfigError(f"unknown phase {self.phase!r}", "use text or decode")
        if self.module not in MODULES:
            raise ConfigError(f"unknown module {self.module!r}", f"use one of {', '.join(MODULES)}")
        if self.at not in RERUN_AT:
            raise ConfigError(f"unknown time of a rerun {self.at!r}", "use end or itself")
        if (self.kind == "swap") != (self.donor is not None):
            raise ConfigError("a swap needs a donor, and only a swap has one")
        if self.from_step < 0:
            raise ConfigError(f"there is no answer token {self.from_step}", "count from 0")
        if self.from_step and (self.phase != "decode" or self.kind in WHOLE_SEQUENCE):
            raise ConfigError(
                "only a drop or swap of phase decode begins at a later answer token",
                "use phase decode, or leave from_step out",
            )

    def check(self, num_layers: int) -> None:
        """Raises ConfigError naming a layer outside the model."""
        for layer in sorted(self.layers):
            if not 0 <= layer < num_layers:
                raise ConfigError(f"layer {layer} is outside this model's layers 0-{num_layers - 1}")

    def touched(self, prompt: Prompt) -> list[int]:
        """The images of `prompt` that it touches, ascending."""
        return list(range(len(prompt.spans))) if self.spans is None else sorted(self.spans)

    def first_bound(self, prompt: Prompt) -> int:
        """Position in `prompt` and its answer from which tokens are bound, images' apart. It must touch one
        of the prompt's images."""
        first = prompt.spans[self.touched(prompt)[0]][1]
        return max(first, prompt.length - 1 + self.from_step) if self.phase == "decode" else first


Branch = tuple[Intervention, ...]
BASE: Branch = ()


def drop(
    layers: Iterable[int], phase: str = "text", spans: Iterable[int] | None = None, from_step: int = 0
) -> Branch:
    """A branch in which bound queries do not see the image at `layers`."""
    return (Intervention("drop", frozenset(layers), _spans(spans), phase, from_step=from_step),)


def swap(
    layers: Iterable[int],
    donor: str,
    phase: str = "text",
    spans: Iterable[int] | None = None,
    from_step: int = 0,
) -> Branch:
    """A branch in which bound queries see `donor`'s image at `layers`."""
    return (Intervention("swap", frozenset(layers), _spans(spans), phase, donor, from_step=from_step),)


def knockout(layers: Iterable[int], module: str = "attention") -> Branch:
    """A branch without the attention (or mlp, or both) of `layers`."""
    return (Intervention("knockout", frozenset(layers), module=module),)


def uniform(layers: Iterable[int]) -> Branch:
    """A branch in which attention at `layers` weighs all visible keys alike."""
    return (Intervention("uniform", frozenset(layers)),)


def rerun(layers: Iterable[int], at: str = "end") -> Branch:
    """A branch that runs `layers` once more: after the last layer (`end`) or each right after `itself`."""
    return (Intervention("rerun", frozenset(layers), at=at),)


def check_branch(branch: Branch) -> None:
    """Raises ConfigError for a layer that runs again and is touched in another way, too: which of its runs
    would be meant?"""
    again = [layer for item in branch if item.kind == "rerun" for layer in item.layers]
    other = {layer for item in branch if item.kind != "rerun" for layer in item.layers}
    for layer in sorted(again):
        if layer in other or again.count(layer) > 1:
            raise ConfigError(f"layer {layer} runs again and is touched in another way, too", "choose one")


def _spans(spans: Iterable[int] | None) -> frozenset[int] | None:
    return None if spans is None else frozenset(spans)

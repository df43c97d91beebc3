"""Work for the tokens that the loss asks about, and no others: what comes after the last layer's keys and
values matters only where the next token is supervised.

Of the last decoder layer, the queries, the output projection and the MLP are computed at these positions
(keys and values at all: the supervised tokens read them), and the loss head gets these positions alone. Loss
and gradients are the same, to the rounding of sums of other shapes. TRL leaves the other positions out of the
head on CUDA; on other devices, and before the head, it computes them all.

    with supervised_only(vlm):
        train(adapted, ...)

What is not covered: the last layer's mixture of experts, and fused query-key-value projections (all positions
there, as ever). Forwards without labels, or without TRL's fused head, run whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vfl_train.data.collator import IGNORE
from vfl_train.errors import ConfigError
from vfl_train.interventions.hooks import in_place_of

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel


@contextmanager
def supervised_only(vlm: VisionLanguageModel) -> Iterator[None]:
    """Inside, batches with labels that go through TRL's fused head are computed only where it matters."""
    wanted = _Wanted()
    with ExitStack() as undo:
        undo.callback(vlm.base.register_forward_pre_hook(wanted.begin, with_kwargs=True).remove)
        undo.callback(vlm.base.base_model.register_forward_hook(wanted.cut).remove)
        for module in pointwise_modules(vlm):
            undo.enter_context(in_place_of(module, partial(wanted.only, module.forward)))
        yield


def check_head(vlm: VisionLanguageModel) -> None:
    """Raises ConfigError for a model that does not come apart into a body and TRL's loss head (Llama 4)."""
    if vlm.base.base_model is vlm.base:
        raise ConfigError(
            f"a {vlm.model_type} cannot be trained here: it gives no hidden states apart from its logits, "
            "which TRL's loss head needs",
            "profile, select and eval work; train another model",
        )


def pointwise_modules(vlm: VisionLanguageModel) -> list[nn.Module]:
    """The modules of the last layer whose output at a position nobody but that position reads."""
    last = vlm.num_layers - 1
    try:
        names = [name.removeprefix(f"{vlm.layer_names[last]}.") for name in vlm.linear_names(last)]
    except ConfigError:  # nothing there has a name that we know
        return []
    found = [name for name in names if name.endswith((".q_proj", ".o_proj"))]
    if any(name.startswith(f"{vlm.family.mlp}.") for name in names):
        found.append(vlm.family.mlp)
    return [vlm.layers[last].get_submodule(name) for name in found]


class _Wanted:
    """Where the batch under way is supervised. Kept until the next one begins: recomputation in backward runs
    the last layer once more."""

    def __init__(self) -> None:
        self.shape: tuple[int, int] = (0, 0)  # rows and supervised positions a row, B and K
        self.index: torch.Tensor | None = None  # [B K], into the batch's positions as one row

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Pre-hook of the model: `labels` [B, T] become `shift_labels` [B, K] of the positions that count."""
        labels = kwargs.get("labels")
        if labels is None or not kwargs.get("fused_lm_head"):
            self.index = None
            return args, kwargs
        following = labels[:, 1:]
        counts = following != IGNORE
        most = max(1, int(counts.sum(1).max()))
        at = torch.argsort(counts.int(), dim=1, descending=True, stable=True)[:, :most]
        rows = torch.arange(len(labels), device=labels.device)[:, None] * labels.shape[1]
        self.index, self.shape = (at + rows).flatten(), (len(labels), most)
        changed = {name: value for name, value in kwargs.items() if name != "labels"}
        return args, {**changed, "shift_labels": following.gather(1, at)}

    def only(self, forward: Callable, hidden_states: torch.Tensor) -> torch.Tensor:
        """`forward` at the positions that count, [B, T, D] -> [B, T, E]; 0 at the others."""
        if self.index is None:
            return forward(hidden_states)
        rows = hidden_states.flatten(0, 1)
        out = forward(rows.index_select(0, self.index)[None])[0]
        whole = out.new_zeros((len(rows), out.shape[-1])).index_copy(0, self.index, out)
        return whole.unflatten(0, hidden_states.shape[:2])

    def cut(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Hook of the model below the head: its last hidden state [B, T, D] at these positions, [B, K, D]."""
        if self.index is not None:
            rows = output.last_hidden_state.flatten(0, 1).index_select(0, self.index)
            output.last_hidden_state = rows.unflatten(0, self.shape)
        return output

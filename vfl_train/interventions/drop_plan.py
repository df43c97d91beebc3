"""`generate` of plain transformers under a drop plan: from a layer on, nobody reads images.

    from transformers import AutoModelForImageTextToText
    from vfl_train.interventions.drop_plan import drop_images_from, layer_of

    model = AutoModelForImageTextToText.from_pretrained(...)
    layer = layer_of("profile.json", ["ocr", "count"])
    with drop_images_from(model, layer):
        model.generate(**inputs)

What comes out is what `drop(range(layer, L))` of `interventions` gives with masks: text tokens do not see
an image's keys from `layer` on. Then what image tokens are beyond it changes nothing that is read, so they
are neither computed there nor do they take room in the KV cache: of N tokens, n of them an image's, prefill
and cache shrink to 1 - n/N (1 - layer/L) of their size, and every new token reads a cache that much smaller.

How. The layers from `layer` on run on the text tokens alone, at the positions (RoPE) that they have in the
whole sequence, and cache these (`text_cache`). The model makes its masks for the whole sequence, as ever;
the attention named "vfl" takes the rows and columns of them that are there, and is scaled dot product
attention otherwise. No plan in force, it is that and nothing else, so that a model may as well be loaded
with `attn_implementation={"text_config": "vfl"}`; a plan sets it by itself and puts back what was there.

A batch's rows may differ in text and images: each layer is as wide as the row with the most text, and what
others have too little of is filled with tokens that nobody sees. Left and right padding are cut out, too.

What is not covered, each refused in one sentence (ConfigError): caches other than DynamicCache (static,
quantised, offloaded), assisted decoding, videos, training, additive 4-D masks, models spread over devices,
prompts (and chunks of prompts) that end with an image, and layers without plain self-attention over all
tokens (cross-attention, linear attention, soft-capping, sinks).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vfl_train.errors import ConfigError
from vfl_train.interventions.hooks import attention_named, in_place_of
from vfl_train.interventions.reference import check_attention
from vfl_train.interventions.text_cache import text_only
from vfl_train.interventions.tokens import TOKEN_AXIS
from vfl_train.models.vlm import find_layers
from vfl_train.schemas import Profile

NAME = "vfl"


def layer_of(profile: Profile | str | Path, functions: Sequence[str] | None = None) -> int:
    """The first layer from which images can be dropped without losing any of `functions` (None: all that
    the profile has a plan for): the largest `from_layer` of their drop plans. The number of layers means
    that nothing can be dropped. Raises ConfigError for functions without a plan, and for a profile of
    phase `decode`, whose question still reads the image."""
    profile = profile if isinstance(profile, Profile) else Profile.load(profile)
    if profile.phase != "text":
        raise ConfigError(f"the drop plan is of phase {profile.phase!r}", "profile with --phase text")
    plans = profile.drop_plan
    wanted = list(plans) if functions is None else list(functions)
    missing = [name for name in wanted if name not in plans]
    if missing or not wanted:
        has = ", ".join(plans) or "none"
        raise ConfigError(
            f"the profile has no drop plan for {', '.join(missing) or 'any function'}",
            f"it has one for: {has}; profile with --intervention swap or drop-from",
        )
    layers = [plans[name].get("from_layer") for name in wanted if isinstance(plans[name], dict)]
    depth = profile.model.num_layers
    if len(layers) != len(wanted) or not all(type(k) is int and 0 <= k <= depth for k in layers):
        raise ConfigError(f"a drop plan of this profile names no layer from 0 to {depth}", "profile again")
    return max(layers)


@contextmanager
def drop_images_from(
    model: PreTrainedModel, layer: int, image_tokens: torch.Tensor | None = None
) -> Iterator[None]:
    """`model` reads images below `layer` only while the context lasts; then it is as it was.

    Args:
        model: any vision-language model of transformers (with or without a PEFT adapter) whose text tokens
            read images by self-attention. `generate` and plain forwards are both under the plan; of the
            latter, logits at image tokens and padding say nothing.
        layer: 0-based decoder layer, from `layer_of`; the number of layers drops nothing.
        image_tokens: bool [B, tokens of the prompt], true on what is dropped. None: the placeholders in
            `input_ids`, one that the model itself says included. To be given with `inputs_embeds`, and where
            the tokens between the pieces of one image (row and column marks of Idefics3 and others) shall go
            with it, as they do in a profile.
            A batch of several times B rows (beams, num_return_sequences) has each row so many times.

    Raises ConfigError for a layer that the model does not have and for what is not covered (see above).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config(decoder=True)
    _, layers = find_layers(base, int(config.num_hidden_layers))
    if not 0 <= layer <= len(layers):
        raise ConfigError(f"layer {layer} is outside 0-{len(layers)}", "the last of them drops nothing")
    if layer == len(layers):
        yield
        return
    if len(set((getattr(base, "hf_device_map", None) or {}).values())) > 1:
        raise ConfigError("a drop plan is for a model on one device, this one is spread over several")
    if hasattr(base.forward, "drop_plan"):
        raise ConfigError("this model is already under a drop plan", "leave the other one first")
    plan = _Plan(base, layer, image_tokens)
    with ExitStack() as undo:
        undo.enter_context(attention_named(config, NAME))
        undo.enter_context(in_place_of(base, plan.around(base.forward)))
        for index in range(layer, len(layers)):
            stand_in = partial(plan.layer, index, layers[index].forward)
            undo.enter_context(in_place_of(layers[index], stand_in))
        yield


# --- attention ---------------------------------------------------------------------------------


@dataclass
class _Step:
    """One forward under way. B rows, T tokens of which W are computed, n keys.

    `place`: int [B, W], which tokens are computed (None: all). `columns`: int [B, n], position in the
    sequence of every key, -1 for fillers (`ragged`: there are some). `tokens`: length of the sequence."""

    shape: torch.Size
    place: torch.Tensor | None
    columns: torch.Tensor
    ragged: bool
    tokens: int
    calls: int = 0
    fitted: dict[tuple[int, int], tuple[object, torch.Tensor | None]] = field(default_factory=dict)

    def fit(self, mask: torch.Tensor | None, queries: int, keys: int) -> torch.Tensor | None:
        """The model's `mask` (bool [B or 1, 1, T, sequence or its end], None: causal) for the last `keys`
        keys: bool [B, 1, queries, keys], or None. Layers that get the same mask share the answer."""
        key = (id(mask), keys)
        if key not in self.fitted:
            self.fitted[key] = mask, self._fit(mask, queries, keys)
        return self.fitted[key][1]

    def _fit(self, mask: torch.Tensor | None, queries: int, keys: int) -> torch.Tensor | None:
        columns = self.columns[:, -keys:]
        if mask is None:
            if not self.ragged and queries in (1, keys):
                return None  # causal it stays; any other shape would be cut to size by transformers
            seen = (columns >= 0)[:, None, None] & (columns[:, None] <= columns[:, -queries:, None])[:, None]
        else:
            if mask.dtype != torch.bool:
                raise ConfigError("a drop plan cannot cut an additive 4-D mask", "give a 2-D or a bool mask")
            mask = mask.expand(len(columns), -1, -1, -1)
            if self.place is not None:
                place = self.place.to(mask.device)[:, None, :, None]
                mask = mask.gather(2, place.expand(-1, mask.shape[1], -1, mask.shape[3]))
            # The last column of a mask is the last token's; a sliding layer's begins with its window.
            at = (columns.to(mask.device) - (self.tokens - mask.shape[3]))[:, None, None]
            seen = mask.gather(3, at.clamp(min=0).expand(-1, *mask.shape[1:3], -1)) & (at >= 0)
        # A filler sees itself, so that no row of the softmax is empty.
        own = torch.ones(queries, keys, dtype=torch.bool, device=seen.device)
        return seen | own.tril(keys - queries).triu(keys - queries)


_STEP: ContextVar[_Step | None] = ContextVar("vfl_drop_plan_step", default=None)


def _attention(module, query, key, value, attention_mask, **kwargs):
    """Attention function: scaled dot product attention, under a plan with the mask of what is there."""
    step = _STEP.get()
    if step is not None:
        if (reason := check_attention(module, kwargs)) is not None:
            raise ConfigError(reason)
        if key.shape[2] > step.columns.shape[1] or query.shape[2] > key.shape[2]:
            raise ConfigError(
                f"{type(module).__name__} attends other tokens than its own: no drop plan for it"
            )
        step.calls += 1
        attention_mask = step.fit(attention_mask, query.shape[2], key.shape[2])
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


# --- forwards ----------------------------------------------------------------------------------


class _Plan:
    """A plan in force: what stands in for the forwards of the model and of the layers from `first` on."""

    def __init__(self, base: PreTrainedModel, first: int, image_tokens: torch.Tensor | None) -> None:
        self.base, self.first, self.image_tokens = base, first, image_tokens
        self.config = base.config.get_text_config(decoder=True)
        self.step: _Step | None = None

    def around(self, forward: Callable) -> Callable:
        """The model's forward, which sees the token ids that decoder layers do not get."""
        signature = inspect.signature(forward)

        @wraps(forward)
        def under_plan(*args: Any, **kwargs: Any) -> Any:
            self.step = self._begin(signature.bind(*args, **kwargs).arguments)
            try:
                return forward(*args, **kwargs)
            finally:
                self.step = None

        under_plan.drop_plan = self  # type: ignore[attr-defined]
        return under_plan

    def layer(self, index: int, forward: Callable, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        """Decoder layer `index`: hidden states [B, T, D] in and out, text alone computed. What comes out at
        other tokens is what came in."""
        step = self.step
        if step is None or step.shape != hidden_states.shape[:2]:
            raise ConfigError("a drop plan needs the model's own forward", "call the model itself")
        if (cache := kwargs.get("past_key_values")) is not None:
            text_only(cache, index).grow(step.columns, step.tokens, step.ragged)
        inside, place = hidden_states, step.place
        if place is not None:
            place = place.to(hidden_states.device)
            inside, kwargs = _take(hidden_states, -2, place), _cut(kwargs, place)
        step.calls, token = 0, _STEP.set(step)
        try:
            out = forward(inside, **kwargs)
        finally:
            _STEP.reset(token)
        if step.calls != 1:
            raise ConfigError(f"layer {index} has no self-attention that transformers' interface dispatches")
        if place is None:
            return out
        text = out[0] if isinstance(out, tuple) else out
        whole = hidden_states.to(text.dtype).scatter(1, place[..., None].expand_as(text), text)
        return (whole, *out[1:]) if isinstance(out, tuple) else whole

    def _begin(self, called: dict[str, Any]) -> _Step:
        """The step of a forward with these arguments."""
        if self.base.training:
            raise ConfigError("a drop plan is for inference", "call model.eval()")
        if (name := self.config._attn_implementation) != NAME:
            raise ConfigError(
                f"under a drop plan the attention is {NAME!r}, not {name!r}", "leave the plan first"
            )
        ids, cache = called.get("input_ids"), called.get("past_key_values")
        shape = ids.shape if ids is not None else called["inputs_embeds"].shape[:2]
        before = None if cache is None else text_only(cache, self.first)
        seen = 0 if cache is None else cache.get_seq_length()
        text = self._text(ids, seen, shape).to(self.base.device)
        mask, image = called.get("attention_mask"), ~text
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            there = mask[:, -shape[1] :].to(text.device, torch.bool)
            text, image = text & there, image & there
        if shape[1] > 1 and bool(image[:, -1].any()):
            raise ConfigError(
                "under a drop plan no row may end with an image: its logits are not computed",
                "put text after the image",
            )
        place, ragged = _placed(text) if shape[1] > 1 else (None, not bool(text.all()))
        at = torch.arange(shape[1], device=text.device).expand(shape) if place is None else place
        columns = torch.where(text.gather(1, at), at + seen, -1)
        if before is not None and before.columns is not None:
            columns = torch.cat([before.columns, columns], 1)
            ragged |= before.ragged
        return _Step(shape, place, columns, ragged, seen + shape[1])

    def _text(self, ids: torch.Tensor | None, seen: int, shape: torch.Size) -> torch.Tensor:
        """bool [B, T]: the tokens that are not an image's."""
        if self.image_tokens is not None:
            given = self.image_tokens[:, seen : seen + shape[1]].bool()
            if not len(given) or shape[0] % len(given):
                raise ConfigError(f"image_tokens has {len(given)} rows, the batch {shape[0]}")
            given = given.repeat_interleave(shape[0] // len(given), dim=0)
            return ~torch.nn.functional.pad(given, (0, shape[1] - given.shape[1]))
        if ids is None:
            if shape[1] == 1 and seen:
                return torch.ones(shape, dtype=torch.bool)  # it was generated
            raise ConfigError(
                "a drop plan cannot tell images from text without input_ids", "give image_tokens"
            )
        config = self.base.config
        image, video = (
            getattr(config, f"{kind}_token_id", getattr(config, f"{kind}_token_index", None))
            for kind in ("image", "video")
        )
        if image is None:
            raise ConfigError(f"the configuration of this {config.model_type} names no image token")
        # Of a single token after others this is not asked: it would wait for the device at each.
        if video is not None and not (shape[1] == 1 and seen) and bool((ids == video).any()):
            raise ConfigError("a drop plan is for images, the prompt has a video", "give image_tokens")
        return ids != image


def _placed(text: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
    """(which tokens [B, W] to compute, None for all; whether some are fillers) for text bool [B, T]. W is
    the most text that a row has; rows with less begin with others of their tokens, the fillers."""
    counts = text.sum(1)
    width, least = max(1, int(counts.max())), int(counts.min())
    place = None if width == text.shape[1] else text.int().argsort(dim=1, stable=True)[:, -width:]
    return place, least < width


def _take(t: torch.Tensor, axis: int, place: torch.Tensor) -> torch.Tensor:
    """Tokens `place` [B, W] of t [..., B or 1, T, D] (axis -2) or [..., B or 1, T] (axis -1)."""
    rows = torch.arange(len(place), device=place.device).clamp(max=t.shape[axis - 1] - 1)[:, None]
    return t[..., rows, place, :] if axis == -2 else t[..., rows, place]


def _cut(kwargs: dict[str, Any], place: torch.Tensor) -> dict[str, Any]:
    """A layer's arguments for the tokens `place`. Raises ConfigError for tensors nobody knows of."""
    out = dict(kwargs)
    for name, value in kwargs.items():
        if name in TOKEN_AXIS and value is not None:
            axis = TOKEN_AXIS[name]
            whole = isinstance(value, torch.Tensor)
            out[name] = _take(value, axis, place) if whole else tuple(_take(t, axis, place) for t in value)
        elif isinstance(value, torch.Tensor) and name != "attention_mask":
            raise ConfigError(f"decoder layers take {name}, which drop plans do not know")
    return out

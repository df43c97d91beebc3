"""Merging adapters into the weights of their base: a plain transformers folder."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfl_train.errors import ConfigError, NumericError, VerificationError
from vfl_train.hub.card import merged_card
from vfl_train.hub.load import CONFIG, WEIGHTS, AdapterInfo, check_adapter, load_adapter
from vfl_train.hub.privacy import public_name
from vfl_train.hub.samples import (
    BOUNDS,
    REFERENCE,
    make_reference,
    next_logits,
    relative_difference,
    sample_inputs,
)
from vfl_train.options import format_layers
from vfl_train.runs import RunFolder, file_sha256, fingerprint

if TYPE_CHECKING:
    from vfl_train.config import MergeConfig
    from vfl_train.models import VisionLanguageModel

MERGE_RECORD = "merge.json"
log = logging.getLogger(__name__)


def merge(config: MergeConfig) -> Path:
    """Merge the adapters of `config` into their base and write the model, processor, card and merge.json.

    Returns:
        The output folder.

    Raises:
        ConfigError: adapters of different bases, on the same layers (without --allow-overlap), or a base
            that only the adapters name and that is not on this machine.
        VerificationError: the merged model does not answer as base plus adapters do.
    """
    from vfl_train.models import VisionLanguageModel
    from vfl_train.models.digest import model_digest

    adapters = [check_adapter(path) for path in config.adapters]
    check_overlap(adapters, config.allow_overlap)
    base, revision = base_of(adapters, config.model)
    names = unique_names(adapters)
    files = [a.folder / name for a in adapters for name in (WEIGHTS, CONFIG)]  # the scale is in the latter
    inputs = {"adapters": ",".join(map(file_sha256, files))}
    vlm = VisionLanguageModel.load(base, revision=revision, dtype=config.dtype, device=config.device)
    inputs["base"] = model_digest(vlm)
    wanted = fingerprint("merge", config, inputs, ("torch", "transformers", "peft"))
    with RunFolder.open(config.output, wanted, config.overwrite) as run:
        if run.already_done:
            log.info("%s: already done", config.output)
            return run.folder
        record = merge_into(vlm, adapters, names)
        save_model(vlm, run.folder)
        run.write_json(MERGE_RECORD, {"base": public_name(base), "revision": revision, **record["merge"]})
        run.write_json(REFERENCE, record["reference"])
        difference = record["merge"]["difference"]["value"]
        run.write_text(
            "README.md", merged_card(public_name(base), record["merge"]["adapters"], difference, vlm.dtype)
        )
    log.info("merged %s into %s; logits differ by %.1e", ", ".join(names), run.folder, difference)
    return run.folder


def check_overlap(adapters: list[AdapterInfo], allow: bool) -> None:
    """Raises ConfigError if two adapters change the same layer (merging them would add their updates, which
    is not what either was trained for)."""
    seen: dict[int, AdapterInfo] = {}
    for adapter in adapters:
        both = sorted(layer for layer in adapter.layers if layer in seen)
        if both and not allow:
            raise ConfigError(
                f"{seen[both[0]].folder} and {adapter.folder} both change layers {format_layers(both)}",
                "--allow-overlap adds the updates up; evaluate the result",
            )
        seen.update(dict.fromkeys(adapter.layers, adapter))


def base_of(adapters: list[AdapterInfo], given: str | None) -> tuple[str, str | None]:
    """(name, revision) of the base model: the one given, else the one all adapters name if it is on this
    machine. A name in an adapter's file alone never makes anything be fetched. Raises ConfigError."""
    from vfl_train.models import resolve_name

    named = {(a.base_name, a.revision) for a in adapters}
    if given is not None:
        revisions = {revision for name, revision in named if name == given}
        return given, revisions.pop() if len(revisions) == 1 else None
    if len(named) > 1:
        raise ConfigError(
            f"the adapters name different base models: {', '.join(sorted(str(n) for n, _ in named))}",
            "give --model",
        )
    name, revision = named.pop()
    if not name:
        raise ConfigError(f"{adapters[0].folder} names no base model", "give --model")
    if not resolve_name(name)[1]:
        raise ConfigError(
            f"the base model {name} is named by the adapter only and not on this machine",
            f"give it yourself to have it fetched: --model {name}",
        )
    return name, revision


def unique_names(adapters: list[AdapterInfo]) -> list[str]:
    """A short name for each adapter: its folder's, numbered where two are alike."""
    names: list[str] = []
    for adapter in adapters:
        stem = adapter.folder.resolve().name or "adapter"
        names.append(stem if stem not in names else f"{stem}-{len(names)}")
    return names


def merge_into(vlm: VisionLanguageModel, adapters: list[AdapterInfo], names: list[str]) -> dict[str, Any]:
    """Merge in place: `vlm.model` becomes the merged model. Returns {"merge": record, "reference": logits}.

    The reference is taken from base plus adapters, before merging, so that verifying it later compares the
    saved weights with the adapters.

    Raises:
        NumericError: the merged weights are not finite.
        VerificationError: the logits moved more than the bound for this number format.
    """
    adapted: Any = vlm.model
    inside = [
        f"merge{index}" for index in range(len(adapters))
    ]  # PEFT trips over names such as "a" or "lora"
    for adapter, name in zip(adapters, inside, strict=True):
        adapted = load_adapter(adapted, adapter.folder, name=name, info=adapter)
    adapted.base_model.set_adapter(inside)
    adapted.eval()
    inputs = sample_inputs(vlm.processor)
    before = next_logits(adapted, inputs)
    reference = make_reference(adapted, vlm.processor)
    with adapted.disable_adapter():
        effect = relative_difference(before, next_logits(adapted, inputs))
    try:
        vlm.model = adapted.merge_and_unload(safe_merge=True, adapter_names=inside).eval()
    except ValueError as e:
        raise NumericError(f"merging gave weights that are not finite: {e}") from e
    difference, bound = relative_difference(next_logits(vlm.model, inputs), before), BOUNDS[vlm.dtype]
    # An adapter's own effect can be smaller than the rounding of 16 bits: then nothing would be merged.
    if effect > 0 and difference > max(effect / 2, BOUNDS["float32"]):
        raise VerificationError(
            f"rounding ate the adapter: its effect on the logits is {effect:.2e}, the merge is off by "
            f"{difference:.2e}",
            "merge in float32",
        )
    if not difference <= bound:
        raise VerificationError(
            f"the merged model answers differently: logits moved by {difference:.2e}, bound {bound:.0e}",
            "merge in float32",
        )
    record = {
        "dtype": vlm.dtype,
        "adapters": [_described(a, name) for a, name in zip(adapters, names, strict=True)],
        "difference": {"value": difference, "bound": bound, "of": "largest logit", "prompts": len(inputs)},
        "effect": {"value": effect, "of": "largest logit of the base"},
    }
    return {"merge": record, "reference": reference}


def _described(adapter: AdapterInfo, name: str) -> dict[str, Any]:
    """What merge.json says of one adapter."""
    return {
        "name": name,
        "layers": list(adapter.layers),
        "modules": len(adapter.modules),
        "r": adapter.config["r"],
        "lora_alpha": adapter.config["lora_alpha"],
        "weights_sha256": file_sha256(adapter.folder / WEIGHTS),
    }


def save_model(vlm: VisionLanguageModel, folder: Path) -> None:
    """Weights (safetensors), configuration, processor and generation settings; weight names must be the
    base's own. Raises VerificationError."""
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # safetensors makes them readable by the owner only
        shutil.copymode(folder / "config.json", weights)
    if vlm.folder is None:
        return
    ours, theirs = weight_names(folder), weight_names(vlm.folder)
    added = sorted(ours - theirs)
    if added:
        raise VerificationError(
            f"the merged model has weights under names the base does not use: {added[0]}",
            "servers would not load it; this transformers version renames the keys of this model",
        )


def weight_names(folder: Path) -> set[str]:
    """Names of all tensors in the safetensors files of a folder."""
    from safetensors import safe_open

    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(str(path), framework="pt") as f:
            names.update(f.keys())
    return names

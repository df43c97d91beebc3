"""Merging adapters into the weights of their base: a plain transformers folder, measured and scored.

The base is the 16-bit (or 32-bit) model, never a quantized one: an adapter that was trained on a 4-bit base
goes into the weights that base was made of.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vfl_train.errors import ConfigError, NumericError, VerificationError
from vfl_train.hub.card import merged_card, unpublished
from vfl_train.hub.contents import MERGE_RECORD, check_names
from vfl_train.hub.keys import stored_names
from vfl_train.hub.load import CONFIG, WEIGHTS, AdapterInfo, base_of, check_adapter, load_adapter
from vfl_train.hub.manifest import verify_manifest
from vfl_train.hub.merge_score import MergeScore, questions_of, show
from vfl_train.hub.privacy import public_name
from vfl_train.hub.samples import (
    BOUNDS,
    REFERENCE,
    compare_reference,
    make_reference,
    next_logits,
    relative_difference,
    sample_inputs,
)
from vfl_train.hub.targets import processor_files
from vfl_train.options import format_layers
from vfl_train.runs import MANIFEST, RunFolder, file_sha256, fingerprint
from vfl_train.schemas import read_json

if TYPE_CHECKING:
    from vfl_train.config import MergeConfig
    from vfl_train.models import VisionLanguageModel

PROMPTS = 16  # the largest error of fewer is chance for the most part, in 16 bits
log = logging.getLogger(__name__)


def merge(config: MergeConfig) -> Path:
    """Merge the adapters of `config` into their base and write the model, processor, card and merge.json.

    Returns:
        The output folder.

    Raises:
        ConfigError: adapters of different bases, on the same layers (without --allow-overlap), a quantized
            base, or one that only the adapters name and that is not on this machine.
        DataError: no question that the merge can be scored on.
        VerificationError: an adapter's file was changed since it was written, or the merged model does not
            answer as base plus adapters do.
    """
    from vfl_train.models import VisionLanguageModel
    from vfl_train.models.digest import model_digest

    for path in map(Path, config.adapters):
        if (path / MANIFEST).is_file():  # adapters by other programs have none
            verify_manifest(path)
    adapters = [check_adapter(path) for path in config.adapters]
    check_overlap(adapters, config.allow_overlap)
    base, revision = base_of(adapters, config.model)
    names = unique_names(adapters)
    files = [a.folder / name for a in adapters for name in (WEIGHTS, CONFIG)]  # the scale is in the latter
    inputs = {"adapters": ",".join(map(file_sha256, files))}
    dtype = number_format(base, revision, config.dtype)
    vlm = VisionLanguageModel.load(base, revision=revision, dtype=dtype, device=config.device)
    asked = questions_of(config, vlm, base)
    inputs |= {"base": model_digest(vlm), "questions": asked.asked.sha256 if asked.asked else ""}
    wanted = fingerprint("merge", config, inputs, ("torch", "transformers", "peft"))
    with RunFolder.open(config.output, wanted, config.overwrite) as run:
        if run.already_done:
            log.info("%s: already done", config.output)
            show(read_json(run.folder / MERGE_RECORD).get("score"))
            return run.folder
        truth = None
        if dtype != "float32":
            truth = float32_logits(base, revision, config.device, adapters)
        record = merge_into(vlm, adapters, names, truth, asked)
        save_model(vlm, run.folder)
        run.write_json(MERGE_RECORD, {"base": public_name(base), "revision": revision, **record["merge"]})
        run.write_json(REFERENCE, record["reference"])
        difference = record["merge"]["difference"]["value"]
        card = merged_card(
            record["merge"]["adapters"], difference, vlm.dtype, unpublished(base, revision),
            score=record["merge"]["score"],
        )  # fmt: skip
        run.write_text("README.md", card)
    log.info("merged %s into %s; logits differ by %.1e", ", ".join(names), run.folder, difference)
    show(record["merge"].get("score"))
    return run.folder


def number_format(base: str, revision: str | None, asked: str) -> str:
    """The format to merge in: the one asked for, or (`auto`) that of the base model's files.

    Raises:
        ConfigError: the base is quantized.
        HubError: the Hub cannot be reached.
    """
    from transformers import AutoConfig

    from vfl_train.models.vlm import DTYPES, local_folder

    folder = local_folder(base, revision, weights=False)
    saved = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    if getattr(saved, "quantization_config", None):
        raise ConfigError(
            f"the base model {public_name(base)} is quantized; adapters are merged into 16-bit weights only",
            "give the model that it was made of: --model NAME",
        )
    if asked != "auto":
        return asked
    return next((name for name, kind in DTYPES.items() if kind == saved.dtype), "float32")


def float32_logits(
    base: str, revision: str | None, device: str, adapters: Sequence[AdapterInfo]
) -> list[torch.Tensor]:
    """Logits of the sample prompts by base and adapters in float32: what the errors of 16 bits are measured
    against. The model is loaded for this once more, in twice the memory, and let go."""
    from vfl_train.models import VisionLanguageModel

    vlm = VisionLanguageModel.load(base, revision=revision, dtype="float32", device=device)
    adapted, _ = _with_adapters(vlm, adapters)
    return next_logits(adapted, sample_inputs(vlm.processor, PROMPTS))


def check_overlap(adapters: list[AdapterInfo], allow: bool) -> None:
    """Raises ConfigError if two adapters change the same layer, of the decoder or of a part beside it:
    merging them would add their updates, which is not what either was trained for."""
    seen: dict[str, AdapterInfo] = {}
    for adapter in adapters:
        both = adapter.blocks & seen.keys()
        if both and not allow:
            first = min(both, key=lambda name: (len(name), name))
            raise ConfigError(
                f"{seen[first].folder} and {adapter.folder} both change {_named(both)}",
                "--allow-overlap adds the updates up; evaluate the result",
            )
        seen.update(dict.fromkeys(adapter.blocks, adapter))


def _named(blocks: AbstractSet[str]) -> str:
    """ "a.layers.3-5, b.merger": blocks that follow each other in one."""
    lists: defaultdict[str, list[int]] = defaultdict(list)
    for name in sorted(blocks):
        before, _, last = name.rpartition(".")
        if last.isdigit():
            lists[before].append(int(last))
    alone = sorted(name for name in blocks if not name.rpartition(".")[2].isdigit())
    return ", ".join([*(f"{name}.{format_layers(found)}" for name, found in lists.items()), *alone])


def unique_names(adapters: list[AdapterInfo]) -> list[str]:
    """A short name for each adapter: its folder's, numbered where two are alike."""
    names: list[str] = []
    for adapter in adapters:
        stem = adapter.folder.resolve().name or "adapter"
        names.append(stem if stem not in names else f"{stem}-{len(names)}")
    return names


def _with_adapters(vlm: VisionLanguageModel, adapters: Sequence[AdapterInfo]) -> tuple[Any, list[str]]:
    """(`vlm.model` with all adapters on and active, the names they have inside)."""
    adapted: Any = vlm.model
    # PEFT trips over names such as "a" or "lora".
    inside = [f"merge{index}" for index in range(len(adapters))]
    for adapter, name in zip(adapters, inside, strict=True):
        adapted = load_adapter(adapted, adapter.folder, name=name, info=adapter)
    adapted.base_model.set_adapter(inside)
    return adapted.eval(), inside


def merge_into(
    vlm: VisionLanguageModel,
    adapters: list[AdapterInfo],
    names: list[str],
    truth: list[torch.Tensor] | None = None,
    asked: MergeScore | None = None,
) -> dict[str, Any]:
    """Merge in place: `vlm.model` becomes the merged model. Returns {"merge": record, "reference": logits}.

    The reference is taken from base plus adapters, before merging, so that verifying it later compares the
    saved weights with the adapters.

    Args:
        truth: logits in float32, which a merge in 16 bits is measured against (see `float32_logits`).
        asked: what base, single adapters and the merge are scored on.

    Raises:
        NumericError: the merged weights are not finite.
        VerificationError: the logits moved more than the bound for this number format.
    """
    asked = asked or MergeScore(None, "nothing", {})
    described = [_described(a, name, vlm.decoder_name) for a, name in zip(adapters, names, strict=True)]
    adapted, inside = _with_adapters(vlm, adapters)
    inputs = sample_inputs(vlm.processor, PROMPTS)
    before = next_logits(adapted, inputs)
    reference = make_reference(adapted, vlm.processor)
    with adapted.disable_adapter():
        effect = relative_difference(before, next_logits(adapted, inputs))
    _measure_parts(vlm, adapted, adapters, described, inside, asked)
    try:
        vlm.model = adapted.merge_and_unload(safe_merge=True, adapter_names=inside).eval()
    except ValueError as e:
        raise NumericError(f"merging gave weights that are not finite: {e}") from e
    measured = _measured(next_logits(vlm.model, inputs), before, truth, vlm.dtype)
    _check(measured, effect)
    asked.measure(vlm, "merged")
    record = {
        "dtype": vlm.dtype,
        "adapters": described,
        "difference": {**measured, "prompts": len(inputs)},
        "effect": {"value": effect, "of": "largest logit of the base"},
        "score": asked.record(names),
    }
    return {"merge": record, "reference": reference}


def _measured(
    merged: list[torch.Tensor], before: list[torch.Tensor], truth: list[torch.Tensor] | None, dtype: str
) -> dict[str, Any]:
    """How far the merge moved the logits, and how far it may. In float32: against base plus adapters. In 16
    bits: against those in float32, at most twice as far as base plus adapters in 16 bits are."""
    same = relative_difference(merged, before)
    if truth is None:
        return {"value": same, "bound": BOUNDS[dtype], "of": "largest logit", "same_format": same}
    own = relative_difference(before, truth)
    return {
        "value": relative_difference(merged, truth), "bound": max(2 * own, BOUNDS["float32"]),
        "of": "largest logit, against float32", "same_format": same, "adapter_alone": own,
    }  # fmt: skip


def _check(measured: dict[str, Any], effect: float) -> None:
    """Raises VerificationError."""
    # An adapter's own effect can be smaller than the rounding of 16 bits: then nothing would be merged.
    if effect > 0 and measured["same_format"] > max(effect / 2, BOUNDS["float32"]):
        raise VerificationError(
            f"rounding ate the adapter: its effect on the logits is {effect:.2e}, the merge is off by "
            f"{measured['same_format']:.2e}",
            "merge in float32",
        )
    if not measured["value"] <= measured["bound"]:
        raise VerificationError(
            f"the merged model answers differently: logits moved by {measured['value']:.2e}, "
            f"bound {measured['bound']:.0e}",
            "merge in float32",
        )


def _measure_parts(
    vlm: VisionLanguageModel,
    adapted: Any,
    adapters: Sequence[AdapterInfo],
    described: list[dict[str, Any]],
    inside: list[str],
    asked: MergeScore,
) -> None:
    """Score the base and each of several adapters alone; of an adapter trained on a quantized base, how far
    its logits on this base are from those it was saved with goes into its description. All adapters are
    active again afterwards."""
    plain, vlm.model = vlm.model, adapted
    with adapted.disable_adapter():
        asked.measure(vlm, "base")
    for adapter, entry, name in zip(adapters, described, inside, strict=True):
        adapted.base_model.set_adapter(name)
        if len(inside) > 1:
            asked.measure(vlm, entry["name"])
        reference = adapter.folder / REFERENCE
        trained = read_json(reference) if reference.is_file() else {}
        if trained.get("quantization"):
            inputs = sample_inputs(vlm.processor, len(trained["prompts"]), trained["seed"])
            moved, _ = compare_reference(trained, inputs, next_logits(adapted, inputs))
            entry |= {"trained_on": trained["quantization"]["quant_method"], "to_training": moved}
    adapted.base_model.set_adapter(inside)
    vlm.model = plain


def _described(adapter: AdapterInfo, name: str, decoder: str) -> dict[str, Any]:
    """What merge.json says of one adapter."""
    return {
        "name": name,
        "layers": adapter.layers(decoder),
        "modules": len(adapter.modules),
        "r": adapter.config["r"],
        "lora_alpha": adapter.config["lora_alpha"],
        "weights_sha256": file_sha256(adapter.folder / WEIGHTS),
    }


def save_model(vlm: VisionLanguageModel, folder: Path) -> None:
    """Weights (safetensors) under the names of the base model's files; configuration, processor, chat
    template and generation settings are the base model's files, byte for byte but for another number format.
    Raises VerificationError if transformers wrote other names."""
    vlm.model.save_pretrained(folder)
    if vlm.folder is None or not processor_files(vlm.folder):
        vlm.processor.save_pretrained(folder)
    if vlm.folder is not None:
        check_names(folder, stored_names(vlm.folder))
        for source in [*processor_files(vlm.folder), vlm.folder / "generation_config.json"]:
            if source.is_file():
                shutil.copyfile(source, folder / source.name)
        config = (vlm.folder / "config.json").read_bytes()
        (folder / "config.json").write_bytes(_in_format(config, vlm.dtype))
    for weights in folder.glob("*.safetensors"):  # safetensors makes them readable by the owner only
        shutil.copymode(folder / "config.json", weights)


def _in_format(config: bytes, dtype: str) -> bytes:
    """config.json with `dtype` as the number format of the model and its parts; unchanged if it says so."""
    value = json.loads(config)
    parts = [value, *(v for k, v in value.items() if k.endswith("_config") and isinstance(v, dict))]
    wrong = [
        (part, key) for part in parts for key in ("dtype", "torch_dtype") if part.get(key, dtype) != dtype
    ]
    for part, key in wrong:
        part[key] = dtype
    if not {"dtype", "torch_dtype"} & value.keys():
        value["dtype"] = dtype
    elif not wrong:
        return config
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

"""The checks of `vfl-train verify` that need no model: files, configuration, card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfl_train.errors import VerificationError, VflError
from vfl_train.hub.contents import KNOCKOUT_RECORD, MERGE_RECORD, record_of
from vfl_train.hub.load import CONFIG, WEIGHTS, AdapterInfo, check_adapter
from vfl_train.hub.privacy import find_secret
from vfl_train.hub.targets import adapter_problems, check_merged
from vfl_train.models.trust import check_model_folder
from vfl_train.options import format_layers
from vfl_train.schemas import read_json

CARD = "README.md"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Check:
    """One entry of verification.json. `value` and `bound` are null where nothing is measured."""

    name: str
    passed: bool
    detail: str
    value: float | None = None
    bound: float | None = None


def check(name: str, measure: Callable[[], str]) -> Check:
    """A check that passes with what `measure` says, or fails with the error it raises."""
    try:
        return Check(name, True, measure())
    except VflError as e:
        return Check(name, False, e.message)
    except (KeyError, TypeError, ValueError, IndexError) as e:
        return Check(name, False, f"a file does not follow its contract: {e!r}")


def require(condition: bool, problem: str, detail: str) -> str:
    """`detail`, or VerificationError with `problem`."""
    if not condition:
        raise VerificationError(problem)
    return detail


def adapter_checks(folder: Path) -> list[Check]:
    """Of an adapter's own files."""
    first = check("adapter_config", lambda: _explicit_targets(check_adapter(folder)))
    if not first.passed:
        return [first]
    info = check_adapter(folder)
    checks = [first]
    if (folder / "plan.json").is_file():
        checks.append(check("plan", lambda: _as_planned(folder, info)))
    return [
        *checks,
        check("weights", lambda: _finite_weights(folder / WEIGHTS)),
        check("target", lambda: _adapter_target(folder, info)),
        _processor_check(folder),
        check("card", lambda: card_detail(folder / CARD, "adapter", "peft")),
    ]


def merged_checks(folder: Path) -> list[Check]:
    """Of a model's own files."""

    def trusted() -> str:
        check_model_folder(folder)
        return "no key that runs code, safetensors only"

    def generation() -> str:
        there = (folder / "generation_config.json").is_file()
        return require(there, "generation_config.json is missing", "generation_config.json is there")

    return [
        check("model_folder", trusted),
        _processor_check(folder),
        check("generation_config", generation),
        check("merge", lambda: _as_made(folder)),
        check("target", lambda: _merged_target(folder)),
        check("card", lambda: card_detail(folder / CARD, "finetune", "transformers")),
    ]


def _explicit_targets(info: AdapterInfo) -> str:
    targets = info.config.get("target_modules")
    return require(
        isinstance(targets, list) and set(targets) == info.modules,
        "target_modules is not the explicit list of the modules in the weights",
        f"explicit list of {len(info.modules)} module names",
    )


def _as_planned(folder: Path, info: AdapterInfo) -> str:
    renamed = record_of(folder).get("renamed", {})
    found = {renamed.get(module, module) for module in info.modules}
    plan = read_json(folder / "plan.json")
    planned = set(plan["module_names"])
    return require(
        planned == found,
        f"the weights are of other modules than plan.json: {sorted(planned ^ found)[:1]}",
        f"{len(planned)} modules on layers {format_layers(plan['layers'])}, as planned",
    )


def _finite_weights(path: Path) -> str:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(str(path))
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    return require(not bad, f"not finite: {bad[:1]}", f"{len(tensors)} finite tensors")


def _adapter_target(folder: Path, info: AdapterInfo) -> str:
    record = record_of(folder)
    target = record.get("target", "peft")
    problems = adapter_problems(target, info.config, (), bool(record.get("allow_vision")))
    return require(not problems, f"{target} cannot load it: {'; '.join(problems)}", f"as {target} loads it")


def _merged_target(folder: Path) -> str:
    target = record_of(folder).get("target", "peft")
    check_merged(target, read_json(folder / "config.json"), "config.json")
    return f"as {target} loads it"


def _as_made(folder: Path) -> str:
    knocked_out = folder / KNOCKOUT_RECORD
    record = read_json(knocked_out if knocked_out.is_file() else folder / MERGE_RECORD)
    difference, bound = record["difference"]["value"], record["difference"]["bound"]
    return require(difference <= bound, "its making moved the logits", f"{difference:.2e} when made")


def _processor_check(folder: Path) -> Check:
    found = {p.name for p in folder.iterdir()}
    processor = found & {"processor_config.json", "preprocessor_config.json"}
    complete = bool(processor and "tokenizer_config.json" in found and found & set(_TOKENIZERS))
    detail = "processor and tokenizer are there" if complete else "processor files are missing"
    return Check("processor_files", complete, detail)


def card_detail(path: Path, relation: str, library: str) -> str:
    """What is good about a model card.

    Raises:
        VerificationError: no card, metadata that the Hub's own library does not read, or that lacks or gets
            wrong what says to readers and servers what this is; a token or path of a machine in it.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    if not path.is_file():
        raise VerificationError(f"there is no {path.name}")
    text = path.read_text(encoding="utf-8")
    try:
        data: dict[str, Any] = ModelCard(text).data.to_dict()
    except (ValueError, TypeError, YAMLError) as e:  # TypeError: a model-index without results
        raise VerificationError(
            f"{path.name} has metadata that the Hub refuses: {str(e).splitlines()[0]}"
        ) from e
    wanted = {
        "base_model_relation": relation, "library_name": library, "pipeline_tag": "image-text-to-text",
    }  # fmt: skip
    wrong = [f"{key} is {data.get(key)!r}, not {v}" for key, v in wanted.items() if data.get(key) != v]
    base = data.get("base_model")
    strange = not isinstance(base, str) or base.startswith(("/", ".", "~")) or base.count("/") > 1
    if base is not None and strange:
        wrong.append(f"base_model is {base!r}, no name of a model on the Hub")
    secret = find_secret(text)
    if secret:
        wrong.append(f"it holds what looks like a token or a path of a machine: {secret}")
    named = "base model named" if base else "no base model on the Hub to name"
    return require(not wrong, f"{path.name}: {'; '.join(wrong)}", f"metadata is valid, {named}")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter (else a model, if anything)."""
    return (folder / CONFIG).is_file()

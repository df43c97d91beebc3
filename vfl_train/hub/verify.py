"""Proof that a finished folder works elsewhere: manifest, contents, and a reload in a fresh process."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfl_train.errors import ConfigError, VerificationError, VflError
from vfl_train.hub.knockout import KNOCKOUT_RECORD
from vfl_train.hub.load import CONFIG, WEIGHTS, AdapterInfo, check_adapter
from vfl_train.hub.manifest import verify_manifest
from vfl_train.hub.merge import MERGE_RECORD, base_of
from vfl_train.hub.samples import BOUNDS, REFERENCE
from vfl_train.models.trust import check_model_folder
from vfl_train.options import format_layers
from vfl_train.schemas import read_json

if TYPE_CHECKING:
    from vfl_train.config import VerifyConfig

VERIFICATION = "verification.json"
MIN_EFFECT = 1e-6  # of the largest logit: less is the base model
_RELOAD_SECONDS = 3600


@dataclass(frozen=True)
class Check:
    """One entry of verification.json. `value` and `bound` are null where nothing is measured."""

    name: str
    passed: bool
    detail: str
    value: float | None = None
    bound: float | None = None


def verify(config: VerifyConfig) -> list[Check]:
    """Verify the folder of `config` and write verification.json into it (no other file is touched).

    Returns:
        The checks, all passed.

    Raises:
        ConfigError: not an adapter and not a merged model, or its base is not to be had.
        VerificationError: a check failed; the message names the first one.
    """
    folder = Path(config.folder)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}", "give the output of lora, merge or export")
    is_adapter = (folder / CONFIG).is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds neither an adapter nor a model")
    checks = [_check("manifest", lambda: f"{verify_manifest(folder)} files unchanged")]
    if checks[0].passed:
        checks += _adapter_checks(folder) if is_adapter else _merged_checks(folder)
    if all(check.passed for check in checks):
        base, revision = _base(folder, config.base) if is_adapter else (None, None)
        checks += _reload_checks(folder, base, revision, config.samples)
    _write(folder, checks)
    failed = [check for check in checks if not check.passed]
    if failed:
        raise VerificationError(
            f"{folder}: {failed[0].name}: {failed[0].detail}", f"all checks are in {folder / VERIFICATION}"
        )
    logging.getLogger(__name__).info("%s: %d checks passed", folder, len(checks))
    return checks


def _check(name: str, measure: Callable[[], str]) -> Check:
    """A check that passes with what `measure` says, or fails with the error it raises."""
    try:
        return Check(name, True, measure())
    except VflError as e:
        return Check(name, False, e.message)
    except (KeyError, TypeError) as e:
        return Check(name, False, f"a file does not follow its contract: {e!r}")


def _require(condition: bool, problem: str, detail: str) -> str:
    if not condition:
        raise VerificationError(problem)
    return detail


def _adapter_checks(folder: Path) -> list[Check]:
    checks = [_check("adapter_config", lambda: _explicit_targets(check_adapter(folder)))]
    if not checks[0].passed:
        return checks
    info = check_adapter(folder)
    if (folder / "plan.json").is_file():
        checks.append(_check("plan", lambda: _as_planned(folder, info)))
    return [*checks, _check("weights", lambda: _finite_weights(folder / WEIGHTS)), _processor_check(folder)]


def _explicit_targets(info: AdapterInfo) -> str:
    targets = info.config.get("target_modules")
    return _require(
        isinstance(targets, list) and set(targets) == info.modules,
        "target_modules is not the explicit list of the modules in the weights",
        f"explicit list of {len(info.modules)} module names",
    )


def _as_planned(folder: Path, info: AdapterInfo) -> str:
    planned = set(read_json(folder / "plan.json")["module_names"])
    return _require(
        planned == info.modules,
        f"the weights are of other modules than plan.json: {sorted(planned ^ info.modules)[:1]}",
        f"{len(planned)} modules on layers {format_layers(info.layers)}, as planned",
    )


def _finite_weights(path: Path) -> str:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(str(path))
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    return _require(not bad, f"not finite: {bad[:1]}", f"{len(tensors)} finite tensors")


def _processor_check(folder: Path) -> Check:
    found = {p.name for p in folder.iterdir()}
    processor = found & {"processor_config.json", "preprocessor_config.json"}
    template = "chat_template.jinja" in found or "chat_template.json" in found
    tokenizer = found & {"tokenizer.json", "tokenizer_config.json"}
    complete = bool(processor and template and len(tokenizer) == 2)
    detail = "processor, tokenizer and chat template are there" if complete else "processor files are missing"
    return Check("processor_files", complete, detail)


def _merged_checks(folder: Path) -> list[Check]:
    def trusted() -> str:
        check_model_folder(folder)
        return "no key that runs code, safetensors only"

    def generation() -> str:
        there = (folder / "generation_config.json").is_file()
        return _require(there, "generation_config.json is missing", "generation_config.json is there")

    def recorded() -> str:
        knocked_out = folder / KNOCKOUT_RECORD
        record = read_json(knocked_out if knocked_out.is_file() else folder / MERGE_RECORD)
        difference, bound = record["difference"]["value"], record["difference"]["bound"]
        return _require(difference <= bound, "its making moved the logits", f"{difference:.2e} when made")

    return [
        _check("model_folder", trusted),
        _processor_check(folder),
        _check("generation_config", generation),
        _check("merge", recorded),
    ]


def _base(folder: Path, given: str | None) -> tuple[str, str | None]:
    """(checked folder, revision to load it at) of an adapter's base. Raises ConfigError, HubError."""
    from vfl_train.models import local_folder

    name, revision = base_of([check_adapter(folder)], given)
    return str(local_folder(name, revision)), None


def _reload_checks(folder: Path, base: str | None, revision: str | None, samples: int) -> list[Check]:
    dtype = read_json(folder / REFERENCE)["dtype"]
    try:
        found = reload_in_fresh_process(folder, base, revision, samples)
    except VerificationError as e:
        return [Check("reload", False, e.message)]
    keys = [*found["missing_keys"], *found["unexpected_keys"]]
    checks = [
        Check(
            "reload_keys", not keys, f"{len(keys)} missing or unexpected {keys[:1]}" if keys else "all keys"
        )
    ]
    if base:
        count = found["adapter_tensors"]
        same = count["stored"] == count["loaded"] == count["equal"]
        checks.append(Check("adapter_keys", same, "{equal} of {stored} tensors loaded".format(**count)))
        effect = found["effect"]
        detail = "change of the logits against the base, of the largest logit (at least the bound)"
        checks.append(Check("effect", effect > MIN_EFFECT, detail, effect, MIN_EFFECT))
    difference, bound = found["difference"], BOUNDS[dtype]
    against = "the adapter before it was saved" if base else "base and adapters before the merge"
    detail = f"{dtype} logits against those of {against}, of the largest logit"
    return [
        *checks,
        Check("finite", found["finite"], "logits are finite"),
        Check("preprocessing", found["same_tokens"], "the saved processor makes the same tokens"),
        Check("logits", difference <= bound, detail, difference, bound),
    ]


def reload_in_fresh_process(
    folder: Path, base: str | None, revision: str | None, samples: int
) -> dict[str, Any]:
    """What `vfl_train.hub.reload` finds. Raises VerificationError if it fails."""
    command = [sys.executable, "-m", "vfl_train.hub.reload", str(folder.resolve()), "--samples", str(samples)]
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if base:
        command += ["--base", str(Path(base).resolve()) if Path(base).is_dir() else base]
        command += ["--revision", revision] if revision else []
    if not base or Path(base).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_RELOAD_SECONDS, env=environment, check=False
        )
    except subprocess.TimeoutExpired as e:
        raise VerificationError(f"reloading took more than {_RELOAD_SECONDS} s") from e
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise VerificationError(f"a fresh process cannot load it: {last}")
    return json.loads(lines[-1])


def _write(folder: Path, checks: list[Check]) -> None:
    """Replace verification.json in one step."""
    value = {"passed": all(check.passed for check in checks), "checks": [asdict(check) for check in checks]}
    temporary = folder / f".{VERIFICATION}.tmp"
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / VERIFICATION)

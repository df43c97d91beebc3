"""Proof that a finished folder works elsewhere: manifest, contents, and a reload in a fresh process."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vfl_train.errors import ConfigError, VerificationError
from vfl_train.hub.checks import Check, adapter_checks, check, is_adapter, merged_checks
from vfl_train.hub.contents import MERGE_RECORD, Base, check_names, find_base, names_of
from vfl_train.hub.keys import Names, lora_shapes
from vfl_train.hub.load import CONFIG, PEFT_PREFIX, WEIGHTS, check_adapter
from vfl_train.hub.manifest import verify_manifest
from vfl_train.hub.samples import BOUNDS, REFERENCE
from vfl_train.hub.targets import adapter_config, rewritten_weights
from vfl_train.runs import MANIFEST
from vfl_train.schemas import read_json

if TYPE_CHECKING:
    from vfl_train.config import VerifyConfig

VERIFICATION = "verification.json"
MIN_EFFECT = 1e-6  # of the largest logit: less is the base model
_RELOAD_SECONDS = 3600


def verify(config: VerifyConfig) -> list[Check]:
    """Verify the folder of `config` and write verification.json into it (no other file is touched).

    Returns:
        The checks, all passed.

    Raises:
        ConfigError: not an adapter and not a merged model, or its base is not to be had.
        VerificationError: no vfl-train output (nothing is written into it then).
        VerificationError: a check failed; the message names the first one.
    """
    folder = Path(config.folder)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}", "give the output of lora, merge or export")
    adapter = is_adapter(folder)
    if not adapter and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} holds neither an adapter nor a model", "give the output of lora, merge or export"
        )
    if not (folder / MANIFEST).is_file():
        raise VerificationError(
            f"{folder} has no {MANIFEST}, so that nothing says what it should hold",
            "vfl-train migrate takes in an adapter made elsewhere; else run the command that made it again",
        )
    checks = [check("manifest", lambda: f"{verify_manifest(folder)} files unchanged")]
    if checks[0].passed:
        checks += adapter_checks(folder) if adapter else merged_checks(folder)
    if all(c.passed for c in checks):
        checks += _against_base(folder, config) if adapter else _merged_against_base(folder, config.base)
    if all(c.passed for c in checks) and not adapter:
        checks += _reload_checks(folder, None, config.samples)
    _write(folder, checks)
    failed = [c for c in checks if not c.passed]
    if failed:
        raise VerificationError(
            f"{folder}: {failed[0].name}: {failed[0].detail}", f"all checks are in {folder / VERIFICATION}"
        )
    logging.getLogger(__name__).info("%s: %d checks passed", folder, len(checks))
    return checks


def _against_base(folder: Path, config: VerifyConfig) -> list[Check]:
    """Names and sizes of an adapter against its base, then the reload. Raises ConfigError, HubError."""
    info = check_adapter(folder)
    base = find_base(info, config.base, names_needed=True)
    names = Names(base.skeleton.model)
    # A server's export uses the names of the base model's files; PEFT loads today's.
    current = {module: names.current(module) for module in info.modules}

    def fits() -> str:
        shapes = lora_shapes(folder / WEIGHTS, PEFT_PREFIX)
        names.check_fit({current[module]: pair for module, pair in shapes.items()}, folder.name)
        names.in_files(sorted(current.values()), base.stored)
        return f"{len(current)} modules are in the base model and in its files, in the same sizes"

    checks = [check("base", fits)]
    if not checks[0].passed:
        return checks
    with _as_peft_names(folder, current) as loadable:
        return checks + _reload_checks(folder, base, config.samples, loadable)


@contextmanager
def _as_peft_names(folder: Path, current: dict[str, str]) -> Iterator[Path | None]:
    """A temporary folder with the adapter under today's names; None where it has them."""
    if all(old == new for old, new in current.items()):
        yield None
        return
    info = check_adapter(folder)
    with TemporaryDirectory() as temporary:
        path = Path(temporary)
        (path / WEIGHTS).write_bytes(rewritten_weights(info, current))
        (path / CONFIG).write_text(
            json.dumps(adapter_config(info, sorted(current.values()))), encoding="utf-8"
        )
        yield path


def _merged_against_base(folder: Path, given: str | None) -> list[Check]:
    """Names of a merged model's weights against those of its base's files, if the base is given."""
    if given is None:
        return []
    from vfl_train.models import local_folder

    stored = names_of(given, None, local_folder(given, weights=False))

    def same() -> str:
        check_names(folder, stored)
        return "all weights have names of the base model's files"

    return [check("base", same)]


def _reload_checks(
    folder: Path, base: Base | None, samples: int, loadable: Path | None = None
) -> list[Check]:
    try:
        where = str(base_folder(base)) if base else None
        found = reload_in_fresh_process(folder, where, None, samples, loadable)
    except VerificationError as e:
        return [Check("reload", False, e.message)]
    keys = [*found["missing_keys"], *found["unexpected_keys"]]
    detail = f"{len(keys)} missing or unexpected {keys[:1]}" if keys else "all keys"
    ours = found["ours"]
    checks = [
        Check("reload_keys", not keys, detail),
        Check(
            "plain", not ours, f"{ours[0]} was imported" if ours else "transformers and PEFT alone load it"
        ),
    ]
    if base:
        count = found["adapter_tensors"]
        same = count["stored"] == count["loaded"] == count["equal"]
        checks.append(Check("adapter_keys", same, "{equal} of {stored} tensors loaded".format(**count)))
        effect = found["effect"]
        detail = "change of the logits against the base, of the largest logit (at least the bound)"
        checks.append(Check("effect", effect > MIN_EFFECT, detail, effect, MIN_EFFECT))
    checks.append(Check("finite", found["finite"], "logits are finite"))
    if found["difference"] is None:
        return [*checks, Check("logits", True, f"not compared: the folder has no {REFERENCE}")]
    dtype = read_json(folder / REFERENCE)["dtype"]
    return checks + _output_checks(found, dtype, _moved_by_merging(folder), adapter=base is not None)


def _moved_by_merging(folder: Path) -> float:
    """How far merging in 16 bits moved the logits from the reference, which was taken before it."""
    if not (folder / MERGE_RECORD).is_file():
        return 0.0
    return float(read_json(folder / MERGE_RECORD)["difference"].get("same_format", 0.0))


def _output_checks(found: dict[str, Any], dtype: str, moved: float, adapter: bool) -> list[Check]:
    against = "the adapter before it was saved" if adapter else "base and adapters before the merge"
    bound = BOUNDS[dtype] if dtype == "float32" else BOUNDS[dtype] + moved
    checks = [
        Check("preprocessing", found["same_tokens"], "the saved processor makes the same tokens"),
        Check(
            "logits", found["difference"] <= bound,
            f"{dtype} logits against those of {against}, of the largest logit", found["difference"], bound,
        ),
    ]  # fmt: skip
    if found["written"] is not None:
        prompts, same, gap = found["written"]
        detail = f"{same} of {prompts} answers are the same; gap of the tokens where they part"
        checks.append(Check("generation", gap <= bound, detail, gap, bound))
    return checks


def base_folder(base: Base) -> Path:
    """The base model's folder with its weights, fetched where it is a Hub model. Raises HubError."""
    from vfl_train.models import local_folder

    return local_folder(base.name, base.revision)


def reload_in_fresh_process(
    folder: Path, base: str | None, revision: str | None, samples: int, adapter: Path | None = None
) -> dict[str, Any]:
    """What `vfl_train.hub.reload` finds. Raises VerificationError if it fails."""
    script = Path(__file__).with_name("reload.py")
    # -P: nothing is imported from beside the script, where this package's modules lie.
    command = [sys.executable, "-P", str(script), str(folder.resolve()), "--samples", str(samples)]
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if base:
        command += ["--base", str(Path(base).resolve()) if Path(base).is_dir() else base]
        command += ["--revision", revision] if revision else []
    if adapter:
        command += ["--adapter", str(adapter)]
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
    value = {"passed": all(c.passed for c in checks), "checks": [asdict(c) for c in checks]}
    temporary = folder / f".{VERIFICATION}.tmp"
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / VERIFICATION)

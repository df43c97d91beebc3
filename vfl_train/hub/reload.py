"""Run in a fresh process by `vfl-train verify`: load a folder with plain transformers and plain PEFT, and
say in JSON what came out. Nothing of this package is imported, so that what loads here loads anywhere; the
sample prompts are read from the file beside this one, which imports nothing of it either.

    python -P .../vfl_train/hub/reload.py FOLDER [--base FOLDER_OR_ID] [--revision REV] [--samples N]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


def _beside(name: str) -> ModuleType:
    """The module in the file `name`.py beside this one, under that name alone."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


samples = _beside("samples")


def reload(
    folder: Path, base: str | None, revision: str | None, count: int, adapter: Path | None = None
) -> dict[str, Any]:
    """Load the model in `folder` (an adapter if `base` is given) and compare its logits and what it writes
    with the reference beside it. `adapter`: where the adapter lies under names that PEFT knows, if not in
    `folder`. Returns findings as plain JSON."""
    reference = _reference(folder / samples.REFERENCE)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    model, loading = AutoModelForImageTextToText.from_pretrained(
        base or folder,
        revision=revision if base else None,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=getattr(torch, reference["dtype"]),
        attn_implementation="sdpa",
        output_loading_info=True,
        **_quantization(reference),
    )
    on_gpu = reference["device"] != "cpu" and torch.cuda.is_available()
    if "quantization" not in reference:
        model = model.to("cuda" if on_gpu else "cpu")
    model = model.eval()
    inputs = samples.sample_inputs(processor, count, reference["seed"])
    found: dict[str, Any] = {
        "missing_keys": sorted(loading["missing_keys"]),
        "unexpected_keys": sorted(loading["unexpected_keys"]),
    }
    if base:
        model, found["adapter_tensors"] = _adapt(model, adapter or folder)
    written = samples.greedy(model, inputs)
    logits = [steps[0][1] for steps in written]
    if base:  # with the adapter on: bitsandbytes repacks 4-bit weights on the CPU when they run first
        with model.disable_adapter():
            found["effect"] = samples.relative_difference(logits, samples.next_logits(model, inputs))
    found["finite"] = all(bool(torch.isfinite(row).all()) for row in logits)
    found["difference"], found["same_tokens"] = None, True
    if reference["prompts"]:
        found["difference"], found["same_tokens"] = samples.compare_reference(reference, inputs, logits)
    found["written"] = samples.compare_written(reference, written)
    return found


def _reference(path: Path) -> dict[str, Any]:
    """The reference of a folder; one that nothing is compared with where there is none."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"seed": 0, "dtype": "float32", "device": "cpu", "prompts": []}


def _quantization(reference: dict[str, Any]) -> dict[str, Any]:
    """An adapter trained on a quantized base is compared on one."""
    if "quantization" not in reference:
        return {}
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig.from_dict(dict(reference["quantization"]))}


def _adapt(model: torch.nn.Module, folder: Path) -> tuple[Any, dict[str, int]]:
    """The PEFT model and the number of LoRA tensors in the file, in the model, and equal in both."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    stored = load_file(str(folder / "adapter_model.safetensors"))
    loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    equal = sum(k in loaded and torch.equal(loaded[k].cpu().to(v.dtype), v) for k, v in stored.items())
    return adapted, {"stored": len(stored), "loaded": len(loaded), "equal": equal}


def main() -> None:
    """Parse, reload, print one line of JSON on stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--revision")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--adapter", type=Path)
    arguments = parser.parse_args()
    found = reload(arguments.folder, arguments.base, arguments.revision, arguments.samples, arguments.adapter)
    found["ours"] = sorted(name for name in sys.modules if name.partition(".")[0] == "vfl_train")
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

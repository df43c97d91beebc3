"""Run in a fresh process by `vfl-train verify`: load a folder with plain transformers and plain PEFT, and
say in JSON what came out. Nothing of this package but the sample prompts is used.

    python -m vfl_train.hub.reload FOLDER [--base FOLDER_OR_ID] [--revision REV] [--samples N]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vfl_train.hub.samples import (
    REFERENCE,
    compare_reference,
    next_logits,
    relative_difference,
    sample_inputs,
)


def reload(folder: Path, base: str | None, revision: str | None, samples: int) -> dict[str, Any]:
    """Load the model in `folder` (an adapter if `base` is given) and compare its logits with the reference
    beside it. Returns findings as plain JSON."""
    reference = json.loads((folder / REFERENCE).read_text(encoding="utf-8"))
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    on_gpu = reference["device"] != "cpu" and torch.cuda.is_available()
    model, loading = AutoModelForImageTextToText.from_pretrained(
        base or folder,
        revision=revision if base else None,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=getattr(torch, reference["dtype"]),
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    model = model.to("cuda" if on_gpu else "cpu").eval()
    inputs = sample_inputs(processor, samples, reference["seed"])
    logits = next_logits(model, inputs)
    found: dict[str, Any] = {
        "missing_keys": sorted(loading["missing_keys"]),
        "unexpected_keys": sorted(loading["unexpected_keys"]),
    }
    if base:
        plain = logits
        adapted, found["adapter_tensors"] = _adapt(model, folder)
        logits = next_logits(adapted, inputs)
        found["effect"] = relative_difference(logits, plain)
    found["finite"] = all(bool(torch.isfinite(row).all()) for row in logits)
    found["difference"], found["same_tokens"] = compare_reference(reference, inputs, logits)
    return found


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
    arguments = parser.parse_args()
    found = reload(arguments.folder, arguments.base, arguments.revision, arguments.samples)
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

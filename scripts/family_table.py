"""What each model family can do here, and how exact it is: the table in vfl_train/models/families/README.md.

    python scripts/family_table.py [--only NAME ...] [--print]

Every family's tiny random model (tests/support) in float32 on the CPU, one thread. The error is the largest
difference in a log-probability (nats) from a copy that computes in float64, over the rows of
tests/support/family_cases.py: drops and swaps of single layers and of several, both phases, noise, one image
and two. Without --print the table is written between the markers of the README.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from family_cases import VARIANT_REASONS, logprobs, rows_of, truth_of  # noqa: E402
from pictures import picture  # noqa: E402
from tiny_models import SUPPORTED, VARIANTS, model_type_of, tiny_vlm  # noqa: E402

from vfl_train.data.rows import Image, Message, Text  # noqa: E402
from vfl_train.interventions.readout import Cost  # noqa: E402
from vfl_train.models import VisionLanguageModel  # noqa: E402
from vfl_train.models.families import FAMILIES  # noqa: E402

README = ROOT / "vfl_train" / "models" / "families" / "README.md"
START, END = "<!-- table: scripts/family_table.py -->", "<!-- end of table -->"
HEAD = (
    "family", "path", "several images", "text between them", "video", "boxes", "decoder",
    "reference error", "engine error",
)  # fmt: skip
NAMES = [name for name in SUPPORTED if name not in VARIANTS]


def why_reference(name: str) -> str | None:
    """Why a tiny model's rows run on the reference path, or None."""
    return VARIANT_REASONS.get(name, FAMILIES[model_type_of(name)].reference_only)


def facts(name: str) -> dict[str, str]:
    """The columns that the registry knows."""
    family, why = FAMILIES[model_type_of(name)], why_reference(name)
    return {
        "path": "engine" if why is None else f"reference: {why}",
        "several images": "yes" if family.several_images else "no",
        "video": "yes" if family.video else "no",
        "boxes": family.box or "-",
    }


def measured(name: str) -> dict[str, str]:
    """The columns that the model shows."""
    vlm = tiny_vlm(name)
    rows, cost = rows_of(vlm), Cost()
    truth = truth_of(vlm, rows)
    found = {"text between them": between(vlm), "decoder": decoder(vlm)}
    for path in ("reference", "engine"):
        error = (logprobs(vlm, rows, path, cost) - truth).abs().max()
        found[f"{path} error"] = f"{float(error):.1e}"
    if cost.reference_rows == len(rows):  # the engine ran none
        found["engine error"] = "-"
    return found


def decoder(vlm: VisionLanguageModel) -> str:
    """What is special in the decoder's layers."""
    layers = [dict(layer.named_modules()) for layer in vlm.layers]
    kinds = ["experts" if any("experts" in name for layer in layers for name in layer) else "dense"]
    if "sliding_attention" in (getattr(vlm.text_config, "layer_types", None) or ()):
        kinds.append("sliding windows")
    if vlm.family.cross_attention is not None:
        kinds.append("cross-attention")
    if vlm.family.adds_between_layers:
        kinds.append("deep stack")
    return ", ".join(kinds)


def between(vlm: VisionLanguageModel) -> str:
    """Whether words between two images stay there, or the chat template puts the images first."""
    if not vlm.family.several_images:
        return "-"
    message = Message("user", (Image(0), Text("12 dogs"), Image(1), Text("three cats ?")))
    prompt = vlm.prompt_of([message], [picture(0), picture(1)])
    (_, start), (end, _) = prompt.spans
    kept = "12 dogs" in vlm.processor.tokenizer.decode(prompt.inputs["input_ids"][0, start:end])
    return "yes" if kept else "no: the template puts images first"


def table(names: list[str]) -> str:
    """Markdown: supported families in the registry's order, then the refused ones with their sentences."""
    order = list(FAMILIES)
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for name in sorted(names, key=lambda name: order.index(model_type_of(name))):
        cells = {"family": name, **facts(name), **measured(name)}
        lines.append(f"| {' | '.join(cells[column] for column in HEAD)} |")
    return "\n".join([*lines, "", *refusals()])


def refusals() -> list[str]:
    """The refused families with their sentences."""
    refused = {name: family.refused for name, family in FAMILIES.items() if family.refused is not None}
    return ["Refused, in these words:", "", *(f"- {name}: {why}" for name, why in sorted(refused.items()))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--print", action="store_true", help="print the table instead of writing it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = table(options.only)
    if options.print or options.only != NAMES:
        print(found)
        return
    before, _, rest = README.read_text("utf-8").partition(START)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{START}\n\n{found}\n\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()

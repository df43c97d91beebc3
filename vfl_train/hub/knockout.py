"""`export --knockout FILE`: a plain transformers model without what a knockout leaves out.

The projections out of a module write what it adds to the residual stream; with their weights and biases zero
it adds nothing, as under the hook. Nothing else of the checkpoint changes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vfl_train.errors import ConfigError, VerificationError
from vfl_train.hub.card import knockout_card, unpublished
from vfl_train.hub.contents import KNOCKOUT_RECORD
from vfl_train.hub.export import LICENCES
from vfl_train.hub.load import CONFIG
from vfl_train.hub.manifest import verify_manifest
from vfl_train.hub.merge import save_model
from vfl_train.hub.push import refuse_secrets
from vfl_train.hub.samples import (
    BOUNDS,
    REFERENCE,
    make_reference,
    next_logits,
    relative_difference,
    sample_inputs,
)
from vfl_train.interventions import knockout
from vfl_train.interventions.hooks import silenced_modules
from vfl_train.interventions.standing import standing
from vfl_train.knockout.record import Knockout, knockout_file
from vfl_train.models import VisionLanguageModel
from vfl_train.models.digest import model_digest
from vfl_train.models.vlm import DTYPES
from vfl_train.runs import MANIFEST, MARKER, RunFolder, file_sha256, fingerprint
from vfl_train.schemas import read_json

if TYPE_CHECKING:
    from vfl_train.config import ExportConfig

OUTPUTS = ("o_proj", "down_proj")  # the projections out of attention and MLP
log = logging.getLogger(__name__)


def export_knockout(config: ExportConfig) -> Path:
    """Write the model of `config.source` (a merged model, a plain model folder, a Hub id or a bundled name)
    without the layer of `config.knockout`.

    Returns:
        The output folder.

    Raises:
        ConfigError: a file that abstained, is not confirmed or is of another model, an adapter, a module that
            has no single projection out (a mixture of experts), or a token or home path in what was written.
        VerificationError: a file of the source was changed since it was written, or the result does not
            answer as the hook does.
    """
    assert config.knockout is not None
    found = Knockout.load(config.knockout)
    if found.layer is None:
        alone = [name for name, layer in found.tasks.items() if layer is not None]
        fix = (
            f"run vfl-train knockout on the rows of {alone[0]} alone"
            if alone
            else "there is nothing to export"
        )
        raise ConfigError(f"{config.knockout} leaves out no layer for all rows together: it abstained", fix)
    if not found.confirmed:
        raise ConfigError(
            f"{config.knockout} has a layer whose gain is not confirmed on the rows held out",
            "run vfl-train knockout on more rows",
        )
    if (config.source / CONFIG).is_file():
        raise ConfigError(f"{config.source} is an adapter", "merge it first, then export the merged model")
    if (config.source / MANIFEST).is_file():
        verify_manifest(config.source)
    vlm = load_as_saved(str(config.source))
    for warning in found.check_model(vlm.info):
        log.warning("%s", warning)
    projections_out(vlm, found.layer, found.module)  # fails before anything is written
    inputs = {"source": model_digest(vlm), "knockout": file_sha256(knockout_file(config.knockout))}
    wanted = fingerprint("export", config, inputs, ("torch", "transformers"))
    with RunFolder.open(config.output, wanted, config.overwrite) as run:
        if run.already_done:
            log.info("%s: already done", run.folder)
            return run.folder
        record = silence_layer(vlm, found.layer, found.module)
        save_model(vlm, run.folder)
        if vlm.folder is not None:
            record["earlier"] = earlier_layers(vlm.folder)
            for licence in LICENCES:
                if (vlm.folder / licence).is_file():
                    shutil.copyfile(vlm.folder / licence, run.folder / licence)
        run.write_json(KNOCKOUT_RECORD, record)
        run.write_json(REFERENCE, make_reference(vlm.model, vlm.processor))
        run.write_text("README.md", knockout_card(
            found.layer, record["zeroed"], vlm.dtype, unpublished(vlm.name_or_path, vlm.revision)
        ))  # fmt: skip
        written = (p.name for p in run.folder.iterdir() if p.is_file() and p.name != MARKER)
        refuse_secrets(run.folder, sorted(written))
    log.info("%s: layer %d without its %s", run.folder, found.layer, found.module)
    return run.folder


def earlier_layers(folder: Path) -> list[dict[str, Any]]:
    """What earlier exports left out of the model in `folder`, the first one first. Raises ConfigError."""
    if not (folder / KNOCKOUT_RECORD).is_file():
        return []
    record = read_json(folder / KNOCKOUT_RECORD)
    if not isinstance(record, dict) or not {"layer", "module", "zeroed"} <= record.keys():
        raise ConfigError(f"{folder / KNOCKOUT_RECORD} does not say what was left out")
    return [*record.get("earlier", []), {key: record[key] for key in ("layer", "module", "zeroed")}]


def load_as_saved(name: str) -> VisionLanguageModel:
    """The model on the CPU, in the number format of its checkpoint. Raises as loading does."""
    from transformers import AutoConfig

    from vfl_train.models.vlm import local_folder

    saved = AutoConfig.from_pretrained(local_folder(name), local_files_only=True).dtype
    dtype = next((key for key, kind in DTYPES.items() if kind == saved), "float32")
    return VisionLanguageModel.load(name, dtype=dtype, device="cpu")


def projections_out(vlm: VisionLanguageModel, layer: int, module: str) -> dict[str, nn.Linear]:
    """Name inside the layer -> the linear through which `module` adds to the residual stream.
    Raises ConfigError where there is no such linear."""
    inside, found = dict(vlm.layers[layer].named_modules()), {}
    for part in silenced_modules(vlm, layer, module):
        names = [f"{part}.{name}" for name in OUTPUTS if isinstance(inside.get(f"{part}.{name}"), nn.Linear)]
        if len(names) != 1:
            raise ConfigError(
                f"the {part} of layer {layer} of this {vlm.model_type} has no single projection out to zero",
                "use the hook: vfl_train.interventions.standing",
            )
        linear = inside[names[0]]
        assert isinstance(linear, nn.Linear)
        found[names[0]] = linear
    return found


def silence_layer(vlm: VisionLanguageModel, layer: int, module: str) -> dict[str, Any]:
    """Zero what `module` of `layer` adds, in place, and return what was done, with the largest difference to
    the logits under the hook. Raises VerificationError if that is more than rounding."""
    projections = projections_out(vlm, layer, module)
    inputs = sample_inputs(vlm.processor)
    with standing(vlm, knockout([layer], module)):
        hooked = next_logits(vlm.model, inputs)
    silence_for_good(projections.values())
    difference, bound = relative_difference(next_logits(vlm.model, inputs), hooked), BOUNDS[vlm.dtype]
    if not difference <= bound:
        raise VerificationError(
            f"without the projections the model answers otherwise than under the hook: logits differ by "
            f"{difference:.2e}, bound {bound:.0e}"
        )
    return {
        "layer": layer, "module": module, "zeroed": sorted(projections), "dtype": vlm.dtype,
        "difference": {"value": difference, "bound": bound, "of": "largest logit", "prompts": len(inputs)},
    }  # fmt: skip


@torch.no_grad()
def silence_for_good(projections: Iterable[nn.Linear]) -> None:
    """Zero the weights and biases of linears, in place."""
    for linear in projections:
        linear.weight.zero_()
        if linear.bias is not None:
            linear.bias.zero_()

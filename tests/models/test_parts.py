"""Vision tower and connector by name, of every family; the blocks whose output is not used stay out."""

from __future__ import annotations

import pytest
from tiny_models import FAMILIES, tiny_vlm
from torch import nn

from vfl_train.errors import ConfigError
from vfl_train.models.parts import Parts

CONNECTOR = {  # linear modules between tower and decoder
    "qwen2_vl": 2, "qwen2_5_vl": 2, "qwen3_vl": 6, "llava": 2, "internvl": 2, "idefics3": 1,
}  # fmt: skip


@pytest.mark.parametrize("family", [*FAMILIES, "idefics3"])
def test_the_parts_and_the_decoder_share_out_all_linears(family: str) -> None:
    vlm = tiny_vlm(family)
    parts = Parts(vlm)
    linears = {name for name, module in vlm.base.named_modules() if isinstance(module, nn.Linear)}
    inside = {name for name in linears if name.startswith(f"{vlm.decoder_name}.")}
    by_part = {part: {n for n in linears if parts.of(n) == part} for part in ("vision", "connector")}
    assert linears - inside - by_part["vision"] - by_part["connector"] == {"lm_head"}
    assert not inside & (by_part["vision"] | by_part["connector"])
    assert set(parts.linears("vision")) == by_part["vision"] and by_part["vision"]
    if family == "gemma3":  # its connector is one matrix that is no linear module
        with pytest.raises(ConfigError, match="connector of this gemma3 has no linear module"):
            parts.linears("connector")
    else:
        assert len(parts.linears("connector")) == CONNECTOR[family]
        assert set(parts.linears("connector")) == by_part["connector"]


def test_blocks_behind_the_one_that_features_are_taken_from_stay_out(monkeypatch) -> None:
    vlm = tiny_vlm("llava")
    assert vlm.config.vision_feature_layer == -1
    monkeypatch.setattr(vlm.config, "vision_feature_layer", -2)  # as LLaVA-1.5 has it
    blocks = {name.split(".")[4] for name in Parts(vlm).linears("vision")}
    assert blocks == {"0"}
    monkeypatch.setattr(vlm.config, "vision_feature_layer", [0, 2])  # as several features have it
    assert {name.split(".")[4] for name in Parts(vlm).linears("vision")} == {"0", "1"}

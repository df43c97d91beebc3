"""Merging: exact arithmetic, refusals, and a folder that plain transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from folders import remade
from safetensors.torch import load_file

from vfl_train.config import MergeConfig
from vfl_train.errors import ConfigError, VerificationError
from vfl_train.hub.keys import stored_names
from vfl_train.hub.load import AdapterInfo, base_of, check_adapter
from vfl_train.hub.merge import check_overlap, merge, unique_names
from vfl_train.schemas import FunctionScore

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def merged(adapter: Path, other_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merged") / "m"
    return merge(
        MergeConfig(adapters=(str(adapter), str(other_adapter)), output=output, device="cpu", pairs=0)
    )


def test_the_weights_are_base_plus_updates(
    merged: Path, base_folder: Path, adapter: Path, other_adapter: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    expected = AutoModelForImageTextToText.from_pretrained(base_folder).state_dict()
    for folder in (adapter, other_adapter):
        state = load_file(str(folder / "adapter_model.safetensors"))
        for key in [k for k in state if "lora_A" in k]:
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            update = state[key.replace("lora_A", "lora_B")] @ state[key] * 2  # alpha / r
            expected[f"{module}.weight"] = expected[f"{module}.weight"] + update
    found = AutoModelForImageTextToText.from_pretrained(merged).state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_the_record_states_layers_and_the_difference(merged: Path) -> None:
    record = json.loads((merged / "merge.json").read_text())
    assert [a["layers"] for a in record["adapters"]] == [[3, 4], [10]]
    assert record["difference"]["value"] <= record["difference"]["bound"] == 1e-5
    assert record["effect"]["value"] > 1e-3
    assert record["dtype"] == "float32"


def test_the_folder_is_plain_transformers(merged: Path, base_folder: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, info = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not [n for n, _ in model.named_modules() if "lora" in n]
    assert AutoProcessor.from_pretrained(merged).chat_template
    assert (merged / "generation_config.json").is_file()
    assert stored_names(merged) == stored_names(base_folder)
    head = yaml.safe_load((merged / "README.md").read_text().split("---\n")[1])
    assert (head["base_model_relation"], head["library_name"]) == ("finetune", "transformers")


def test_no_path_of_the_machine_is_left(merged: Path, base_folder: Path, adapter: Path) -> None:
    for path in merged.iterdir():
        content = path.read_bytes()
        assert str(base_folder).encode() not in content, path.name
        assert str(adapter.parent).encode() not in content, path.name


def test_overlapping_adapters_are_refused_unless_asked_for(
    adapter: Path, make_adapter, tmp_path: Path
) -> None:
    other = make_adapter(tmp_path / "other", "4-5", seed=2)
    pair = (str(adapter), str(other))
    with pytest.raises(ConfigError, match=r"both change model\.language_model\.layers\.4 "):
        merge(MergeConfig(adapters=pair, output=tmp_path / "m", device="cpu", pairs=0))
    assert not (tmp_path / "m").exists()
    merge(MergeConfig(adapters=pair, output=tmp_path / "m", device="cpu", allow_overlap=True, pairs=0))
    assert (tmp_path / "m" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [("model.layers.3.q", "model.visual.blocks.3.q", None),
     ("model.layers.3.q", "model.layers.3.k", "model.layers.3"),
     ("model.connector.linear_1", "model.connector.linear_1", "model.connector.linear_1"),
     ("model.connector.linear_1", "model.connector.linear_2", None)],
)  # fmt: skip
def test_parts_beside_the_decoder_overlap_too(first: str, second: str, both: str | None) -> None:
    infos = [
        AdapterInfo(Path(name), None, None, frozenset({f"model.layers.{layer}.q", module}), {})
        for name, layer, module in (("a", 7, first), ("b", 9, second))
    ]
    if both is None:
        check_overlap(infos, allow=False)
        return
    with pytest.raises(ConfigError) as raised:
        check_overlap(infos, allow=False)
    assert raised.value.message == f"a and b both change {both}"


def test_a_flipped_bit_of_an_adapter_is_not_merged(adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    content = bytearray((copy / "adapter_model.safetensors").read_bytes())
    content[-5] ^= 1
    (copy / "adapter_model.safetensors").write_bytes(content)
    config = MergeConfig(adapters=(str(copy),), output=tmp_path / "m", device="cpu", pairs=0)
    with pytest.raises(VerificationError, match=r"adapter_model\.safetensors in .* was changed"):
        merge(config)
    assert not (tmp_path / "m").exists()


def test_sixteen_bit_merges_are_measured_too(adapter: Path, tmp_path: Path) -> None:
    config = MergeConfig(
        adapters=(str(adapter),), output=tmp_path / "m", device="cpu", dtype="bfloat16", pairs=0
    )
    measured = json.loads((merge(config) / "merge.json").read_text())["difference"]
    assert 0 < measured["value"] <= measured["bound"] == 2 * measured["adapter_alone"]
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    weights = load_file(str(tmp_path / "m" / "model.safetensors")).values()
    assert {t.dtype for t in weights} == {torch.bfloat16}


def test_a_merge_that_moves_the_logits_is_refused(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("vfl_train.hub.merge", fromlist=["BOUNDS"]).BOUNDS, "float32", -1.0)
    with pytest.raises(VerificationError, match="answers differently"):
        merge(MergeConfig(adapters=(str(adapter),), output=tmp_path / "m", device="cpu", pairs=0))
    assert not (tmp_path / "m" / "model.safetensors").exists()


def test_a_base_on_the_hub_is_only_fetched_when_given(adapter: Path) -> None:
    info = check_adapter(adapter)
    remote = type(info)(info.folder, "someone/model", None, info.modules, info.config)
    with pytest.raises(ConfigError, match="--model someone/model"):
        base_of([remote], None)
    assert base_of([remote], "someone/model") == ("someone/model", None)
    with pytest.raises(ConfigError, match="different base models"):
        base_of([remote, info], None)


def test_names_are_unique(adapter: Path, other_adapter: Path) -> None:
    infos = [check_adapter(adapter), check_adapter(other_adapter), check_adapter(adapter)]
    assert unique_names(infos) == ["a", "b.1", "a-2"]


def test_a_finished_merge_is_not_repeated(merged: Path, adapter: Path, other_adapter: Path) -> None:
    before = (merged / "model.safetensors").stat().st_mtime_ns
    merge(MergeConfig(adapters=(str(adapter), str(other_adapter)), output=merged, device="cpu", pairs=0))
    assert (merged / "model.safetensors").stat().st_mtime_ns == before


def test_a_merged_phantom_still_knows_its_world(merged: Path) -> None:
    """So that its probes are drawn from there."""
    from vfl_train.models import VisionLanguageModel

    assert VisionLanguageModel.load(str(merged)).world == "phantom"


def test_order_does_not_matter_for_adapters_on_different_layers(
    merged: Path, adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    turned = (str(other_adapter), str(adapter))
    merge(MergeConfig(adapters=turned, output=tmp_path / "m", device="cpu", pairs=0))
    ours, theirs = (load_file(str(f / "model.safetensors")) for f in (tmp_path / "m", merged))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_adapters_change_the_weights_of_each_alone(
    merged: Path, adapter: Path, base_folder: Path, tmp_path: Path
) -> None:
    """Exact as weights: with the second one, the layers of the first are bit for bit as with it alone."""
    merge(MergeConfig(adapters=(str(adapter),), output=tmp_path / "m", device="cpu", pairs=0))
    alone, both, base = (
        load_file(str(f / "model.safetensors")) for f in (tmp_path / "m", merged, base_folder)
    )
    changed = {name for name in both if not torch.equal(both[name], base[name])}
    first = {name for name in changed if ".layers.3." in name or ".layers.4." in name}
    assert len(first) == 14 and {name.split(".layers.")[1].split(".")[0] for name in changed - first} == {
        "10"
    }
    assert all(torch.equal(alone[name], both[name]) for name in first)


def test_the_files_of_the_base_stay_byte_for_byte(merged: Path, base_folder: Path) -> None:
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja", "config.json"):
        assert (merged / name).read_bytes() == (base_folder / name).read_bytes(), name


def test_a_quantized_base_is_refused(adapter: Path, base_folder: Path, tmp_path: Path) -> None:
    quantized = Path(shutil.copytree(base_folder, tmp_path / "nf4"))
    value = json.loads((quantized / "config.json").read_text())
    value["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=r"nf4 is quantized.*16-bit"):
        merge(
            MergeConfig(adapters=(str(adapter),), model=str(quantized), output=tmp_path / "m", device="cpu")
        )
    assert not (tmp_path / "m").exists()


def test_an_adapter_of_a_4_bit_base_goes_into_the_16_bit_one(
    make_adapter, base_folder: Path, tmp_path: Path
) -> None:
    """QLoRA: the merge is held to the adapter on the unquantized base; how far that base is from the one it
    was trained on is measured beside it."""
    pytest.importorskip("bitsandbytes", reason="needs the extra quant")
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    from vfl_train.hub.load import load_adapter
    from vfl_train.hub.samples import make_reference

    folder = make_adapter(tmp_path / "q", "3-4", seed=3)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    base = AutoModelForImageTextToText.from_pretrained(
        base_folder, quantization_config=nf4, dtype=torch.float32
    )
    trained = load_adapter(base, folder)
    reference = make_reference(trained, AutoProcessor.from_pretrained(base_folder))
    remade(folder, "logits_reference.json", json.dumps(reference))
    for dtype in ("float32", "bfloat16"):
        output = tmp_path / dtype
        config = MergeConfig(adapters=(str(folder),), output=output, device="cpu", dtype=dtype, pairs=0)
        record = json.loads((merge(config) / "merge.json").read_text())
        assert record["difference"]["value"] <= record["difference"]["bound"]
        entry = record["adapters"][0]
        assert entry["trained_on"] == "bitsandbytes" and entry["to_training"] > record["difference"]["value"]


def test_a_merge_is_scored_beside_its_parts(
    adapter: Path, other_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With answers that are judged by a stand-in: which model is asked, in which order, and what is said."""
    asked: list[list[str]] = []

    def right(vlm, questions, asking):
        layers = [m for m in vlm.model.modules() if isinstance(m, LoraLayer)]
        off = bool(layers) and layers[0].disable_adapters
        asked.append(["merged"] if not layers else [] if off else list(layers[0].active_adapters))
        share = {"merged": 0.4, "merge0": 0.5, "merge1": 0.5}.get("".join(asked[-1]), 0.25)
        return {"ocr": FunctionScore(share, 20, (0.0, 1.0))}

    from peft.tuners.lora import LoraLayer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vfl_train.hub.merge_score.score", right)
        output = merge(
            MergeConfig(
                adapters=(str(adapter), str(other_adapter)), output=tmp_path / "m", device="cpu", pairs=1
            )
        )
    assert asked == [[], ["merge0"], ["merge1"], ["merged"]]
    score = json.loads((output / "merge.json").read_text())["score"]
    assert score["functions"]["ocr"] == {
        "n": 20, "base": 0.25, "alone": {"a": 0.5, "b.1": 0.5}, "merged": 0.4, "change": pytest.approx(-10)
    }  # fmt: skip
    assert "-10.0" in capsys.readouterr().out
    assert "| ocr | 20 | 25.0% | 50.0% | 50.0% | 40.0% | -10.0 |" in (output / "README.md").read_text()


def test_a_merge_is_scored_on_given_rows(adapter: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "r.png")
    turns = [{"role": "user", "content": "<image>what is it ?"}, {"role": "assistant", "content": "red"}]
    row = {"messages": turns, "images": ["r.png"], "source": "ocr"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    output = merge(
        MergeConfig(
            adapters=(str(adapter),), output=tmp_path / "m", device="cpu", data=str(tmp_path / "rows.jsonl")
        )
    )
    score = json.loads((output / "merge.json").read_text())["score"]
    assert score["questions"] == "rows.jsonl" and [s["n"] for s in score["functions"].values()] == [1]
    with pytest.raises(ConfigError, match="exclude each other"):
        MergeConfig(adapters=("a",), output=tmp_path / "x", data="d", probes=tmp_path).check()

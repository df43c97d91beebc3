"""Settings check themselves, whoever builds them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfl_train.config import COMMANDS, LoraConfig, MergeConfig, ProfileConfig
from vfl_train.errors import ConfigError
from vfl_train.options import budget_rows, parse_layers, parse_weights, specs


def test_built_in_code_it_converts_like_the_command_line() -> None:
    config = ProfileConfig(output="x", functions=["ocr", "count"], pairs="7")
    assert (config.output, config.functions, config.pairs) == (Path("x"), ("ocr", "count"), 7)
    assert ProfileConfig(output="x", functions="ocr, count") == ProfileConfig(
        output="x", functions=("ocr", "count")
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"pairs": True},
        {"pairs": None},
        {"seed": -1},
        {"limit": 0},
        {"model": " "},
        {"overwrite": "yes"},
        {"dtype": "f"},
    ],
)
def test_wrong_values_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="--" + next(iter(wrong))):
        ProfileConfig(output="x", **wrong)


def test_paths_of_arguments_may_hold_commas() -> None:
    assert MergeConfig(adapters=("a,b", "c"), output="x").adapters == ("a,b", "c")


@pytest.mark.parametrize("config_class", COMMANDS.values())
def test_every_field_is_explained(config_class: type) -> None:
    for spec in specs(config_class).values():
        assert spec.help and len(spec.help) < 140, spec.name


def test_lora_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="needs --profile"):
        LoraConfig(data="d", output="o", functions=("ocr",))
    assert LoraConfig(data="d", output="o", control="all").functions == ()


@given(st.sets(st.integers(0, 200), min_size=1))
def test_layers_round_trip(layers: set[int]) -> None:
    assert parse_layers(",".join(map(str, layers))) == tuple(sorted(layers))


def test_layer_ranges_are_inclusive() -> None:
    assert parse_layers("20-23, 25,22") == (20, 21, 22, 23, 25)


@pytest.mark.parametrize("text", ["", ",", "a", "3-", "-3", "5-3", "1-2-3", "1.5", "0-99999999", "²"])
def test_bad_layers(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_layers(text)


@given(st.integers(1, 999), st.integers(0, 10**6))
def test_budget_is_floored_exactly(thousandths: int, kept: int) -> None:
    share = f"{thousandths / 1000:.3f}"
    assert budget_rows(share, kept) == max(1, thousandths * kept // 1000)


def test_budget_examples() -> None:
    assert budget_rows("0.29", 100) == 29  # int(0.29 * 100) is 28
    assert budget_rows("500", 100) == 500


@pytest.mark.parametrize("text", ["0", "1.0", "-1", "1.5", "all", "", "1/0", "0.0"])
def test_bad_budget(text: str) -> None:
    with pytest.raises(ConfigError, match="--budget"):
        budget_rows(text, 10)


@pytest.mark.parametrize("text", ["", "ocr", "ocr=", "ocr=-1", "ocr=nan", "ocr=1,ocr=2"])
def test_bad_weights(text: str) -> None:
    with pytest.raises(ConfigError, match="--mix"):
        parse_weights(text, "--mix")

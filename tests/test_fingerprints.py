"""What of a run may differ from an earlier one's, and what is said where it may not."""

from __future__ import annotations

import logging

import pytest

from vfl_train.errors import ConfigError
from vfl_train.fingerprints import allowed_keys, refuse_differences

FINGERPRINT = {"command": "lora", "options": {"learning_rate": 1e-4}}


def test_differences_are_refused_by_key_or_told(caplog) -> None:
    other = {**FINGERPRINT, "options": {"learning_rate": 2e-4}}
    with pytest.raises(ConfigError, match=r"options\.learning_rate was 0\.0001, is now 0\.0002"):
        refuse_differences("checkpoint step-000002", FINGERPRINT, other)
    with pytest.raises(ConfigError) as caught:
        refuse_differences("here", FINGERPRINT, other, resumable=True)
    assert caught.value.fix.startswith("--allow-config-change learning_rate goes on with the change")
    allowed = allowed_keys(other, ["--learning-rate"])
    assert allowed == {"options.learning_rate"} == allowed_keys(other, ["options.learning_rate"])
    with caplog.at_level(logging.WARNING):
        assert refuse_differences("here", FINGERPRINT, other, allowed) == ("options.learning_rate",)
    assert "options.learning_rate was 0.0001, is now 0.0002, as allowed" in caplog.text
    with pytest.raises(ConfigError, match="did you mean learning_rate"):
        allowed_keys(other, ["learning_rat"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"options": {"lora_r": 8}}, {"options": {"lora_r": 16}}),
        ({"options": {"lora_r": 8, "seed": 1}}, {"options": {"lora_r": 16, "seed": 2}}),
        ({"options": {"gone": 1}}, {"options": {}}),
    ],
    ids=["other weights", "other weights too", "no such setting now"],
)
def test_a_change_that_no_option_allows_is_not_offered_one(old: dict, new: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_differences("here", old, new, resumable=True)
    assert caught.value.fix.startswith("--overwrite")

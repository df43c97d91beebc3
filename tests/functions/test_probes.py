"""Probe folders: what is read, what is refused, and that counts add up."""

from __future__ import annotations

import json
import random

import pytest
from PIL import Image

from vfl_train.config import ProbesConfig
from vfl_train.errors import ConfigError, DataError
from vfl_train.functions.check import check_probes
from vfl_train.functions.probes import BadPair, builtin_probe_set, load_probe_set, save_probe_set, scan

GOOD = {
    "function": "ocr", "image_a": "a.png", "image_b": "b.png",
    "question": "what?", "answer_a": "x", "answer_b": "y",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name, size in (("a.png", 16), ("b.png", 16), ("large.png", 24)):
        Image.new("RGB", (size, size), "red").save(tmp_path / name)
    return tmp_path


def write(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "pairs.jsonl").write_text(text + "\n")


def test_good_pairs_are_grouped_by_function(folder):
    write(folder, GOOD, {**GOOD, "function": "my_function2"}, GOOD)
    probes = load_probe_set(folder)
    assert {name: len(pairs) for name, pairs in probes.pairs.items()} == {"ocr": 2, "my_function2": 1}
    assert load_probe_set(folder, ["ocr"], limit=1).pairs.keys() == {"ocr"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({**GOOD, "image_b": "large.png"}, "sizes must be equal"),
        ({**GOOD, "image_b": "missing.png"}, "missing.png"),
        ({**GOOD, "image_b": "../b.png"}, "image"),
        ({**GOOD, "image_b": "http://example.org/b.png"}, "image"),
        ({**GOOD, "question": ""}, "question"),
        ({**GOOD, "answer_b": " X."}, "same answer"),
        ({**GOOD, "function": "OCR"}, "function name"),
        ({**GOOD, "function": "language"}, "function name"),
        ({**GOOD, "match": "fuzzy"}, "match"),
        ("[1, 2]", "object"),
        ("{", "JSON"),
    ],
    ids=str,
)
def test_a_bad_pair_refuses_the_set_and_names_its_line(folder, line, reason):
    write(folder, GOOD, line)
    with pytest.raises(DataError, match=f"line 2: .*{reason}") as caught:
        load_probe_set(folder)
    assert "probes check" in caught.value.fix


def test_unknown_function_and_missing_file_are_config_errors(folder):
    write(folder, GOOD)
    with pytest.raises(ConfigError, match="count"):
        load_probe_set(folder, ["count"])
    with pytest.raises(ConfigError, match=r"pairs\.jsonl"):
        load_probe_set(folder / "nowhere")
    with pytest.raises(ConfigError, match="--probes"):
        builtin_probe_set("some/model", (), 4, 0)
    with pytest.raises(ConfigError, match="smell"):
        builtin_probe_set("phantom", ("smell",), 4, 0)


def test_counts_of_a_thousand_mutated_lines_add_up(folder, capsys):
    rng = random.Random(0)
    text = json.dumps(GOOD)
    lines = []
    for _ in range(1000):
        kind = rng.randrange(4)
        i = rng.randrange(len(text))
        lines.append(
            [text, text[:i], text[:i] + rng.choice('{}"\\x0,') + text[i + 1 :], text[:i] + "\x00" + text[i:]][
                kind
            ]
        )
    lines = [line for line in lines if line.strip()]
    write(folder, *lines)
    found = list(scan(folder))
    bad = [p for p in found if isinstance(p, BadPair)]
    assert len(found) == len(lines)
    assert all(p.reason for p in bad)
    assert lines.count(text) <= len(found) - len(bad) < len(found)
    with pytest.raises(DataError, match=f"{len(bad)} of {len(found)} pairs"):
        check_probes(ProbesConfig(action="check", folder=folder))
    assert (
        f"{len(found)} pairs = {len(found) - len(bad)} usable + {len(bad)} unusable"
        in capsys.readouterr().out
    )


def test_a_saved_set_is_read_back(tmp_path):
    probes = builtin_probe_set("phantom", ("count", "ocr"), 3, 0)
    save_probe_set(probes, tmp_path)
    again = load_probe_set(tmp_path)
    assert [[p.pair for p in pairs] for pairs in again.pairs.values()] == [
        [p.pair for p in pairs] for pairs in probes.pairs.values()
    ]
    first, second = again.pairs["ocr"][0], probes.pairs["ocr"][0]
    assert first.image_a.tobytes() == second.image_a.tobytes()

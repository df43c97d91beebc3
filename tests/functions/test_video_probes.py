"""Probe pairs of videos: `image_a` and `image_b` are lists of frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vfl_train.config import ProfileConfig
from vfl_train.evaluation.questions import probe_questions
from vfl_train.functions.probes import (
    BadPair,
    LoadedPair,
    builtin_probe_set,
    load_probe_set,
    pictures,
    save_probe_set,
    scan,
)
from vfl_train.interventions import swap
from vfl_train.interventions.readout import Cost
from vfl_train.phantom.architecture import PLANTED
from vfl_train.profiling.sweep import DONOR, Ask, Sweeper

PAIR = {
    "function": "ocr", "image_a": ["1.png", "2.png"], "image_b": ["1.png", "3.png"],
    "question": "what?", "answer_a": "x", "answer_b": "y",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color in (("1.png", "red"), ("2.png", "lime"), ("3.png", "blue")):
        Image.new("RGB", (16, 16), color).save(tmp_path / name)
    Image.new("RGB", (24, 24)).save(tmp_path / "large.png")
    return tmp_path


def write(folder: Path, *pairs: dict) -> Path:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs), encoding="utf-8")
    return folder


def colours(images: list[Image.Image]) -> list[tuple[int, ...]]:
    return [image.getpixel((0, 0)) for image in images]


def test_a_pair_of_videos_is_read_asked_and_written_again(folder, tmp_path):
    probes = load_probe_set(write(folder, PAIR))
    (pair,) = probes.pairs["ocr"]
    red, lime, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert colours(pictures(pair.shown_a)) == [red, lime] and colours(pictures(pair.shown_b)) == [red, blue]
    a, b = probe_questions(probes)
    for question, second in ((a, lime), (b, blue)):
        images, videos = question.opened()
        assert not images and [colours(frames) for frames in videos] == [[red, second]]
    save_probe_set(probes, tmp_path / "copy")
    assert load_probe_set(tmp_path / "copy").pairs["ocr"][0].pair == pair.pair


def test_every_frame_counts_in_the_hash(folder):
    first = load_probe_set(write(folder, PAIR)).sha256
    Image.new("RGB", (16, 16), "white").save(folder / "3.png")
    assert load_probe_set(folder).sha256 != first


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_b": ["1.png"]}, "image_a has 2 frames and image_b 1"),
        ({"image_b": "3.png"}, "image_a has 2 frames and image_b 0"),
        ({"image_b": ["1.png", "2.png"]}, "show the same pixels"),
        ({"image_b": ["1.png", "large.png"]}, "differ in size"),
        ({"image_a": ["large.png"] * 2}, "large.png is 24 x 24 and 1.png is 16 x 16 pixels"),
        ({"image_b": ["1.png", "none.png"]}, "none.png is not there"),
        ({"image_b": ["1.png", "../1.png"]}, "not a plain relative path"),
        ({"image_b": ["1.png"] * 769}, "769 frames"),
        ({"image_b": []}, "'image_b' is missing, empty or not a string"),
        ({"image_b": ["1.png", 7]}, "'image_b' is missing, empty or not a string"),
        ({"question": ["what?"]}, "'question' is missing, empty or not a string"),
        ({"image_a": ["1.png", "\ud800"]}, "half of a surrogate pair"),
    ],
)
def test_pairs_that_are_refused(folder, changes, words):
    good, bad = scan(write(folder, PAIR, {**PAIR, **changes}))
    assert isinstance(good, LoadedPair) and isinstance(bad, BadPair) and words in bad.reason


def test_the_phantom_reads_videos_where_it_reads_images(tmp_path):
    """It never saw a video in its training; the planted layer is found all the same, on the engine."""
    from vfl_train.models import VisionLanguageModel
    from vfl_train.profiling.run import profile

    lines = []
    for p in builtin_probe_set(["emotion"], 3, 0, world="phantom").pairs["emotion"]:
        p.image_a.save(tmp_path / str(p.pair.image_a))
        p.image_b.save(tmp_path / str(p.pair.image_b))
        lines.append({**vars(p.pair), "image_a": [p.pair.image_a] * 2, "image_b": [p.pair.image_b] * 2})
    write(tmp_path, *lines)
    result = profile(ProfileConfig(output=tmp_path / "out", probes=tmp_path, control_pairs=0, device="cpu"))
    found = result.functions["emotion"]  # three pairs are too few for a status, not for an answer
    assert (found.pairs, found.pairs_answered, result.path) == (3, 3, "engine")

    vlm, cost = VisionLanguageModel.load("phantom", device="cpu"), Cost()
    sweeper = Sweeper(vlm, "text", "engine", 8192, cost=cost)
    (chunk,) = sweeper.answered(load_probe_set(tmp_path).pairs["emotion"])
    asks = [
        Ask(way, swap([layer], DONOR), way.donor)
        for _, *both in chunk for way in both for layer in range(vlm.num_layers)
    ]  # fmt: skip
    changed = [outcome.changed for outcome in sweeper.judge(asks)]
    assert changed == [layer == PLANTED["emotion"] for layer in range(vlm.num_layers)] * 6
    assert not cost.reasons

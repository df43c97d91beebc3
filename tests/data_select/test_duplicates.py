"""Near-duplicates: the same words about (nearly) the same picture."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image

from vfl_train.data.rows import Row, assistant_message, user_message
from vfl_train.data_select.duplicates import (
    HASH_BYTES,
    MAX_BITS,
    difference_hash,
    fingerprints,
    first_alike,
)
from vfl_train.phantom import world


def picture(seed: int) -> Image.Image:
    return world.render(world.sample_scene(np.random.default_rng(seed))).resize((256, 256))


def distance(a: bytes, b: bytes) -> int:
    return int(np.unpackbits(np.frombuffer(a, np.uint8) ^ np.frombuffer(b, np.uint8)).sum())


def flipped(code: np.ndarray, bits: int, seed: int = 0) -> np.ndarray:
    """`code` with that many of its bits changed."""
    at = np.random.default_rng(seed).permutation(HASH_BYTES * 8)[:bits]
    all_bits = np.unpackbits(code)
    all_bits[at] ^= 1
    return np.packbits(all_bits)


def test_re_encoded_and_scaled_pictures_are_alike_and_others_are_not():
    own = difference_hash(picture(0))
    assert len(own) == HASH_BYTES
    buffer = io.BytesIO()
    picture(0).save(buffer, format="JPEG", quality=80)
    assert distance(own, difference_hash(Image.open(buffer))) <= MAX_BITS
    assert distance(own, difference_hash(picture(0).resize((200, 180)))) <= MAX_BITS
    assert min(distance(own, difference_hash(picture(seed))) for seed in range(1, 40)) > MAX_BITS


def row(question: str, answer: str) -> Row:
    messages = (user_message(question), assistant_message(answer))
    return Row(row=0, uid="", source="", messages=messages, images=(), raw=b"")


def test_what_is_said_and_every_picture_but_the_first_must_be_the_same():
    base = fingerprints(row("what ?", "three"), [picture(0)])
    assert fingerprints(row("what ? ", "three"), [picture(0)]) == base
    assert fingerprints(row("what ?", "four"), [picture(0)])[0] != base[0]
    assert fingerprints(row("why ?", "three"), [picture(0)])[0] != base[0]
    assert fingerprints(row("what ?", "three"), [picture(1)])[0] == base[0]
    two = fingerprints(row("what ?", "three"), [picture(0), picture(1)])
    assert two[0] not in (base[0], fingerprints(row("what ?", "three"), [picture(0), picture(2)])[0])
    assert fingerprints(row("what ?", "three"), [])[0] != base[0]


@pytest.mark.parametrize("bits", range(MAX_BITS + 3))
def test_bits_wherever_they_differ(bits):
    code = np.random.default_rng(5).integers(0, 256, HASH_BYTES, dtype=np.uint8)
    for seed in range(20):
        hashes = np.stack([code, flipped(code, bits, seed)])
        found = first_alike(np.array([7, 7]), hashes).tolist()
        assert found == ([0, 0] if bits <= MAX_BITS else [0, 1])


def test_rows_of_other_words_are_no_duplicates():
    hashes = np.zeros((3, HASH_BYTES), dtype=np.uint8)
    assert first_alike(np.array([1, 2, 1]), hashes).tolist() == [0, 1, 0]


def test_a_chain_leads_to_its_earliest_row():
    code = np.random.default_rng(5).integers(0, 256, HASH_BYTES, dtype=np.uint8)
    step = flipped(code, MAX_BITS, 0)
    hashes = np.stack([flipped(step, MAX_BITS, 3), step, code])
    assert distance(hashes[0].tobytes(), hashes[2].tobytes()) > MAX_BITS
    assert first_alike(np.zeros(3, dtype=np.int64), hashes).tolist() == [0, 0, 0]


def test_the_same_as_comparing_every_pair_and_fast_where_all_say_the_same():
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 256, (300, HASH_BYTES), dtype=np.uint8)
    copies = np.stack([flipped(originals[i], int(rng.integers(0, 24)), i) for i in range(100)])
    hashes, text = np.concatenate([originals, copies]), np.zeros(400, dtype=np.int64)
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2) <= MAX_BITS
    assert first_alike(text, hashes).tolist() == near.argmax(axis=1).tolist()
    many = rng.integers(0, 256, (50_000, HASH_BYTES), dtype=np.uint8)
    started = time.process_time()
    assert (first_alike(np.zeros(50_000, dtype=np.int64), many) == np.arange(50_000)).all()
    assert time.process_time() - started < 5, "pairs are not looked for everywhere"


def test_no_rows():
    assert first_alike(np.array([], dtype=np.int64), np.zeros((0, HASH_BYTES), dtype=np.uint8)).tolist() == []

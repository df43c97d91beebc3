"""Scores of tiny models against read-outs computed here."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES, LAYERS, tiny_vlm

from vfl_train.data.images import open_image
from vfl_train.data.readers import read_dataset
from vfl_train.data_select import choose, scoring
from vfl_train.data_select.scoring import Scorer
from vfl_train.errors import NumericError
from vfl_train.interventions import Intervention, drop, read_out, swap
from vfl_train.interventions import Row as BranchRow
from vfl_train.schemas import LANGUAGE

FUNCTIONS = {"count": [0], "ocr": [2, 3]}


def turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}


@pytest.fixture
def pool(tmp_path):
    """Rows: one turn, text only, two answers, two images."""
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    ask, say = "what text is written here ?", "three cats"
    rows = [
        {"messages": [turn("user", f"<image>{ask}"), turn("assistant", say)], "images": ["0.png"]},
        {"messages": [turn("user", ask), turn("assistant", "12 dogs")]},
        {
            "messages": [
                turn("user", f"<image>{ask}"), turn("assistant", say),
                turn("user", "dogs ?"), turn("assistant", "12"),
            ],
            "images": ["1.png"],
        },
        {
            "messages": [turn("user", f"<image><image>{ask}"), turn("assistant", say)],
            "images": ["1.png", "2.png"],
        },
    ]  # fmt: skip
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(params=FAMILIES)
def vlm(request):
    return tiny_vlm(request.param)


def answers_of(vlm, row):
    """The row's prompt and the positions of its answer tokens."""
    encoded = vlm.encoder.encode(row.messages, [open_image(ref) for ref in row.images])
    positions = tuple(torch.nonzero(encoded.answer_mask)[:, 0].tolist())
    return vlm.located(encoded.inputs, len(row.images)), positions


def loss(vlm, prompt, positions, branch=(), donors=None):
    (found,) = read_out(vlm, [BranchRow(prompt, branch=branch, donors=donors or {}, targets=positions)])
    return -sum(found.logprobs) / len(positions)


def near(value):
    return pytest.approx(value, abs=2e-5)


def test_losses_are_those_of_single_read_outs(vlm, pool):
    rows = list(read_dataset(pool).rows)
    scored = Scorer(vlm, FUNCTIONS).score(rows)
    assert [s.row for s in scored] == rows
    for s in scored:
        prompt, positions = answers_of(vlm, s.row)
        assert s.n_answer_tokens == len(positions)
        assert s.loss_full == near(loss(vlm, prompt, positions))
        for name, layers in FUNCTIONS.items():
            assert s.losses[name] == near(loss(vlm, prompt, positions, drop(layers)))
            assert s.deltas[name] == near(s.losses[name] - s.loss_full)
        blind = loss(vlm, prompt, positions, drop(range(LAYERS)))
        assert s.visual_gain == near(blind - s.loss_full)
    assert max(abs(d) for s in scored for d in s.deltas.values()) > 1e-3, "nothing is felt"


def test_the_full_loss_is_the_training_loss(vlm, pool):
    """The same number as transformers' own loss over the collator's labels."""
    row = read_dataset(pool).rows[2]
    (scored,) = Scorer(vlm, FUNCTIONS).score([row])
    encoded = vlm.encoder.encode(row.messages, [open_image(ref) for ref in row.images])
    labels = encoded.inputs["input_ids"].masked_fill(~encoded.answer_mask[None], -100)
    with torch.no_grad():
        assert scored.loss_full == near(vlm.model(**encoded.inputs, labels=labels).loss.item())


def test_all_answers_of_a_conversation_count(vlm, pool):
    row = read_dataset(pool).rows[2]
    (scored,) = Scorer(vlm, FUNCTIONS).score([row])
    ids = answers_of(vlm, row)[0].inputs["input_ids"][0]
    text = vlm.decode(ids[list(answers_of(vlm, row)[1])].tolist())
    assert "three cats" in text and "12" in text and "dogs" not in text
    assert (
        scored.n_answer_tokens > Scorer(vlm, FUNCTIONS).score([read_dataset(pool).rows[0]])[0].n_answer_tokens
    )


def test_text_only_rows_need_no_layers(vlm, pool):
    (scored,) = Scorer(vlm, FUNCTIONS).score([read_dataset(pool).rows[1]])
    assert scored.deltas == {"count": 0.0, "ocr": 0.0} and scored.visual_gain == 0.0
    assert scored.losses == dict.fromkeys(FUNCTIONS, scored.loss_full)
    assert scored.flags == ("text_only",)
    deltas, losses = ({f: [values[f]] for f in FUNCTIONS} for values in (scored.deltas, scored.losses))
    assert choose.buckets(choose.needs(losses, deltas), deltas).tolist() == [LANGUAGE]


def test_blank_swaps_with_a_grey_image(vlm, pool):
    row = read_dataset(pool).rows[0]
    (scored,) = Scorer(vlm, FUNCTIONS, "blank").score([row])
    prompt, positions = answers_of(vlm, row)
    grey = vlm.encoder.encode(row.messages, [Image.new("RGB", (32, 32), scoring.GREY)])
    donors = {"grey": vlm.located(grey.inputs, 1)}
    for name, layers in FUNCTIONS.items():
        assert scored.losses[name] == near(loss(vlm, prompt, positions, swap(layers, "grey"), donors))


def test_knockout_silences_the_attention(vlm, pool):
    row = read_dataset(pool).rows[0]
    (scored,) = Scorer(vlm, FUNCTIONS, "knockout").score([row])
    prompt, positions = answers_of(vlm, row)
    for name, layers in FUNCTIONS.items():
        branch = (Intervention("knockout", frozenset(layers)),)
        assert scored.losses[name] == near(loss(vlm, prompt, positions, branch))


def test_nested_levels_add_up(vlm, pool):
    """Each level is compared with the next deeper one, so the deltas telescope."""
    row = read_dataset(pool).rows[0]
    (scored,) = Scorer(vlm, FUNCTIONS, "nested").score([row])
    prompt, positions = answers_of(vlm, row)
    deep, all_of_it = (loss(vlm, prompt, positions, drop(range(k, LAYERS))) for k in (2, 0))
    assert (scored.losses["ocr"], scored.losses["count"]) == (near(deep), near(all_of_it))
    assert scored.deltas["ocr"] == near(deep - scored.loss_full)
    assert sum(scored.deltas.values()) == near(all_of_it - scored.loss_full)


def test_scores_do_not_depend_on_the_batch_or_the_window(pool, monkeypatch):
    vlm, rows = tiny_vlm("qwen2_5_vl"), list(read_dataset(pool).rows)
    at_once = Scorer(vlm, FUNCTIONS).score(rows)
    monkeypatch.setattr(scoring, "WINDOW", 1)
    for a, b in zip(at_once, Scorer(vlm, FUNCTIONS, batch_tokens=1).score(rows), strict=True):
        assert (a.row, a.n_answer_tokens, a.flags) == (b.row, b.n_answer_tokens, b.flags)
        assert a.loss_full == near(b.loss_full) and a.deltas == near(b.deltas)


def test_rows_that_cannot_be_encoded_are_quarantined(vlm, pool, monkeypatch):
    lines = pool.read_bytes().splitlines()
    lines[1] = lines[1].replace(b"12 dogs", f"12 {vlm.processor.image_token} dogs".encode())
    if b"<image>" in lines[1]:  # a marker of the row format itself is refused before the model sees it
        lines[1] = lines[1].replace(b"<image>", b"dogs")
    pool.write_bytes(b"\n".join(lines))
    rows = list(read_dataset(pool).rows)
    rows[3].images[0].path.unlink()
    scorer = Scorer(vlm, FUNCTIONS)
    scored = scorer.score(rows)
    codes = {r.row: str(r.code) for r in scorer.rejected}
    assert len(scored) + len(codes) == len(rows) == 4
    assert codes.keys() == {2, 3} | ({1} if vlm.processor.image_token != "<image>" else set())
    assert all(r.detail and r.line == r.row + 1 for r in scorer.rejected)
    if 1 in codes:
        assert codes[1] == "placeholder_in_text"


def test_images_that_cannot_be_told_apart_are_quarantined(pool, monkeypatch):
    vlm = tiny_vlm("qwen2_5_vl")
    monkeypatch.setattr("vfl_train.data.collator.places_of", lambda *_: ())
    monkeypatch.setattr("vfl_train.models.vlm._runs", lambda mask: [(1, 2)])
    scorer = Scorer(vlm, FUNCTIONS)
    scored = scorer.score(read_dataset(pool).rows)
    assert [s.row.row for s in scored] == [0, 2]
    assert {r.row: str(r.code) for r in scorer.rejected} == {1: "not_encodable", 3: "not_encodable"}


def test_a_loss_that_is_not_finite_stops_the_run(pool, monkeypatch):
    vlm, rows = tiny_vlm("qwen2_5_vl"), list(read_dataset(pool).rows)
    weight = vlm.base.get_output_embeddings().weight
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(math.nan)
        with pytest.raises(NumericError, match="row 0 of pool"):
            Scorer(vlm, FUNCTIONS).score(rows)
    finally:
        with torch.no_grad():
            weight.copy_(saved)


def test_the_sweep_costs_what_the_formula_says(tmp_path):
    """Rows of one shape: the prefix and the base once, a branch from its first layer on, in one batch."""
    vlm = tiny_vlm("qwen2_5_vl")
    Image.new("RGB", (32, 32), (200, 10, 10)).save(tmp_path / "a.png")
    line = {"messages": [turn("user", "<image>what ?"), turn("assistant", "cats")], "images": ["a.png"]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(line) + "\n") * 6, encoding="utf-8")
    rows = list(read_dataset(tmp_path / "rows.jsonl").rows)
    scorer = Scorer(vlm, FUNCTIONS)
    scorer.score(rows)
    prompt, positions = answers_of(vlm, rows[0])
    prefix = prompt.spans[-1][1]
    suffix, below = prompt.length - prefix, LAYERS - 1
    first_layers = [min(k) for k in FUNCTIONS.values()] + [0]
    assert scorer.cost.reference_rows == 0
    assert scorer.cost.rows == 6 * (len(FUNCTIONS) + 2)
    swept = (prefix + suffix) * below + suffix * sum(below - k for k in first_layers)
    assert scorer.cost.token_layers == 6 * swept
    assert scorer.cost.head_tokens == scorer.cost.last_layer_tokens == 6 * len(positions) * 4
    naive = (len(FUNCTIONS) + 2) * (prefix + suffix) * below
    assert swept < naive


def test_rows_of_many_lengths_are_read_in_order_of_length(tmp_path):
    """Padding costs less than a tenth of what the rows do, though long and short ones alternate."""
    vlm = tiny_vlm("qwen2_5_vl")
    lines = []
    for i, side in enumerate((32, 96, 32, 96, 32, 96, 32, 96)):
        Image.new("RGB", (side, side), (200, 10, 10)).save(tmp_path / f"{i}.png")
        talk = [turn("user", "<image>what ?"), turn("assistant", "cats " * (1 + 12 * (i % 2)))]
        lines.append(json.dumps({"messages": talk, "images": [f"{i}.png"]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = list(read_dataset(tmp_path / "rows.jsonl").rows)
    at_once, one_by_one = Scorer(vlm, FUNCTIONS, batch_tokens=600), Scorer(vlm, FUNCTIONS, batch_tokens=1)
    found = at_once.score(rows)
    assert [s.row.row for s in found] == list(range(8))
    one_by_one.batch_tokens = 600
    for row in rows:
        one_by_one.score([row])
    assert at_once.cost.token_layers < 1.1 * one_by_one.cost.token_layers


def test_an_answer_before_an_image_does_not_miss_it(vlm, tmp_path):
    """A span counts for the answers after it: the first answer is the same without the second image."""
    for i, color in enumerate(((200, 10, 10), (10, 10, 200))):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{i}.png")
    first = [turn("user", "what text ?"), turn("assistant", "three cats")]
    second = [turn("user", "<image>dogs ?"), turn("assistant", "12")]
    lines = [
        {"messages": [*first, *second], "images": ["0.png"]},
        {"messages": [*first, *second], "images": ["1.png"]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    for s in Scorer(vlm, FUNCTIONS).score(list(read_dataset(tmp_path / "rows.jsonl").rows)):
        prompt, positions = answers_of(vlm, s.row)
        before = tuple(p for p in positions if p < prompt.spans[0][0])
        assert before and len(before) < len(positions) == s.n_answer_tokens
        blind = drop(range(LAYERS))
        assert loss(vlm, prompt, before, blind) == near(loss(vlm, prompt, before))
        assert s.visual_gain == near(loss(vlm, prompt, positions, blind) - loss(vlm, prompt, positions))

"""Rows: what is read, and the reason code of everything that is refused."""

from __future__ import annotations

import pytest

from vfl_train.data.parse import parse_row
from vfl_train.data.rows import (
    Image,
    Message,
    Reason,
    Rejected,
    Row,
    RowError,
    Text,
    one_line,
    reject,
    row_id,
    row_source,
    row_uid,
)


def talk(*turns: str, **keys: object) -> dict:
    """A conversation of alternating turns."""
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[i % 2], "value": t} for i, t in enumerate(turns)], **keys}


def chat(*contents: object, **keys: object) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)], **keys}


def user(*parts: Text | Image) -> Message:
    return Message("user", parts)


TURNS = talk("q", "a")["conversations"]
THREE = Message("assistant", (Text("three"),))


@pytest.mark.parametrize(
    ("value", "first", "images"),
    [
        (talk("<image>\nhow many?", "three", image="a.png"), user(Image(0), Text("how many?")), ("a.png",)),
        (talk("how many?\n<image>", "three", image="a.png"), user(Text("how many?"), Image(0)), ("a.png",)),
        (talk("how many?", "three", image="a.png"), user(Image(0), Text("how many?")), ("a.png",)),
        (talk("<image>", "three", image=["a.png"]), user(Image(0)), ("a.png",)),
        (talk("how many?", "three"), user(Text("how many?")), ()),
        (talk("how many?", "three", image=None), user(Text("how many?")), ()),
        (talk("  odd \n spaces ", "three"), user(Text("  odd \n spaces ")), ()),
        (
            talk("<image>a<image>\n\nb", "three", images=["a", "b"]),
            user(Image(0), Text("a"), Image(1), Text("\nb")),
            ("a", "b"),
        ),
        (chat("<image>\nq", "three", images=["a"]), user(Image(0), Text("q")), ("a",)),
        (
            chat([{"type": "image"}, {"type": "text", "text": "q"}], "three", images=["a"]),
            user(Image(0), Text("q")),
            ("a",),
        ),
        (
            chat([{"type": "text", "text": "q"}, {"type": "image", "image": "a"}], "three"),
            user(Text("q"), Image(0)),
            ("a",),
        ),
        (
            chat([{"type": "image_url", "image_url": {"url": "a"}}, {"type": "text", "text": "<image>"}],
                 "three"),
            user(Image(0), Text("<image>")),
            ("a",),
        ),
        (
            chat([{"type": "image"}, {"type": "image", "image": "x"}, {"type": "image"}],
                 "three", images=["a", "b"]),
            user(Image(0), Image(1), Image(2)),
            ("a", "x", "b"),
        ),
    ],
)  # fmt: skip
def test_rows_that_are_read(value, first, images):
    parsed = parse_row(value)
    assert parsed.messages == (first, THREE)
    assert parsed.images == images


def test_system_turns():
    assert parse_row(talk("q", "three", system="be brief")).messages[0] == Message(
        "system", (Text("be brief"),)
    )
    listed = [{"from": "system", "value": "be brief"}, *talk("q", "three")["conversations"]]
    assert parse_row({"conversations": listed}).messages[0].role == "system"


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ([1], Reason.not_an_object),
        ("text", Reason.not_an_object),
        (None, Reason.not_an_object),
        ({}, Reason.missing_key),
        ({"conversations": None}, Reason.missing_key),
        ({"conversations": [{"from": "human"}]}, Reason.missing_key),
        ({"conversations": [{"value": "q"}]}, Reason.missing_key),
        ({"messages": [{"role": "user", "content": [{"text": "q"}]}]}, Reason.missing_key),
        ({"conversations": "text"}, Reason.wrong_type),
        ({"conversations": ["text"]}, Reason.wrong_type),
        ({"conversations": [{"from": "human", "value": 7}]}, Reason.wrong_type),
        ({"messages": [{"role": "user", "content": None}]}, Reason.wrong_type),
        (chat([{"type": "audio"}], "a"), Reason.wrong_type),
        (talk("q", "a", image=7), Reason.wrong_type),
        (talk("q", "a", images="a.png"), Reason.wrong_type),
        (talk("<image>q", "a", image=[7]), Reason.wrong_type),
        (talk("q", "a", messages=[]), Reason.ambiguous_keys),
        (talk("<image>q", "a", image="a", images=["a"]), Reason.ambiguous_keys),
        ({"conversations": [{"from": "alien", "value": "q"}]}, Reason.bad_role),
        ({"conversations": [{"from": ["human"], "value": "q"}]}, Reason.bad_role),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, Reason.turn_order),
        ({"conversations": [*TURNS, {"from": "gpt", "value": "b"}]}, Reason.turn_order),
        ({"conversations": []}, Reason.empty_turns),
        (talk(" ", "a"), Reason.empty_turns),
        (talk("q", "a", "r", " \n"), Reason.empty_turns),
        (talk("q"), Reason.no_answer),
        (talk("q", " "), Reason.no_answer),
        (talk("q", "a" * 1_000_001), Reason.text_too_long),
        (talk("q", "<image>a", image="a"), Reason.image_in_answer),
        (talk("<image><image>q", "a", image="a"), Reason.image_count_mismatch),
        (talk("<image>q", "a"), Reason.image_count_mismatch),
        (talk("q", "a", images=["a"]), Reason.image_count_mismatch),
        (chat([{"type": "image"}], "a"), Reason.image_count_mismatch),
        (chat("q", "a", images=["a"]), Reason.image_count_mismatch),
        (talk("q", "a\ud800"), Reason.bad_utf8),
        (talk("<image>q", "a", image="\udfff.png"), Reason.bad_utf8),
    ],
)  # fmt: skip
def test_rows_that_are_refused(value, code):
    with pytest.raises(RowError) as caught:
        parse_row(value)
    assert caught.value.code == code
    assert caught.value.exit_code == 3
    assert caught.value.detail.isprintable() and len(caught.value.detail) <= 300


def test_names_of_rows():
    assert row_id({"id": "x\ny"}, 3) == "x\\ny"
    assert row_id({"id": 17}, 3) == "17"
    assert [row_id(v, 3) for v in ({"id": True}, {"id": []}, {"id": ""}, {}, 5)] == ["#3"] * 5
    assert row_source({"source": " coco ", "dataset": "x"}, "file") == "coco"
    assert row_source({"source": 5, "dataset": "x"}, "file") == "x"
    assert row_source({}, "file") == "file"


def test_uid_depends_on_source_position_and_content_only():
    base = row_uid("s", 1, {"a": 1, "b": 2})
    assert base == row_uid("s", 1, {"b": 2, "a": 1}) and len(base) == 16
    others = {row_uid("t", 1, {"a": 1, "b": 2}), row_uid("s", 2, {"a": 1, "b": 2}), row_uid("s", 1, {"a": 1})}
    assert len(others | {base}) == 4


def test_later_steps_can_quarantine_a_row():
    row = Row(4, "u", "s", (), (), b"", id="mine", line=5)
    error = RowError(Reason.not_encodable, "no\nway")
    assert reject(row, error) == Rejected(4, "mine", Reason.not_encodable, "no\\nway", 5)


def test_one_line():
    assert one_line("a\tb\x00\ud800ü") == "a\\tb\\x00\\ud800ü"
    assert len(one_line("x" * 1000)) == 300

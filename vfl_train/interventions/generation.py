"""Greedy output under a branch, by draft and verify.

Token t of a greedy output is the argmax after the t tokens before it. Forcing a draft gives the argmax at
every position of it in one pass, and what is predicted at a position depends on the tokens before that
position only: decoders are causal, and which queries an intervention binds is a matter of positions. So up
to the first position where prediction and draft differ, the predictions are what decoding one token a pass
would have said, the one at that position included; what is predicted after it is thrown away. Whatever is
drafted, the output is the same (but for ties within rounding: the forced definition rules, see `readout`);
a good draft only saves passes. An output equal to its draft takes one.

A placeholder of an image or video cannot be forced, the model would look for it: it ends an output, too.

Answers judged by equality need none of this: forcing the expected output tells whether it would be said.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING

from vfl_train.interventions.readout import Cost, ReadOut, Row, read_out

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel

Tokens = tuple[int, ...]


def generate_under(
    vlm: VisionLanguageModel,
    rows: Sequence[Row],
    max_new_tokens: int,
    path: str = "engine",
    batch_tokens: int = 8192,
    cost: Cost | None = None,
    drafts: Sequence[Sequence[Tokens]] | None = None,
) -> list[Tokens]:
    """The tokens that each row's branch generates after its prompt, the end token included unless cut at
    `max_new_tokens`.

    Args:
        path, batch_tokens, cost: as for `read_out`; `cost.rows` counts one a row and pass.
        drafts: candidates for each row's output, the likeliest first, best with their end token. None: the
            row's own `answer`, which counts for nothing else.

    Rows of one prompt should be neighbours: while their drafts agree, the engine shares their work.
    Raises ConfigError as `read_out`.
    """
    placeholders = vlm.placeholder_ids
    ends = {*vlm.eos_token_ids, *placeholders}
    given = [(row.answer,) for row in rows] if drafts is None else drafts
    candidates = [[_before(placeholders, draft) for draft in several] for several in given]
    said: list[Tokens] = [()] * len(rows)
    active = list(range(len(rows))) if max_new_tokens > 0 else []
    while active:
        step = [_with_draft(rows[i], said[i], candidates[i], max_new_tokens) for i in active]
        for i, row, found in zip(active, step, read_out(vlm, step, path, batch_tokens, cost), strict=True):
            said[i] = _known(row.answer, len(said[i]), found, ends)
        active = [i for i in active if len(said[i]) < max_new_tokens and said[i][-1] not in ends]
    return said


def _before(stops: Tokens, tokens: Tokens) -> Tokens:
    return tuple(takewhile(lambda token: token not in stops, tokens))


def _with_draft(row: Row, said: Tokens, drafts: Sequence[Tokens], max_new_tokens: int) -> Row:
    """`row` forcing what it has said, and after that the rest of the draft that agrees with most of it: a
    draft that was wrong in one token is often right again after it. Without a draft that goes on, the row
    asks for the next token alone."""
    longer = [draft for draft in drafts if len(draft) > len(said)]
    if not longer:
        return replace(row, answer=said, targets=())
    best = max(longer, key=lambda draft: sum(a == b for a, b in zip(draft, said, strict=False)))
    answer = said + tuple(best[len(said) : max_new_tokens])
    start = row.prompt.length
    return replace(row, answer=answer, targets=tuple(range(start + len(said), start + len(answer))))


def _known(answer: Tokens, start: int, found: ReadOut, ends: Container[int]) -> Tokens:
    """What is certain after a pass that forced `answer`, of which `start` tokens were certain before."""
    if found.next_token is not None:
        return (*answer, found.next_token)
    known = list(answer[:start])
    for drafted, predicted in zip(answer[start:], found.predicted, strict=True):
        known.append(predicted)
        if predicted != drafted or predicted in ends:
            break
    return tuple(known)

"""What a row's greedy output under a branch is, as far as anyone asks, without generating it.

Let y be a row's forced tokens and p its read-out under branch B (`ReadOut.predicted`): p[t] is the argmax
after prompt + y[:t]. Let d be the first position with p[d] != y[d]. Greedy decoding under B then says
exactly y[:d] + p[d] so far: before d each argmax was the token that was forced, so forcing and decoding saw
the same tokens. If there is no such d, it says y. Therefore

- any other output z can hold under B only if z begins with y[:d] + p[d]: forcing z need only be tried there,
  and it decides (z holds exactly if its forced argmax is z everywhere);
- a known beginning that ends in an end token, or has the length of the cap, is the whole output.

So the host's own output is forced first; the donor's only where it agrees with what is known by then. Both
tests are exact, up to ties within rounding: a row is computed in another batch when it is forced again.

Answers that are judged by something looser than equality are generated where what is known does not settle
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vfl_train.functions.matching import matches, normalise
from vfl_train.interventions import Branch, Prompt, ReadOut, Row

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Trial:
    """One row whose output is asked for. `tries`: outputs to force, in this order; `known`: what is known of
    the output's beginning, `complete` when that is all of it."""

    prompt: Prompt
    branch: Branch
    donors: Mapping[str, Prompt]
    tries: tuple[Tokens, ...]
    known: Tokens = ()
    complete: bool = False
    forced: set[Tokens] = field(default_factory=set)

    def next_try(self) -> Tokens | None:
        """The first untried output that what is known allows, None if there is none (left) to try."""
        if self.complete:
            return None
        open_tries = (t for t in self.tries if t not in self.forced)
        return next((t for t in open_tries if t[: len(self.known)] == self.known), None)

    def row(self, answer: Tokens) -> Row:
        """The row that forces `answer`."""
        return Row(self.prompt, answer, self.branch, self.donors)

    def learn(self, answer: Tokens, found: ReadOut, end_tokens: Sequence[int], cap: int) -> None:
        """Take in what forcing `answer` showed."""
        self.forced.add(answer)
        wrong = next((t for t, right in enumerate(found.greedy) if not right), None)
        if wrong is None:
            self.known, self.complete = answer, True
            return
        self.known = max(self.known, (*answer[:wrong], found.predicted[wrong]), key=len)
        self.complete = self.known[-1] in end_tokens or len(self.known) >= cap

    def drafts(self) -> list[Tokens]:
        """Guesses at the whole output for `generate_under`: what is known, then the tries' other ends."""
        return [self.known + t[len(self.known) :] for t in self.tries]


def settled(text: str, expected: str, match: str) -> bool | None:
    """Whether every output that begins with `text` gives `expected` under `match` (True), none does (False),
    or it depends on what follows (None). Never wrong; None where the beginning is not enough."""
    if match == "iou":
        return None
    text = text.rstrip("\ufffd")  # a character of which the last token holds only some bytes
    given, wanted = normalise(text), normalise(expected)
    letters, possible = _letters(given), _letters(wanted)
    if match == "exact":
        return None if possible.startswith(letters) else False
    # A choice may be given by its letter or by its words, and shows in the output's first characters.
    if len(given) > len(wanted):
        return matches(text, expected, match)
    return None if letters in possible or matches(text, expected, match) else False


def _letters(text: str) -> str:
    """Letters and digits alone: tokenizers may add or take away a space when more tokens follow."""
    return "".join(c for c in text if c.isalnum())

"""The measurements of a profile: base outputs, one-layer sweeps, controls and joint swaps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vfl_train.functions.matching import matches
from vfl_train.functions.probes import LoadedPair
from vfl_train.interventions import NOISE, Branch, Prompt, Row, drop, read_out, swap
from vfl_train.interventions.generation import generate_under
from vfl_train.models.generation import Generated, generate
from vfl_train.progress import track

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel

MAX_ANSWER_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Direction:
    """One host image of an answered pair, its donor, both right answers and the model's own outputs."""

    pair: int
    question: str
    answer: str
    other_answer: str
    match: str
    host: Prompt
    donor: Prompt
    own: Generated
    other: Generated


# A branch row that forces an output, the right answer that this output gives, and how it is judged.
Trial = tuple[Row, str, str]


@dataclass
class Sweeper:
    """Runs the rows of one function. `batch_tokens`: padded tokens a batch may hold."""

    vlm: VisionLanguageModel
    phase: str
    path: str
    batch_tokens: int
    label: str = ""
    directions: list[Direction] = field(default_factory=list)
    rows_run: int = 0

    def answered(self, pairs: Sequence[LoadedPair]) -> int:
        """Generate every base output once and keep both directions of the pairs answered right. Returns
        their number."""
        prompts = [
            self.vlm.prompt(p.pair.question, [image])
            for p in track(pairs, len(pairs), f"{self.label}: encoding")
            for image in (p.image_a, p.image_b)
        ]
        outputs = generate(self.vlm, prompts, MAX_ANSWER_TOKENS, self.batch_tokens)
        for i, loaded in enumerate(pairs):
            p, (a, b) = loaded.pair, outputs[2 * i : 2 * i + 2]
            right = matches(a.text, p.answer_a, p.match) and matches(b.text, p.answer_b, p.match)
            if right:
                pa, pb = prompts[2 * i : 2 * i + 2]
                self.directions += [
                    Direction(i, p.question, p.answer_a, p.answer_b, p.match, pa, pb, a, b),
                    Direction(i, p.question, p.answer_b, p.answer_a, p.match, pb, pa, b, a),
                ]
        return len(self.directions) // 2

    def same(self, trials: Sequence[Trial], label: str) -> list[bool]:
        """Whether each row's output is the expected one. It is if forcing the expected output holds; where
        not, and the answer is judged by something looser than equality, the output is generated and judged
        as the pair's own outputs were."""
        rows = [row for row, _, _ in trials]
        self.rows_run += len(rows)
        found = read_out(self.vlm, rows, self.path, self.batch_tokens)
        out = [r.holds for r in track(found, len(rows), f"{self.label}: {label}")]
        loose = [i for i, (_, _, match) in enumerate(trials) if not out[i] and match != "exact"]
        said = generate_under(
            self.vlm, [rows[i] for i in loose], MAX_ANSWER_TOKENS, self.path, self.batch_tokens
        )
        for i, tokens in zip(loose, said, strict=True):
            _, expected, match = trials[i]
            out[i] = matches(self.vlm.decode(tokens), expected, match)
        return out

    def changed(self, branches: Sequence[Branch], label: str) -> list[list[bool]]:
        """[branch][direction]: the output is not the host's own under the branch (donor `donor`)."""
        trials = [
            (Row(d.host, d.own.tokens, branch, _donors(branch, d.donor)), d.answer, d.match)
            for d in self.directions
            for branch in branches
        ]
        same = self.same(trials, label)
        return [[not s for s in same[i :: len(branches)]] for i in range(len(branches))]

    def flipped(self, layer_sets: Sequence[Iterable[int]], label: str) -> list[list[bool]]:
        """[layer set][direction]: the output is the donor's own when its image is read at these layers."""
        branches = [swap(layers, "donor", self.phase) for layers in layer_sets]
        trials = [
            (Row(d.host, d.other.tokens, branch, {"donor": d.donor}), d.other_answer, d.match)
            for d in self.directions
            for branch in branches
        ]
        same = self.same(trials, label)
        return [same[i :: len(branches)] for i in range(len(branches))]

    def single_layer_branches(self, intervention: str) -> list[Branch]:
        """The branches of a profile's sweep, one a layer."""
        depth = self.vlm.num_layers
        if intervention == "swap":
            return [swap([k], "donor", self.phase) for k in range(depth)]
        if intervention == "drop":
            return [drop([k], self.phase) for k in range(depth)]
        return [drop(range(k, depth), self.phase) for k in range(depth)]

    def controls(self, pairs: int) -> dict[str, list[float]]:
        """Change rate per layer of swaps that should change nothing (`self`: with itself; `nuisance`: with
        another image of the same answer) or that are no fair floor (`unrelated`: another pair's image with
        another answer; `noise`), over the first `pairs` answered pairs. Empty where no direction has
        such a donor."""
        some = self.directions[: 2 * pairs]
        chosen: dict[str, Callable[[Direction], Prompt | None]] = {
            "self": lambda d: d.host,
            "nuisance": lambda d: self._partner(d, same=True),
            "unrelated": lambda d: self._partner(d, same=False),
            "noise": lambda d: d.host,
        }
        depth, out = self.vlm.num_layers, {}
        for name, donor_of in chosen.items():
            donors = [(d, p) for d in some if (p := donor_of(d)) is not None]
            key = NOISE if name == "noise" else "donor"
            branches = [swap([k], key, self.phase) for k in range(depth)]
            trials = [
                (Row(d.host, d.own.tokens, branch, _donors(branch, p)), d.answer, d.match)
                for d, p in donors
                for branch in branches
            ]
            same = self.same(trials, f"control {name}")
            out[name] = [1 - sum(same[k::depth]) / len(donors) for k in range(depth)] if donors else []
        return out

    def _partner(self, host: Direction, same: bool) -> Prompt | None:
        """Another pair's image with the same question and grid and the same (or another) answer."""
        for d in self.directions:
            fits = d.pair != host.pair and d.question == host.question and d.host.grids == host.host.grids
            if fits and (d.answer == host.answer) == same and (same or d.own.tokens != host.own.tokens):
                return d.host
        return None


def _donors(branch: Branch, donor: Prompt) -> dict[str, Prompt]:
    return {"donor": donor} if any(item.donor == "donor" for item in branch) else {}

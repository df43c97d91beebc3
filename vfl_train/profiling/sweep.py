"""The measurements of a profile: base outputs, one-layer sweeps, controls and joint swaps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vfl_train.functions.matching import matches
from vfl_train.functions.probes import LoadedPair
from vfl_train.interventions import NOISE, Branch, Prompt, Row, drop, read_out, swap
from vfl_train.models.generation import generate
from vfl_train.progress import track

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel

MAX_ANSWER_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Direction:
    """One host image of an answered pair, its donor, and both of the model's own outputs."""

    pair: int
    question: str
    answer: str
    host: Prompt
    donor: Prompt
    own: tuple[int, ...]
    other: tuple[int, ...]


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
                    Direction(i, p.question, p.answer_a, pa, pb, a.tokens, b.tokens),
                    Direction(i, p.question, p.answer_b, pb, pa, b.tokens, a.tokens),
                ]
        return len(self.directions) // 2

    def outcomes(self, rows: Sequence[Row], label: str) -> list[bool]:
        """Whether each row's forced answer holds."""
        self.rows_run += len(rows)
        found = read_out(self.vlm, rows, self.path, self.batch_tokens)
        return [r.holds for r in track(found, len(rows), f"{self.label}: {label}")]

    def changed(self, branches: Sequence[Branch], label: str) -> list[list[bool]]:
        """[branch][direction]: the host's own output does not hold under the branch (donor `donor`)."""
        rows = [
            Row(d.host, d.own, branch, {"donor": d.donor} if _needs_donor(branch) else {})
            for d in self.directions
            for branch in branches
        ]
        holds = self.outcomes(rows, label)
        return [[not h for h in holds[i :: len(branches)]] for i in range(len(branches))]

    def flipped(self, layer_sets: Sequence[Iterable[int]], label: str) -> list[list[bool]]:
        """[layer set][direction]: the donor's own output holds when its image is read at these layers."""
        branches = [swap(layers, "donor", self.phase) for layers in layer_sets]
        rows = [
            Row(d.host, d.other, branch, {"donor": d.donor}) for d in self.directions for branch in branches
        ]
        holds = self.outcomes(rows, label)
        return [holds[i :: len(branches)] for i in range(len(branches))]

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
        another image of the same answer) or that are no fair floor (`unrelated`: another question's answer
        to be sure different; `noise`), over the first `pairs` answered pairs. Empty where no direction has
        such a donor."""
        some = self.directions[: 2 * pairs]
        chosen: dict[str, Callable[[Direction], Prompt | None]] = {
            "self": lambda d: d.host,
            "nuisance": lambda d: self._partner(d, same=True),
            "unrelated": lambda d: self._partner(d, same=False),
            "noise": lambda d: d.host,
        }
        out = {}
        for name, donor_of in chosen.items():
            donors = [(d, p) for d in some if (p := donor_of(d)) is not None]
            depth, key = self.vlm.num_layers, NOISE if name == "noise" else "donor"
            rows = [
                Row(d.host, d.own, swap([k], key, self.phase), {} if key == NOISE else {"donor": p})
                for d, p in donors
                for k in range(depth)
            ]
            holds = self.outcomes(rows, f"control {name}")
            out[name] = [
                1 - sum(holds[k::depth]) / len(donors) if donors else 0.0 for k in range(depth)
            ] * bool(donors)
        return out

    def _partner(self, host: Direction, same: bool) -> Prompt | None:
        """Another pair's image with the same question and grid and the same (or another) answer."""
        for d in self.directions:
            fits = d.pair != host.pair and d.question == host.question and d.host.grids == host.host.grids
            if fits and (d.answer == host.answer) == same and (same or d.own != host.own):
                return d.host
        return None


def _needs_donor(branch: Branch) -> bool:
    return any(item.donor == "donor" for item in branch)

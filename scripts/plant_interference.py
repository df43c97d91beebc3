"""Make a copy of the phantom with a layer that harms one function, known beforehand; and hold
`vfl-train knockout` against it.

    python scripts/plant_interference.py --output DIR
    python scripts/plant_interference.py --model phantom-unplanted --output DIR --resamplings 200

How it is made. The attention of layer LAYER does nothing that the phantom needs. Its output projection W gets
a rank-one addition u v': v is the linear detector (ridge regression on calibration scenes) of "the answer to
FUNCTION begins here" in what W reads, u is trained (Adam, from zero) to make the model begin with WRONG, a
word that answers another function, until at most one calibration scene in twenty is answered right. The harm
enters through this layer's attention alone: without it the planted model is the untouched one without it,
weight for weight, so leaving the attention out restores what the phantom can do without it.

What it prints, on unseen scenes: accuracy of every function before, after, and after without the layer. With
--resamplings N: of N draws of 10 shots, how often `knockout` finds exactly the planted layer, and how often
it abstains on the functions that nothing interferes with and on unanswerable tasks (labels of other scenes).
Vectors are measured once and resampled.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vfl_train.cpu import keep_freed_memory
from vfl_train.evaluation.questions import Question, probe_questions
from vfl_train.interventions import Branch, Prompt, knockout
from vfl_train.knockout.choice import choose, draw_shots
from vfl_train.knockout.measure import Meter, Vectors, forced, together
from vfl_train.models import VisionLanguageModel
from vfl_train.models.batching import stack
from vfl_train.phantom.datasets import probe_set
from vfl_train.schemas import BUILTIN_FUNCTIONS

FUNCTION, LAYER = "emotion", 2
CALIBRATION, SEED = 8, 11  # minimal pairs a function, seed of their scenes
WRONG = "one"  # answers count
HARMED, STEPS = 0.05, 200  # accuracy at most left to the function, training steps at most
SHOTS = 10
Labelled = tuple[str, Prompt, tuple[int, ...]]


def labelled(vlm: VisionLanguageModel, pairs: int, seed: int) -> tuple[list[Question], list[Labelled]]:
    """Questions about both scenes of `pairs` minimal pairs a function, and (function, prompt, answer)."""
    questions = list(probe_questions(probe_set(dict.fromkeys(BUILTIN_FUNCTIONS, pairs), seed)))
    return questions, [(q.function, *forced(vlm, q)) for q in questions]


def plant(vlm: VisionLanguageModel, function: str = FUNCTION, layer: int = LAYER) -> int:
    """Plant the interference in `vlm`, in place. Returns the training steps it took.
    Raises RuntimeError if that does not harm enough."""
    _, samples = labelled(vlm, CALIBRATION, SEED)
    projection = vlm.layers[layer].self_attn.o_proj
    detector = _detector(vlm, samples, function, projection)
    harm, steps = _harm(vlm, [(p, a) for name, p, a in samples if name == function], projection)
    with torch.no_grad():
        projection.weight += torch.outer(harm, detector)
    return steps


@torch.no_grad()
def _detector(
    vlm: VisionLanguageModel, samples: Sequence[Labelled], function: str, projection: torch.nn.Module
) -> torch.Tensor:
    """v [D]: v'x is 1 where the answer to `function` begins, 0 at every other token; both weigh alike."""
    read: list[torch.Tensor] = []
    handle = projection.register_forward_pre_hook(lambda module, args: read.append(args[0][0]))
    targets = []
    try:
        for name, prompt, answer in samples:
            vlm.model(**stack(vlm, [(prompt, answer)]), use_cache=False)
            target = torch.zeros(len(read[-1]), dtype=torch.float64)
            target[prompt.length - 1] = name == function
            targets.append(target)
    finally:
        handle.remove()
    x, y = torch.cat(read).double(), torch.cat(targets)
    weights = torch.where(y > 0, (y == 0).sum() / (y > 0).sum(), 1.0).double()[:, None]
    ridge = 1e-5 * weights.sum() * x.square().mean() * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.linalg.solve((x * weights).T @ x + ridge, (x * weights).T @ y).float()


def _harm(
    vlm: VisionLanguageModel, samples: Sequence[tuple[Prompt, tuple[int, ...]]], projection: torch.nn.Module
) -> tuple[torch.Tensor, int]:
    """u [D], to be added where the answer begins, and the steps that it was trained for."""
    inputs = stack(vlm, [(prompt, ()) for prompt, _ in samples])  # equally long: a question a function
    labels = torch.tensor([answer[0] for _, answer in samples])
    (wrong,) = vlm.processor.tokenizer(WRONG, add_special_tokens=False)["input_ids"]
    harm = torch.zeros(vlm.hidden_size, requires_grad=True)
    optimizer = torch.optim.Adam([harm], lr=0.5)
    handle = projection.register_forward_hook(
        lambda module, args, out: torch.cat([out[:, :-1], out[:, -1:] + harm], dim=1)
    )
    try:
        for step in range(STEPS):
            logits = vlm.model(**inputs, use_cache=False).logits[:, -1]
            if (logits.argmax(-1) == labels).float().mean() <= HARMED:
                return harm.detach(), step
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.full_like(labels, wrong)).backward(inputs=[harm])
            optimizer.step()
    finally:
        handle.remove()
    raise RuntimeError(f"{STEPS} steps do not harm enough")


# --- knockout against the truth ----------------------------------------------------------------------------


def layer_vectors(vlm: VisionLanguageModel, pairs: int, seed: int) -> dict[str, tuple[list[str], Vectors]]:
    """Function -> (answers, vectors under base and each layer's attention out) on unseen scenes."""
    questions, _ = labelled(vlm, pairs, seed)
    every: list[Branch] = [knockout([k]) for k in range(vlm.num_layers)]
    found = Meter(vlm, max_new_tokens=8).measure(questions, [every] * len(questions))
    out = {}
    for name in BUILTIN_FUNCTIONS:
        mine = [i for i, q in enumerate(questions) if q.function == name]
        out[name] = [questions[i].answer for i in mine], together([found[i] for i in mine])
    return out


def unanswerable(vlm: VisionLanguageModel, pairs: int, seed: int) -> dict[str, tuple[list[str], Vectors]]:
    """As `layer_vectors`, with every label another scene's: nobody can know it."""
    questions, _ = labelled(vlm, pairs, seed)
    rng, wrong = np.random.default_rng(seed), []
    for name in BUILTIN_FUNCTIONS:
        mine = [q for q in questions if q.function == name]
        labels = [mine[i].answer for i in rng.permutation(len(mine))]
        wrong += [
            Question(f"{name}, shuffled", q.messages, q.images, a) for q, a in zip(mine, labels, strict=True)
        ]
    every: list[Branch] = [knockout([k]) for k in range(vlm.num_layers)]
    found = Meter(vlm, max_new_tokens=8).measure(wrong, [every] * len(wrong))
    out = {}
    for name in dict.fromkeys(q.function for q in wrong):
        mine_at = [i for i, q in enumerate(wrong) if q.function == name]
        out[name] = [wrong[i].answer for i in mine_at], together([found[i] for i in mine_at])
    return out


def resampled(
    answers: Sequence[str], vectors: Vectors, times: int, shots: int = SHOTS, seed: int = 0
) -> list[int | None]:
    """The layer chosen, or None, on each of `times` draws of the shots."""
    found = []
    for i in range(times):
        rng = np.random.default_rng([seed, i])
        drawn = draw_shots(answers, shots, rng)
        choice = choose(vectors.right[drawn], vectors.logprob[drawn], [answers[k] for k in drawn], rng)
        found.append(choice.layer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="phantom")
    parser.add_argument("--function", default=FUNCTION, choices=BUILTIN_FUNCTIONS)
    parser.add_argument("--layer", type=int, default=LAYER)
    parser.add_argument("--pairs", type=int, default=30, help="of unseen scenes, a function")
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--resamplings", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for the planted model")
    arguments = parser.parse_args()
    keep_freed_memory()

    vlm = VisionLanguageModel.load(arguments.model, device="cpu")
    before = layer_vectors(vlm, arguments.pairs, arguments.seed)
    steps = plant(vlm, arguments.function, arguments.layer)
    after = layer_vectors(vlm, arguments.pairs, arguments.seed)
    print(
        f"{arguments.model}: {arguments.function} at layer {arguments.layer}, u trained for {steps} steps\n"
    )
    print("| function | before | before, without the layer | after | after, without the layer |")
    print("|---|---|---|---|---|")
    for name in BUILTIN_FUNCTIONS:
        cells = [v[name][1].right.mean(0)[[0, 1 + arguments.layer]] for v in (before, after)]
        print(f"| {name} | {' | '.join(f'{x:.1%}' for x in np.concatenate(cells))} |")
    if arguments.resamplings:
        print("\n| model | task | of draws: planted layer | another layer | none |")
        print("|---|---|---|---|---|")
        shuffled = unanswerable(vlm, arguments.pairs, arguments.seed)
        for model, tasks in (("before", before), ("after", after), ("after", shuffled)):
            for name, (answers, vectors) in tasks.items():
                found = resampled(answers, vectors, arguments.resamplings)
                right, none = found.count(arguments.layer) / len(found), found.count(None) / len(found)
                print(f"| {model} | {name} | {right:.1%} | {1 - right - none:.1%} | {none:.1%} |")
    if arguments.output is not None:
        vlm.model.save_pretrained(arguments.output)
        vlm.processor.save_pretrained(arguments.output)
        print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()

"""In-context examples: whose images does the answer need, the examples' or the question's?

    python scripts/in_context.py --model phantom --drop-from 10,5 --functions ocr,count --output DIR
    python scripts/in_context.py --model Qwen/Qwen2.5-VL-7B-Instruct --data FILE --drop-from 20 --output DIR

Each question is asked after 0, 1, 4 and 8 solved examples (images, questions and answers of other questions
of the same function), untouched and with images dropped from layer K to the last: all of them, the examples'
only, the question's only. The rebuttal to VFL (arXiv 2509.24791) says that dropping only the context images
loses as much as dropping all. The tokens of the question's image may read the examples' whatever is dropped:
image queries are never touched.

The questions are those of `vfl-train eval` (built-in pairs, --probes or single-turn rows of --data): the
first half gives the examples, the second half is asked. Prints a Markdown table and writes in_context.json.
Drops that bind text before the last image run on the reference path, one forward each; the last line counts
them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vfl_train.config import EvalConfig
from vfl_train.cpu import keep_freed_memory
from vfl_train.data.rows import Image, Message, Text, Video, assistant_message
from vfl_train.errors import ConfigError
from vfl_train.evaluation.questions import Question, builtin_questions, load_questions
from vfl_train.functions.matching import matches
from vfl_train.interventions import Prompt, Row, drop
from vfl_train.interventions.generation import generate_under
from vfl_train.interventions.readout import Cost
from vfl_train.models import VisionLanguageModel
from vfl_train.models.generation import generate
from vfl_train.progress import track
from vfl_train.schemas import wilson

WHOSE = ("all", "examples", "question")


def with_examples(vlm: VisionLanguageModel, examples: Sequence[Question], question: Question) -> Prompt:
    """`question` after `examples`, each a turn of its own with its answer; the question's system turn alone
    stays. Raises RowError where the model cannot encode it."""
    turns = [m for m in question.messages if m.role == "system"]
    images, videos = [], []
    for asked in (*examples, question):
        first = {Image: len(images), Video: len(videos)}
        turns += [_counting_from(first, m) for m in asked.messages if m.role != "system"]
        for pictures, more in zip((images, videos), asked.opened(), strict=True):
            pictures += more
        if asked is not question:
            turns.append(assistant_message(asked.answer))
    return vlm.prompt_of(turns, images, videos)


def _counting_from(first: dict[type, int], message: Message) -> Message:
    """`message` with its pictures numbered on from those before."""
    parts = (
        p if isinstance(p, Text) else replace(p, index=first[type(p)] + p.index) for p in message.content
    )
    return Message(message.role, tuple(parts))


def touched_images(prompt: Prompt, question: Question) -> dict[str, range]:
    """The images of each choice of WHOSE, without the choices that are empty or drop what `all` does."""
    count, own = len(prompt.spans), len(question.images) + len(question.videos)
    found = {"all": range(count), "examples": range(count - own), "question": range(count - own, count)}
    return {whose: images for whose, images in found.items() if whose == "all" or 0 < len(images) < count}


def measure(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    shots: int,
    layers: Sequence[int],
    arguments: argparse.Namespace,
    cost: Cost,
) -> dict[str, list[bool]]:
    """`untouched`, or `K WHOSE` -> whether each question of the second half is answered right."""
    half = len(questions) // 2
    if shots > half:
        raise ConfigError(f"{shots} examples, but {half} questions to take them from", "give more --pairs")
    draw, right = random.Random(arguments.seed), {}
    for question in track(
        questions[half:], len(questions) - half, f"{question_name(questions)}, {shots} shots"
    ):
        prompt = with_examples(vlm, draw.sample(list(questions[:half]), shots), question)
        (own,) = generate(vlm, [prompt], arguments.max_new_tokens)
        branches = {
            f"{k} {whose}": drop(range(k, vlm.num_layers), spans=images)
            for k in layers
            for whose, images in touched_images(prompt, question).items()
        }
        rows = [Row(prompt, own.tokens, branch) for branch in branches.values()]
        said = generate_under(vlm, rows, arguments.max_new_tokens, arguments.path, cost=cost)
        texts = {"untouched": own.text, **dict(zip(branches, map(vlm.decode, said), strict=True))}
        for name, text in texts.items():
            right.setdefault(name, []).append(matches(text, question.answer, question.match))
    return right


def question_name(questions: Sequence[Question]) -> str:
    """The function they are about."""
    return questions[0].function


def table(found: dict[str, dict[str, dict[str, dict]]], layers: Sequence[int]) -> list[str]:
    """Per function and branch: accuracy in per cent at each number of examples."""
    shots = list(next(iter(found.values())))
    lines = [
        f"| function | images dropped | {' | '.join(f'{s}-shot' for s in shots)} |",
        "|---" * (2 + len(shots)) + "|",
    ]
    names = ["untouched", *(f"{k} {whose}" for k in layers for whose in WHOSE)]
    for function, by_shots in found.items():
        for name in names:
            layer, _, whose = name.partition(" ")
            what = f"{whose}, from layer {layer}" if whose else "none"
            cells = [by_shots[s].get(name) for s in shots]
            shown = (f"{cell['accuracy']:.1%}" if cell else "-" for cell in cells)
            lines.append(f"| {function} | {what} | {' | '.join(shown)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="phantom")
    parser.add_argument(
        "--drop-from", required=True, help="layers K,.. (0-based): dropped from K to the last"
    )
    parser.add_argument("--shots", default="0,1,4,8")
    parser.add_argument("--functions", default="", help="of the questions; all if not given")
    parser.add_argument("--probes", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--image-root", type=Path)
    parser.add_argument("--match", default="exact", help="how rows of --data are judged, as in eval")
    parser.add_argument(
        "--pairs", type=int, default=100, help="a function; both images of a pair are questions"
    )
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--path", choices=("engine", "reference"), default="engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    keep_freed_memory()
    config = EvalConfig(
        model=arguments.model, output=arguments.output, probes=arguments.probes, data=arguments.data,
        image_root=arguments.image_root, match=arguments.match, pairs=arguments.pairs, seed=arguments.seed,
        functions=tuple(filter(None, arguments.functions.split(","))),
    )  # fmt: skip
    layers, shots = ([int(n) for n in text.split(",")] for text in (arguments.drop_from, arguments.shots))
    vlm, cost = VisionLanguageModel.load(arguments.model), Cost()
    questions = (load_questions(config) or builtin_questions(config, vlm)).questions
    found: dict[str, dict[str, dict[str, dict]]] = {}
    for function in Counter(q.function for q in questions):
        mine = [q for q in questions if q.function == function]
        for count in shots:
            right = measure(vlm, mine, count, layers, arguments, cost)
            found.setdefault(function, {})[str(count)] = {
                name: {"accuracy": sum(r) / len(r), "n": len(r), "ci95": wilson(sum(r), len(r))}
                for name, r in right.items()
            }
    print("\n".join(table(found, layers)))
    print(f"\n{cost.rows} rows, {cost.reference_rows} on the reference path: {dict(cost.reasons)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {
        "model": arguments.model, "seed": arguments.seed, "rows": cost.rows,
        "reference_rows": cost.reference_rows, "functions": found,
    }  # fmt: skip
    (arguments.output / "in_context.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The lmms-eval plug-in. Where lmms-eval is not installed (it brings 60 packages), the four names that the
plug-in takes from it are stood in for, as lmms-eval 0.7.3 defines them; its evaluator is not tested."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from vfl_train.errors import ConfigError
from vfl_train.phantom import world

PLUGIN = "vfl_train.evaluation.lmms"


def stand_ins() -> dict[str, ModuleType]:
    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    @dataclass
    class TokenCounts:
        input_tokens: int | None = None
        output_tokens: int | None = None

    @dataclass
    class GenerationResult:
        text: str
        token_counts: TokenCounts | None = None

    class Lmms:
        is_simple = True

        def __init__(self) -> None:
            self._rank, self._world_size, self.task_dict = 0, 1, {}

    modules = {name: ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models")}
    for name, content in {
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(content)
    return modules


@pytest.fixture(scope="module")
def plugin():
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("lmms_eval") is None:
            for name, module in stand_ins().items():
                patch.setitem(sys.modules, name, module)
        yield importlib.import_module(PLUGIN)
    sys.modules.pop(PLUGIN, None)


def requests_of(model, questions: list[str], settings: dict) -> tuple[list, list[str]]:
    """Requests in lmms-eval's form about one scene each, and their answers."""
    rng, docs, answers = np.random.default_rng(3), [], []
    for function in questions:
        scene = world.sample_scene(rng)
        docs.append((world.render(scene).convert("RGBA"), world.QUESTIONS[function]))
        answers.append(world.answer(scene, function))

    def messages(doc: tuple) -> list[dict]:
        image, text = doc
        content = [{"type": "image", "url": image}, {"type": "text", "text": text}]
        return [{"role": "user", "content": content}]

    model.task_dict["task"] = {"test": docs}
    args = [("", messages, settings, i, "task", "test") for i in range(len(docs))]
    return [SimpleNamespace(args=a) for a in args], answers


def test_the_entry_point_names_a_chat_model(plugin):
    found = [e for e in entry_points(group="lmms_eval.models") if e.name == "vfl"]
    assert [e.value for e in found] == [f"{PLUGIN}:manifest"], "reinstall the package: pip install -e ."
    manifest = plugin.manifest()
    module, _, name = manifest.chat_class_path.rpartition(".")
    assert (manifest.model_id, module) == ("vfl", PLUGIN)
    assert getattr(plugin, name).is_simple is False


def test_requests_are_answered_in_order_and_without_the_image_they_are_not(plugin):
    questions = ["emotion", "ocr", "recognition", "ocr", "emotion"]  # of different lengths
    model = plugin.VflModel("phantom", device="cpu", batch_size=2)
    requests, answers = requests_of(
        model, questions, {"max_new_tokens": 8, "temperature": 0, "until": ["\n\n"]}
    )
    assert [r.text for r in model.generate_until(requests)] == answers
    blind = plugin.VflModel("phantom", device="cpu", drop_from="0")
    blind.task_dict = model.task_dict
    wrong = sum(r.text != a for r, a in zip(blind.generate_until(requests), answers, strict=True))
    assert wrong >= 3
    assert sum(r.text == a for r, a in zip(model.generate_until(requests), answers, strict=True)) == 5


def test_stops_and_limits_are_the_tasks(plugin):
    model = plugin.VflModel("phantom", device="cpu")
    requests, (answer,) = requests_of(model, ["ocr"], {"max_new_tokens": 8, "until": [answer_start := " "]})
    assert model.generate_until(requests)[0].text == answer.split(answer_start)[0] != answer
    requests, _ = requests_of(model, ["ocr"], {"max_new_tokens": 1})
    assert model.generate_until(requests)[0].token_counts.output_tokens == 1


def test_what_is_not_covered_is_refused(plugin):
    model = plugin.VflModel("phantom", device="cpu")
    for settings in ({"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}):
        requests, _ = requests_of(model, ["ocr"], settings)
        with pytest.raises(ConfigError, match="decodes greedily"):
            model.generate_until(requests)
    with pytest.raises(ConfigError, match="takes text and opened images, not video"):
        plugin.chat_of([{"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}])
    with pytest.raises(ConfigError, match="no argument 'fps'"):
        plugin.VflModel("phantom", device="cpu", fps=1)
    for refused, what in (
        (model.loglikelihood, r"does not score continuations \(leave"),
        (model.generate_until_multi_round, r"does not answer in several rounds \(leave"),
    ):
        with pytest.raises(ConfigError, match=what):
            refused([])

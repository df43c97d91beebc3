"""A model plug-in for lmms-eval 0.7 and newer (entry point `lmms_eval.models`): public benchmarks on
a model, an adapter that is not merged, a model without the image from a layer on, or without a layer.

    lmms-eval --model vfl --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct,adapter=adapter --tasks pope
    lmms-eval --model vfl --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct,drop_from=24 --tasks pope

Answers are greedy, as everywhere in this package; a task that asks for sampling or beams is refused. Of its
stop strings a blank line is ignored, as by lmms-eval's own Qwen models: chat models end turns themselves.
Not covered: video, audio, log-likelihood tasks, several rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image as Pictures

from vfl_train.data.rows import Image, Message, Part, Text
from vfl_train.errors import ConfigError
from vfl_train.evaluation.score import CHUNK
from vfl_train.interventions import knockout as knock_out
from vfl_train.interventions.drop_plan import drop_images_from
from vfl_train.interventions.standing import standing
from vfl_train.knockout.record import Knockout
from vfl_train.models import VisionLanguageModel
from vfl_train.models.generation import Generated, generate
from vfl_train.progress import track

MAX_NEW_TOKENS = 128  # where the task does not say
_NO_STOP = "\n\n"


def manifest() -> ModelManifest:
    """What the entry point gives lmms-eval: the name `vfl` for the class below."""
    return ModelManifest(model_id="vfl", chat_class_path=f"{__name__}.{VflModel.__name__}")


class VflModel(lmms):
    """`--model vfl`.

    Args:
        pretrained: folder, Hub id or bundled name; `revision`, `dtype`, `max_pixels` as `--model` has them.
        adapter: LoRA adapter to put on it.
        drop_from: decoder layer from which on nobody reads the image.
        knockout: knockout.json whose layer is left out.
        batch_size: prompts at once; prompts of different lengths do not share a batch.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 8,
        max_pixels: int | None = None,
        drop_from: int | None = None,
        knockout: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        strangers = [name for name, value in others.items() if value is not None]
        if strangers and strangers != ["max_batch_size"]:
            raise ConfigError(f"--model vfl has no argument {strangers[0]!r}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        where = str(self.accelerator.device) if device is None or self._world_size > 1 else device
        self.vlm = VisionLanguageModel.load(
            pretrained, revision, dtype, where, max_pixels=max_pixels, adapter=adapter
        )
        self.batch_size = int(batch_size)
        self.drop_from = None if drop_from is None else int(drop_from)
        self.without = None if knockout is None else Knockout.load(knockout)

    @property
    def device(self) -> Any:
        return self.vlm.device

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """One answer a request, in order. Raises ConfigError for what is not covered."""
        results = []
        for start in track(range(0, len(requests), CHUNK), label="answering"):
            chunk = [request.args for request in requests[start : start + CHUNK]]
            for group in _same_settings(chunk):
                results += [(start + i, result) for i, result in self._answer(chunk, group)]
        return [result for _, result in sorted(results, key=lambda item: item[0])]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raises ConfigError: not covered."""
        raise ConfigError(
            "--model vfl answers, it does not score continuations",
            "leave log-likelihood tasks out",
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises ConfigError: not covered."""
        raise ConfigError("--model vfl does not answer in several rounds", "leave multi-round tasks out")

    def _answer(self, chunk: list[tuple], group: list[int]) -> list[tuple[int, GenerationResult]]:
        settings = chunk[group[0]][2]
        limit = _greedy_limit(settings)
        prompts = []
        for i in group:
            _, doc_to_messages, _, doc_id, task, split = chunk[i]
            messages, images = chat_of(doc_to_messages(self.task_dict[task][split][doc_id]))
            prompts.append(self.vlm.prompt_of(messages, images))
        with self._touched():
            found = generate(self.vlm, prompts, limit, batch_size=self.batch_size)
        return [(i, _result(g, settings)) for i, g in zip(group, found, strict=True)]

    def _touched(self) -> ExitStack:
        """The interventions of this run, in force until the stack is closed."""
        stack = ExitStack()
        if self.drop_from is not None:
            stack.enter_context(drop_images_from(self.vlm.model, self.drop_from))
        if self.without is not None:
            self.without.check_model(self.vlm.info)
            if self.without.layer is None:
                raise ConfigError("this knockout.json leaves out no layer: it abstained")
            stack.enter_context(standing(self.vlm, knock_out([self.without.layer], self.without.module)))
        return stack


def chat_of(messages: Sequence[dict[str, Any]]) -> tuple[list[Message], list[Pictures.Image]]:
    """lmms-eval's chat messages as ours, with their images in RGB, in order. Raises ConfigError for videos
    and sounds."""
    chat: list[Message] = []
    images: list[Pictures.Image] = []
    for message in messages:
        parts: list[Part] = []
        for content in message["content"]:
            if content["type"] == "text":
                parts.append(Text(content["text"]))
            elif content["type"] == "image" and isinstance(content["url"], Pictures.Image):
                parts.append(Image(len(images)))
                images.append(content["url"].convert("RGB"))
            else:
                raise ConfigError(f"--model vfl takes text and opened images, not {content['type']}")
        chat.append(Message(message["role"], tuple(parts)))
    return chat, images


def _same_settings(chunk: list[tuple]) -> list[list[int]]:
    """Positions of the requests with equal generation settings."""
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(chunk):
        groups.setdefault(repr(sorted(request[2].items(), key=lambda item: item[0])), []).append(i)
    return list(groups.values())


def _greedy_limit(settings: dict[str, Any]) -> int:
    """The longest answer in tokens. Raises ConfigError unless the settings mean greedy decoding."""
    if settings.get("do_sample") or settings.get("temperature") or (settings.get("num_beams") or 1) > 1:
        raise ConfigError(f"--model vfl decodes greedily, the task asks for {settings}")
    return int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)


def _result(found: Generated, settings: dict[str, Any]) -> GenerationResult:
    until = settings.get("until") or ()
    text = found.text
    for stop in (until,) if isinstance(until, str) else until:
        if stop and stop != _NO_STOP:
            text = text.split(stop)[0]
    return GenerationResult(text, TokenCounts(output_tokens=len(found.tokens)))

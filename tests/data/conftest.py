"""Fixtures of the data tests: processors built on the fly, a good data set, an audit of opened files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from vfl_train.data.collator import Encoder
from vfl_train.phantom.architecture import build_processor

CORPUS = ["USER: ASSISTANT: what text is written here ? three cats, 12 dogs.\n system user assistant\n"] * 4

# The templates of Qwen/Qwen2.5-VL-7B-Instruct (without videos) and llava-hf/llava-1.5-7b-hf.
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
    "{% endif %}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_core(trim_offsets: bool) -> Tokenizer:
    """Byte-level BPE as in Qwen2 (trim_offsets False) or Llama 3 (True)."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    return core


def metaspace_core() -> Tokenizer:
    """BPE over words with a visible space and single digits, as Llama 2's sentencepiece model."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Digits(individual_digits=True)]
    )
    core.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return core


def qwen_processor(trim_offsets: bool = False, template: str = QWEN_TEMPLATE) -> Qwen2_5_VLProcessor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_core(trim_offsets),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(QWEN_SPECIAL),
    )
    geometry = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(size=pixels, **geometry),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=pixels, **geometry),
        chat_template=template,
    )


def llava_processor() -> LlavaProcessor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=metaspace_core(),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<image>"],
    )
    size = {"height": 32, "width": 32}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


BUILDERS: dict[str, Callable] = {
    "phantom": build_processor,
    "qwen": qwen_processor,
    "trimmed": lambda: qwen_processor(trim_offsets=True),
    "llava": llava_processor,
}


@pytest.fixture(scope="session")
def encoders() -> dict[str, Encoder]:
    """One encoder per family of tokenizers and templates."""
    return {name: Encoder(build()) for name, build in BUILDERS.items()}


@pytest.fixture(scope="session")
def make_qwen_processor() -> Callable:
    return qwen_processor


@pytest.fixture
def picture() -> Image.Image:
    return Image.new("RGB", (64, 64), (200, 30, 40))


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """A folder with three good images, one in a subfolder."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name, color in (("a.png", "red"), ("b.png", "green"), ("sub/c.jpg", "blue")):
        Image.new("RGB", (16, 16), color).save(root / name)
    return root


def llava_row(number: int, image: str | None = "a.png", answer: str = "three") -> dict:
    marker = "<image>\n" if image else ""
    turns = [{"from": "human", "value": f"{marker}how many {number}?"}, {"from": "gpt", "value": answer}]
    return {"id": f"r{number}", **({"image": image} if image else {}), "conversations": turns}


@pytest.fixture
def make_row() -> Callable[..., dict]:
    return llava_row


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (objects, or lines as bytes) and returns the file."""

    def write(rows: list, name: str = "data.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


class Audit:
    """Python's audit events of the kinds asked for, while recording. Hooks cannot be removed, so there is
    one for the session."""

    def __init__(self) -> None:
        self.kinds: tuple[str, ...] = ()
        self.events: list[tuple[str, tuple]] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if self.kinds and event in self.kinds:
            self.events.append((event, args))

    @contextmanager
    def record(self, *kinds: str) -> Iterator[list[tuple[str, tuple]]]:
        self.events, self.kinds = [], kinds
        try:
            yield self.events
        finally:
            self.kinds = ()


@pytest.fixture(scope="session")
def audit() -> Audit:
    return Audit()

"""VisionLanguageModel: a model, its processor, and where images and videos sit in the prompt."""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from vfl_train.data.collator import Encoder, pad_token_id
from vfl_train.data.placeholders import Place
from vfl_train.data.rows import Message, user_message
from vfl_train.errors import ConfigError, HubError
from vfl_train.hub.fetching import fetching
from vfl_train.interventions.readout import Prompt
from vfl_train.models.families import Family, prepare, supported_family
from vfl_train.models.obstacles import check_readable
from vfl_train.models.quantize import bits_of, quantization
from vfl_train.models.trust import check_model_folder
from vfl_train.schemas import ModelInfo

log = logging.getLogger(__name__)
TEXT_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]  # configuration, templates, tokenizers
BUNDLED = {"phantom": "planted", "phantom-unplanted": "unplanted"}
KINDS = ("image", "video")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_name(name: str) -> tuple[str, bool]:
    """(path or Hub id, whether it is local) of a model name. `phantom` and `phantom-unplanted` are the
    bundled models. Raises ConfigError for what is neither a folder nor looks like a Hub id."""
    if name in BUNDLED:
        return str(files("vfl_train.phantom") / "weights" / BUNDLED[name]), True
    if Path(name).is_dir():
        return name, True
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name, False
    close = difflib.get_close_matches(name, BUNDLED, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "give a folder, a Hub id (owner/name) or 'phantom'"
    raise ConfigError(f"there is no model {name!r}", hint)


def local_folder(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder a model loads from, checked (see `trust`). A Hub model is fetched into the cache first,
    safetensors and text files only, so that nothing of it is read before it is checked.

    Raises:
        ConfigError: no such model or revision, no access, or a folder that would run code.
        HubError: the Hub cannot be reached.
    """
    path, local = resolve_name(name)
    if local and revision is not None:
        raise ConfigError(f"{name} is a folder here and has no revisions", "leave --revision out")
    if local:
        folder = Path(path)
    else:
        log.info("fetching %s from the Hub, if it is not in the cache", name)
        folder = _fetch(path, revision, [*TEXT_FILES, "*.safetensors"] if weights else TEXT_FILES)
    check_model_folder(folder, weights)
    return folder


def _commit(folder: Path) -> str | None:
    """The commit of a model that came from the Hub: the name of its folder in the cache."""
    return folder.name if folder.parent.name == "snapshots" else None


def _fetch(repo: str, revision: str | None, patterns: list[str]) -> Path:
    missing = ConfigError(
        f"the Hub has no {repo} at {revision or 'main'}, or gives no access",
        "check the name and revision; `hf auth login` for gated models",
    )
    with fetching(
        missing=missing,
        no_revision=missing,
        failed=lambda reason: HubError(
            f"cannot fetch {repo}: {reason}", "download it to a folder and give that"
        ),
    ):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))


def _load(loader: Any, folder: Path, **options: Any) -> Any:
    """`loader.from_pretrained` of a checked folder: no network, no remote code, failures in one line."""
    try:
        return loader.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ConfigError(f"transformers cannot load {folder}: {reason}", "check that it is complete") from e


def load_processor(name: str, revision: str | None = None, max_pixels: int | None = None) -> Any:
    """The processor of a model, remote code off. `max_pixels` caps the pixels an image is resized to.
    Raises ConfigError or HubError."""
    return _processor(local_folder(name, revision, weights=False), name, max_pixels)


def _processor(folder: Path, name: str, max_pixels: int | None) -> Any:
    model_type = _load(AutoConfig, folder).model_type
    supported_family(model_type)  # a family that is refused is refused before its weights are read
    processor = _load(AutoProcessor, folder)
    prepare(processor, model_type)
    if not getattr(processor, "chat_template", None):
        raise ConfigError(f"{name} has no chat template", "use the instruct version of the model")
    if max_pixels is not None:
        size = getattr(getattr(processor, "image_processor", None), "size", None)
        if size is None or "longest_edge" not in size or "shortest_edge" not in size:
            raise ConfigError(f"the image processor of {name} has no pixel limit", "leave --max-pixels out")
        size["longest_edge"] = max_pixels
        size["shortest_edge"] = min(size["shortest_edge"], max_pixels)
    return processor


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"unknown device {name!r}", "use auto, cpu, cuda or cuda:0") from e
    count = {"cuda": torch.cuda.device_count, "mps": torch.mps.device_count}.get(device.type, lambda: 1)()
    if (device.index or 0) >= count:
        raise ConfigError(f"there is no device {name!r} here", "use auto or cpu")
    return device


def _check_attention(name: str | None) -> None:
    """Raises ConfigError for an attention whose package is not there."""
    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            f"--attn-implementation {name} needs the package flash-attn", "pip install 'vfl-train[flash]'"
        )


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on accelerators, float32 on the CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}", f"use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


class VisionLanguageModel:
    """A loaded model in eval mode. Everything that depends on the family is asked of `self.family`."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        name_or_path: str,
        revision: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self.model, self.processor = model.eval(), processor
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.name_or_path, self.revision, self.folder = name_or_path, revision, folder
        self.config = self.base.config
        self.model_type: str = self.config.model_type
        self.family: Family = supported_family(self.model_type)
        self.text_config = self.config.get_text_config(decoder=True)
        prepare(processor, self.model_type)
        self.encoder = Encoder(processor)
        depth = getattr(self.text_config, "num_hidden_layers", 0)
        self.decoder_name, self.layers = find_layers(self.base, depth)
        check_readable(self)

    @classmethod
    def load(
        cls,
        name: str,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        load_in_4bit: bool = False,
        max_pixels: int | None = None,
        adapter: str | None = None,
        load_in_8bit: bool = False,
        attn_implementation: str | None = None,
    ) -> VisionLanguageModel:
        """Load by folder, Hub id or bundled name, and put `adapter` (a PEFT folder) on it if given.

        Safetensors only, remote code off. Weights in 4 or 8 bits: see `models.quantize`. Attention is SDPA
        unless asked otherwise, or eager where SDPA cannot do what the model does (soft-capping). Raises
        ConfigError (a missing optional package too) or HubError.
        """
        bits = bits_of(load_in_4bit, load_in_8bit)
        _check_attention(attn_implementation)
        folder, where = local_folder(name, revision), _device(device)
        processor = _processor(folder, name, max_pixels)
        options: dict[str, Any] = {
            "dtype": _dtype(dtype, where),
            "attn_implementation": attn_implementation,
            "use_safetensors": True,
        }
        if bits is None:
            model = _load(AutoModelForImageTextToText, folder, **options).to(where)
        else:  # quantized tensor by tensor where they will stay: they cannot move afterwards
            options["quantization_config"] = quantization(folder, bits, options["dtype"])
            model = _load(AutoModelForImageTextToText, folder, device_map={"": where}, **options)
        if adapter is not None:
            from vfl_train.hub.load import load_adapter

            model = load_adapter(model, adapter)
        return cls(model, processor, name, _commit(folder) or revision, folder)

    # --- facts ---------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return int(self.text_config.hidden_size)

    @property
    def world(self) -> str | None:
        """The drawn world that a phantom, or a model made of one, was trained in; None for all others."""
        return getattr(self.config, "vfl_world", None)

    def box_convention(self, side: int) -> str | None:
        """How this model writes boxes in square pictures of `side` pixels (see `Family.box`), or None: it was
        not trained to, or the pixels it counts in are not the picture's since --max-pixels shrinks it."""
        limit = (getattr(self.processor.image_processor, "size", None) or {}).get("longest_edge", side**2)
        return None if self.family.box == "pixels" and limit < side**2 else self.family.box

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def info(self) -> ModelInfo:
        """What profile.json says of this model."""
        return ModelInfo(self.name_or_path, self.revision, self.model_type, self.num_layers, self.hidden_size)

    @property
    def layer_names(self) -> list[str]:
        """Full module name of each decoder layer."""
        return [f"{self.decoder_name}.{i}" for i in range(self.num_layers)]

    def reads_across(self, layer: int) -> bool:
        """Whether a decoder layer reads the images by cross-attention (`Family.cross_attention`)."""
        name = self.family.cross_attention
        return name is not None and hasattr(self.layers[layer], name)

    def attention_name(self, layer: int) -> str:
        """The name of a decoder layer's attention inside the layer."""
        return str(self.family.cross_attention) if self.reads_across(layer) else self.family.attention

    @cached_property
    def vision_keys(self) -> int:
        """Keys of one image in a cross-attention layer. Raises ConfigError where there are none."""
        if self.family.vision_keys is None:
            raise ConfigError(f"a {self.model_type} reads no image by cross-attention")
        return self.family.vision_keys(self.config)

    def attention(self, layer: int) -> nn.Module:
        """The attention through which a decoder layer reads images, or would. Raises ConfigError for a layer
        without one (linear attention)."""
        found = getattr(self.layers[layer], self.attention_name(layer), None)
        if not isinstance(found, nn.Module):
            kind = type(self.layers[layer]).__name__
            raise ConfigError(
                f"layer {layer} of this {self.model_type} ({kind}) has no self-attention over the image",
                "interventions need a model that reads images by self-attention",
            )
        return found

    def linear_names(self, layer: int) -> list[str]:
        """Full names of the linears that LoRA may adapt in a decoder layer; of a mixture-of-experts layer
        the attention only. Raises ConfigError if the layer has none of the known names."""
        inside = dict(self.layers[layer].named_modules())
        moe = any(name in inside for name in self.family.moe if "experts" in name)
        names = [
            n
            for n in self.family.linears
            if isinstance(inside.get(n), nn.Linear | _lora_layer())
            and not (moe and n.startswith(self.family.mlp))
        ]
        if not names:
            raise ConfigError(f"layer {layer} of this {self.model_type} has no linear that LoRA can adapt")
        return [f"{self.decoder_name}.{layer}.{n}" for n in names]

    @cached_property
    def image_token_id(self) -> int:
        """The placeholder token's id. Raises ConfigError if the configuration names none."""
        for key in ("image_token_id", "image_token_index"):
            value = getattr(self.config, key, None)
            if isinstance(value, int):
                return value
        raise ConfigError(f"the configuration of this {self.model_type} names no image token")

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """The ids that stand for pieces of images and videos. Raises ConfigError as `image_token_id`."""
        found = (getattr(self.config, key, None) for key in ("video_token_id", "video_token_index"))
        return (self.image_token_id, *(i for i in found if isinstance(i, int) and i != self.image_token_id))

    @cached_property
    def pad_token_id(self) -> int:
        """The id to pad with."""
        return pad_token_id(self.processor.tokenizer)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: generation_config's, else the tokenizer's."""
        ids = getattr(self.base.generation_config, "eos_token_id", None)
        ids = self.processor.tokenizer.eos_token_id if ids is None else ids
        if ids is None:
            raise ConfigError(
                f"neither {self.name_or_path} nor its tokenizer names a token that ends an answer"
            )
        return tuple(ids) if isinstance(ids, Iterable) else (int(ids),)

    # --- prompts -------------------------------------------------------------------------------

    def prompt(
        self, question: str, images: Sequence[Any] = (), videos: Sequence[Sequence[Any]] = ()
    ) -> Prompt:
        """`images` (PIL), then `videos` (each a list of PIL frames of one size), then `question` as one user
        turn with the generation prompt.

        Raises:
            ConfigError: they cannot be found among the tokens, or this family's videos are not supported.
            RowError: the processor cannot encode it.
        """
        message = user_message(question, len(images), videos=len(videos))
        return self.prompt_of([message], images, videos)

    def prompt_of(
        self, messages: Sequence[Message], images: Sequence[Any], videos: Sequence[Sequence[Any]] = ()
    ) -> Prompt:
        """A conversation that waits for an answer, as training would encode it. Errors as `prompt`."""
        encoded = self.encoder.encode_prompt(messages, list(images), videos)
        return self.located(encoded.inputs, len(images) + len(videos), encoded.places)

    def located(self, inputs: dict[str, torch.Tensor], images: int, places: Sequence[Place] = ()) -> Prompt:
        """`inputs` of one sample with the token span of each of its `images` images and videos, in the order
        of the prompt: from the first to the last placeholder, timestamps between frames included.
        `places`: where the encoder put them; without them each run of placeholders is an image.
        Raises ConfigError if they cannot be told apart, or if this family's videos are not supported."""
        filmed = "pixel_values_videos" in inputs or any(place.frames for place in places)
        if filmed and not (self.family.video and places):
            raise ConfigError(
                f"videos in a prompt of {self.model_type} are not supported",
                "give the frames as images, or use a family with videos (vfl_train/models/families)",
            )
        is_image = torch.isin(inputs["input_ids"][0], torch.tensor(self.placeholder_ids))
        # Not among the tokens: an empty span for each placeholder (see interventions.cross_attention).
        spans = [(0, 0)] * int(is_image.sum()) if self.family.cross_attention else _runs(is_image)
        if places:
            at = is_image.nonzero()[:, 0]
            inside = [at[(at >= place.start) & (at < place.stop)].tolist() for place in places]
            if all(inside) and sum(map(len, inside)) == len(at):
                spans = [(found[0], found[-1] + 1) for found in inside]
        if len(spans) != images:
            raise ConfigError(
                f"{images} images but {len(spans)} runs of image tokens in the prompt: "
                f"a {self.model_type} prompt of this form is not supported yet"
            )
        return Prompt(inputs, tuple(spans), tuple(self._grids(inputs, spans, places)))

    def _grids(
        self, inputs: dict[str, torch.Tensor], spans: Sequence[tuple[int, int]], places: Sequence[Place]
    ) -> list[tuple[int, ...]]:
        """What must be equal for two images or videos to be swapped: the number of frames, the processor's
        grid, else the tiles the family says, else the number of tokens and which are not placeholders."""
        rows = {kind: inputs[f"{kind}_grid_thw"].tolist() for kind in KINDS if f"{kind}_grid_thw" in inputs}
        if rows and not places:
            return [tuple(row) for row in rows["image"]]
        if rows:
            left = {kind: iter(found) for kind, found in rows.items()}
            return [
                (place.frames, *next(left["video"])) if place.frames else tuple(next(left["image"]))
                for place in places
            ]
        if "aspect_ratio_ids" in inputs:
            return [(ratio,) for ratio in inputs["aspect_ratio_ids"][0].tolist()]
        ids = inputs["input_ids"][0]
        grids: list[tuple[int, ...]] = []
        for start, stop in spans:
            inside = ids[start:stop]
            others = (~torch.isin(inside, torch.tensor(self.placeholder_ids))).nonzero()[:, 0]
            grids.append((stop - start, *torch.stack([others, inside[others]], 1).flatten().tolist()))
        images = sum(not place.frames for place in places)
        for n, place in enumerate(places):
            if place.frames:
                grids[n] = (place.frames, *grids[n])
            elif self.family.tiles is not None:
                grids[n] = (*grids[n], *self.family.tiles(self.processor, place.size, images))
        return grids

    def decode(self, tokens: Sequence[int]) -> str:
        """Answer text without special tokens."""
        return self.processor.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()


def _runs(mask: torch.Tensor) -> list[tuple[int, int]]:
    """[start, stop) of each run of True in a 1-D mask."""
    padded = torch.nn.functional.pad(mask.int(), (1, 1))
    change = padded.diff()
    starts, stops = (change == 1).nonzero()[:, 0].tolist(), (change == -1).nonzero()[:, 0].tolist()
    return list(zip(starts, stops, strict=True))


def find_layers(model: PreTrainedModel, depth: int) -> tuple[str, nn.ModuleList]:
    """Name and list of the text decoder's layers: the `layers` of the module that transformers calls the
    decoder. Raises ConfigError where there is no such list of the configured depth."""
    decoder = model.get_decoder()
    decoder = decoder if hasattr(decoder, "layers") else getattr(decoder, "model", None)  # below its head
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != depth:
        raise ConfigError(f"cannot find the {depth} decoder layers of {type(model).__name__}")
    name = next(n for n, module in model.named_modules() if module is layers)
    return name, layers


def _lora_layer() -> type:
    """PEFT's wrapper of an adapted linear (so that plans can be made of a model with an adapter on it)."""
    from peft.tuners.lora import LoraLayer

    return LoraLayer

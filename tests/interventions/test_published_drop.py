"""Visual token dropping as published, written a second time.

The definition (arXiv 2509.24791 and its authors' code): from layer k to the last, the K and V of the image's
tokens are not there for any query after the image; the queries of all tokens stay, and so do the positions.
The decoder below is plain arithmetic in float64 on the weights of a random Qwen2.5-VL; keys are taken away by
indexing, nothing is masked, and nothing of vfl_train is used.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import Image
from tiny_models import LAYERS, tiny_vlm

from vfl_train.interventions import Row, drop, read_out

ANSWER = (7, 11, 5)


class Decoder:
    """Qwen2.5-VL's text decoder over one sequence, from a state dict."""

    def __init__(self, model) -> None:
        config = model.config.get_text_config()
        prefix = "model.language_model."
        self.w = {k.removeprefix(prefix): v.double() for k, v in model.state_dict().items()}
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = config.hidden_size // self.heads
        self.eps, self.rope = config.rms_norm_eps, config.rope_parameters

    def norm(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.w[f"{name}.weight"]

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0)

    def rotate(self, x, positions):
        """x [T, heads, size]; positions [3, T] in time, height and width, each for its share of the pairs."""
        half = self.size // 2
        axis = [a for a, count in enumerate(self.rope["mrope_section"]) for _ in range(count)]
        frequency = self.rope["rope_theta"] ** (-torch.arange(half).double() / half)
        angle = positions.double()[axis].T * frequency  # [T, half]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def logits(self, x, positions, span, first_dropped):
        """x [T, D] embeddings, span [start, stop) of the image -> [T, V]."""
        start, stop = span
        for k in range(LAYERS):
            name = f"layers.{k}."
            h = self.norm(x, name + "input_layernorm")
            q, key, value = (
                self.linear(h, f"{name}self_attn.{p}_proj").view(len(x), -1, self.size) for p in "qkv"
            )
            q, key = self.rotate(q, positions), self.rotate(key, positions)
            mixed = []
            for t in range(len(x)):
                there = [
                    j for j in range(t + 1) if not (k >= first_dropped and t >= stop and start <= j < stop)
                ]
                for head in range(self.heads):
                    group = head * self.kv_heads // self.heads
                    weight = (key[there, group] @ q[t, head] / self.size**0.5).softmax(0)
                    mixed.append(weight @ value[there, group])
            x = x + self.linear(torch.cat(mixed).view(len(x), -1), name + "self_attn.o_proj")
            h = self.norm(x, name + "post_attention_layernorm")
            gate = torch.nn.functional.silu(self.linear(h, name + "mlp.gate_proj"))
            x = x + self.linear(gate * self.linear(h, name + "mlp.up_proj"), name + "mlp.down_proj")
        return self.norm(x, "norm") @ self.w["lm_head.weight"].T


@pytest.fixture(scope="module")
def prompt():
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return tiny_vlm("qwen2_5_vl").prompt("what text is written here ?", [Image.fromarray(pixels.numpy())])


@torch.no_grad()
def published(prompt, first_dropped: int) -> torch.Tensor:
    """[answer tokens, V] logits that predict ANSWER after the prompt."""
    model = tiny_vlm("qwen2_5_vl").model
    inputs, ids = prompt.inputs, torch.cat([prompt.inputs["input_ids"], torch.tensor([ANSWER])], 1)
    kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, len(ANSWER), dtype=torch.long)], 1)
    positions, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=inputs["image_grid_thw"])
    decoder = Decoder(model)
    x = decoder.w["embed_tokens.weight"][ids[0]]
    features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    x[ids[0] == model.config.image_token_id] = torch.cat(list(features)).double()
    start = prompt.length - 1
    return decoder.logits(x, positions[:, 0], prompt.spans[0], first_dropped)[start : start + len(ANSWER)]


@pytest.mark.parametrize("first_dropped", range(LAYERS + 1))
def test_our_drop_is_the_published_one(prompt, first_dropped):
    vlm, expected, seen = tiny_vlm("qwen2_5_vl"), published(prompt, first_dropped), []
    handle = vlm.base.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        row = Row(prompt, ANSWER, drop(range(first_dropped, LAYERS)))
        (found,) = read_out(vlm, [row], "reference")
    finally:
        handle.remove()
    torch.testing.assert_close(seen[0].double(), expected, atol=2e-5, rtol=1e-5)
    wanted = expected.log_softmax(-1).gather(1, torch.tensor(ANSWER)[:, None])[:, 0].tolist()
    assert found.logprobs == pytest.approx(wanted, abs=2e-5)
    (engine,) = read_out(vlm, [row], "engine")
    assert engine.logprobs == pytest.approx(wanted, abs=2e-5)


def test_each_layer_makes_a_difference(prompt):
    levels = [published(prompt, k) for k in range(LAYERS + 1)]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(levels))

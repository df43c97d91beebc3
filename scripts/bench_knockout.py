"""What a knockout sweep costs, sharing what lies below each layer, against one plain forward a branch.

    python scripts/bench_knockout.py [--layers 28] [--width 256] [--tokens 300] [--repeats 5]

A random Qwen2.5-VL on the CPU, one thread; rows are the base and one branch a layer. Prints
a Markdown table: token-layers executed, process time of the CPU (the smallest of the repeats; others may use
the machine, too) and both as plain forwards of the decoder. `shared, tight` has room for four rows at a time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vfl_train.interventions import Branch, Prompt, Row, knockout, read_out, rerun, uniform
from vfl_train.interventions.readout import Cost
from vfl_train.models import VisionLanguageModel
from vfl_train.phantom.architecture import build_processor

ANSWER = (7, 9)
KINDS: dict[str, Callable[[list[int]], Branch]] = {
    "knockout": knockout, "uniform": uniform, "rerun at the end": rerun,
    "rerun of itself": lambda layers: rerun(layers, "itself"),
}  # fmt: skip


def random_model(layers: int, width: int) -> VisionLanguageModel:
    """A Qwen2.5-VL with the phantom's vocabulary and no vision worth the name."""
    processor = build_processor()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer), "hidden_size": width, "intermediate_size": 3 * width,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4,
                "mrope_section": [width // 32, width // 32, width // 8 - 2 * (width // 32)],
            },
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 8,
            "spatial_merge_size": 1, "temporal_patch_size": 1, "out_hidden_size": width,
            "fullatt_block_indexes": [0], "window_size": 64,
        },
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=processor.tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=processor.tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=processor.tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )  # fmt: skip
    torch.manual_seed(0)
    return VisionLanguageModel(Qwen2_5_VLForConditionalGeneration(config), processor, "random")


def measured(vlm: VisionLanguageModel, rows: list[Row], repeats: int, **settings) -> tuple[Cost, float]:
    """What one sweep executes and its shortest CPU process time in seconds."""
    best, cost = float("inf"), Cost()
    for _ in range(repeats):
        cost, start = Cost(), time.process_time()
        list(read_out(vlm, rows, cost=cost, **settings))
        best = min(best, time.process_time() - start)
    return cost, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    vlm = random_model(arguments.layers, arguments.width)
    ids = torch.arange(arguments.tokens)[None] % 40 + 20
    prompt = Prompt({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, (), ())
    plain, seconds = measured(vlm, [Row(prompt, ANSWER)], arguments.repeats, path="reference")
    unit = plain.token_layers + plain.last_layer_tokens
    room = 4 * (arguments.tokens + len(ANSWER))
    print(f"{arguments.layers} layers, {arguments.tokens} tokens; a plain forward: {seconds:.3f} s of CPU\n")
    print("| sweep | how | token-layers, forwards | CPU, s | CPU, forwards |")
    print("|---|---|---|---|---|")
    for kind, branch_of in KINDS.items():
        rows = [Row(prompt, ANSWER), *(Row(prompt, ANSWER, branch_of([k])) for k in range(arguments.layers))]
        for how, settings in (
            ("one forward a branch", {"path": "reference", "batch_tokens": 1}),
            ("shared", {"path": "engine", "batch_tokens": 10**9}),
            ("shared, tight", {"path": "engine", "batch_tokens": room}),
        ):
            cost, cpu = measured(vlm, rows, arguments.repeats, **settings)
            executed = (cost.token_layers + cost.last_layer_tokens) / unit
            print(f"| {kind} | {how} | {executed:.1f} | {cpu:.2f} | {cpu / seconds:.1f} |", flush=True)
            assert not (cost.reference_rows and how != "one forward a branch"), cost.reasons


if __name__ == "__main__":
    main()

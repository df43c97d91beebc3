#!/usr/bin/env bash
# The VFL paper's VFL-LoRA results (arXiv 2509.24791) measured again: LoRA on the function layers against LoRA on all
# layers and on the others ("reversed"), in domain and outside.
#
#   DATA=sat.jsonl CVBENCH=cvbench.jsonl CHARTQA=chartqa.jsonl POPE=pope.jsonl scripts/reproduce_lora.sh     GPUs
#   MODEL=phantom DATA=rows.jsonl FUNCTIONS=ocr PAIRS=20 STEPS=2 OUTPUT=/tmp/smoke scripts/reproduce_lora.sh  a try
#
# DATA is your training file (the authors trained on SAT, spatial questions; their file is not public). Benchmarks are
# files of yours, one question and one answer a row; those you leave unset are skipped. With lmms-eval installed,
# `lmms-eval --model vfl --model_args pretrained=$MODEL,adapter=$OUTPUT/lora-vfl --tasks cv_bench,chartqa,pope` runs
# the benchmarks with their own prompts and metrics instead.
#
# What the authors report for Qwen2.5-VL-7B (by way of a public note on the paper):
#
#                     parameters  CV-Bench count  CV-Bench  ChartQA  MMMU   POPE   outside, average
#       base               -           68.0         82.1     83.2    50.7   86.1        -
#       all layers       1.9 %         70.9         84.4     86.2    50.1   86.6       74.3
#       function layers  0.9 %         72.6         85.0     86.4    51.7   86.9       75.0
#       the others       0.9 %         69.0         82.7     85.9    51.2   84.9        -
#
# R15: function layers beat all layers in domain and outside, at half the parameters. R16: the order function layers,
# all, the others, base on CV-Bench count. The shape is what to compare; the height depends on the data.
#
# Where ours differs:
# - Layers: the authors typed theirs by hand; for spatial reasoning 10-17 and 20-23 of 28, which is 12 layers, while
#   their adapter's size says 14. LAYERS=10-17,20-23 takes the published ones; without it they come from a profile.
# - Adapter: their script has rank 64, alpha 64, dropout 0.05, learning rate 2e-4, 128 rows a step, one pass, on the
#   3B; these are the settings below. Weight decay 0.1 and ZeRO-3 as there.
# - "Reversed" here is as many layers outside the plan, the farthest first. With 14 of 28 it is the other half.
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}
REVISION=${REVISION:-}             # a commit, to be able to repeat it
DATA=${DATA:?give the training rows as DATA=FILE}
OUTPUT=${OUTPUT:-reproduce-lora}
FUNCTIONS=${FUNCTIONS:-count,relation}
LAYERS=${LAYERS:-}                 # 10-17,20-23: the published ones, in place of the profile's
PROFILE=${PROFILE:-}               # a profile.json that is there already
PAIRS=${PAIRS:-100}
ARMS=${ARMS:-vfl all reversed}
STEPS=${STEPS:--1}                 # optimizer steps; -1: one pass
ROWS_A_STEP=${ROWS_A_STEP:-128}
ROWS_A_DEVICE=${ROWS_A_DEVICE:-4}
PROCESSES=${PROCESSES:-}           # one a GPU if empty
MAX_PIXELS=${MAX_PIXELS-1003520}   # 1280 x 28 x 28
SEED=${SEED:-0}
CVBENCH=${CVBENCH:-} CHARTQA=${CHARTQA:-} MMMU=${MMMU:-} POPE=${POPE:-}

model=(--model "$MODEL" --seed "$SEED")
[ -z "$REVISION" ] || model+=(--revision "$REVISION")
[ "${MODEL#phantom}" != "$MODEL" ] || [ -z "$MAX_PIXELS" ] || model+=(--max-pixels "$MAX_PIXELS")

if [ -z "$LAYERS" ] && [ -z "$PROFILE" ]; then
    vfl-train profile "${model[@]}" --functions "$FUNCTIONS" --pairs "$PAIRS" --output "$OUTPUT/profile"
    PROFILE=$OUTPUT/profile/profile.json
fi
where=(--profile "$PROFILE" --functions "$FUNCTIONS")
[ -z "$LAYERS" ] || where=(--layers "$LAYERS")

processes=${PROCESSES:-$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)}
[ "$processes" -gt 0 ] || processes=1
accumulate=$((ROWS_A_STEP / (ROWS_A_DEVICE * processes)))
[ "$accumulate" -gt 0 ] || accumulate=1

measure() { # ARM NAME MATCH FILE
    [ -n "$4" ] || return 0
    vfl-train eval "${model[@]}" --adapter "$OUTPUT/lora-$1" --data "$4" --match "$3" --output "$OUTPUT/$2-$1"
}

for arm in $ARMS; do
    control=()
    [ "$arm" = vfl ] || control=(--control "$arm")
    vfl-train lora "${model[@]}" "${where[@]}" "${control[@]}" --data "$DATA" --output "$OUTPUT/lora-$arm" \
        --lora-r 64 --lora-alpha 64 --lora-dropout 0.05 --learning-rate 2e-4 --weight-decay 0.1 --max-steps "$STEPS" \
        --per-device-train-batch-size "$ROWS_A_DEVICE" --gradient-accumulation-steps "$accumulate" \
        --num-processes "$processes"
    # Forgetting, function by function, on the probes: the base's accuracy stands beside the adapter's.
    vfl-train eval "${model[@]}" --adapter "$OUTPUT/lora-$arm" --pairs "$PAIRS" --output "$OUTPUT/probes-$arm"
    measure "$arm" cvbench choice "$CVBENCH"
    measure "$arm" chartqa exact "$CHARTQA"
    measure "$arm" mmmu choice "$MMMU"
    measure "$arm" pope choice "$POPE"
done

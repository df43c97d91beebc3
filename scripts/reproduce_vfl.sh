#!/usr/bin/env bash
# The VFL paper's layer and dropping results (arXiv 2509.24791) measured again on Qwen2.5-VL-7B-Instruct:
# which layer reads which function (profile), and what is left when the image is dropped from a layer on (eval).
#
#   TEXTVQA=textvqa.jsonl POPE=pope.jsonl scripts/reproduce_vfl.sh        on a GPU (17 GB of weights)
#   MODEL=phantom PAIRS=4 DROP_FROM=11,10,6 OUTPUT=/tmp/smoke scripts/reproduce_vfl.sh      a try on the CPU
#
# Each benchmark is a file of yours (not ours to give away): messages, ShareGPT or LLaVA rows as .json or .jsonl,
# one question and one answer a row, with the benchmark's own prompt ("Answer with a single word or phrase.",
# "Answer with the option's letter."), and image paths relative to the file. Those you leave unset are skipped.
#
# What the authors report. [PN]: numbers of the paper by way of a public note on it; [RB]: its public review
# discussion; [ABS]: its abstract. Layers are 0-based, of 28.
#
#   R1  ocr          peak at layer 22, 92.8 % changed, elsewhere about 0 %                          [RB, PN]
#   R2  grounding    peak at layer 18, 100 %, elsewhere below 5 %                                   [RB, PN]
#   R3  count        peak at layer 14 [RB] or 12 [PN] (they disagree), 87.4 %, elsewhere below 5 %
#   R4  recognition  plateau 0-8 [RB] or 0-10 [PN], up to 90 %, elsewhere 37 % on average
#   R5  emotion      peak at layer 10, 91 %; relation: layer 20, 81.5 %, elsewhere 7 %              [RB]
#   R6  the order recognition < count < grounding < ocr, in every model                             [ABS]
#
#                                 -      R7       R8       R9
#       image dropped in the    none   last 4   last 8   last 12
#       that is --drop-from       -      24       20       16     (28 layers: from layer 28 - N)
#       TextVQA                 82.8    74.1     15.3     13.8                                      [PN]
#       OCRBench                82.2    76.3      5.5      3.7                                      [PN]
#       ChartQA                 83.2    82.7     20.5     17.4                                      [PN]
#       POPE                    86.1    86.3     86.2     79.5                                      [PN]
#       SQA-I                   87.2    87.4     87.4     87.2                                      [PN]
#
# R10 and R11 are the same command with other layers: DROP_FROM=18,12,6 on A-OKVQA (89.25; 88.94, 76.68, 57.90) and
# DROP_FROM=20,12 on CLEVR-Count (55.5; 55.0, 33.5) or 20 on TextOCR (46.5; 12.0) [RB], the file given as TEXTVQA.
#
# Where ours differs, so that equal numbers are not to be expected:
# - When (swap): in the question's tokens and in the answer's, as in the authors' hook. A swap after the prompt
#   is read could not change the first word of an answer; `--phase decode` measures that.
# - Whose queries: the text after the image reads the donor, the image's own tokens do not. The authors' hook
#   lets them, too, which mixes both pictures in all later layers.
# - Drop: the image is masked for the text after it, and what comes before it is left alone. In the authors'
#   hook the text before the image loses all it sees. Their file for "last 8" drops nothing on this model and
#   the one for 16, 18, 20 drops the last 8, 10, 12 (the depth of the 3B stands in it).
# - Probes: pictures of our own drawing; emotion with drawn faces in place of generated photos.
# - Scores: plain accuracy against one answer a row. TextVQA's ten annotators, OCRBench's "contains", ChartQA's
#   5 % and POPE's F1 are other measures: compare the fall along a row, not its height.
# - Models: transformers moved Qwen2.5-VL's scores after 4.54; the paper used 4.50.
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}
REVISION=${REVISION:-}        # a commit, to be able to repeat it
OUTPUT=${OUTPUT:-reproduce-vfl}
FUNCTIONS=${FUNCTIONS:-recognition,emotion,count,grounding,relation,ocr}
PAIRS=${PAIRS:-100}           # a function; below 20 answered ones nothing is concluded
DROP_FROM=${DROP_FROM:-24,20,16}
COMPUTE=${COMPUTE:-engine}    # or reference: one plain forward a branch, slower, equal within rounding
LIMIT=${LIMIT:-}              # rows a benchmark; all of them if empty
MAX_PIXELS=${MAX_PIXELS-1003520}   # 1280 x 28 x 28, as in the authors' trainings (of their tables it is not said); empty: no cap
# Files of questions, each optional.
TEXTVQA=${TEXTVQA:-} OCRBENCH=${OCRBENCH:-} CHARTQA=${CHARTQA:-} POPE=${POPE:-} SQA=${SQA:-}

model=(--model "$MODEL" --path "$COMPUTE")
[ -z "$REVISION" ] || model+=(--revision "$REVISION")
[ "${MODEL#phantom}" != "$MODEL" ] || [ -z "$MAX_PIXELS" ] || model+=(--max-pixels "$MAX_PIXELS")

drop() { # NAME MATCH FILE: R7-R9 of one benchmark, whose answers are the text alone or the option named first
    if [ -z "$3" ]; then
        printf '%s: skipped, give its file as %s=FILE\n' "$1" "$1"
        return
    fi
    printf '%s\n' "$1"
    vfl-train eval "${model[@]}" --data "$3" --match "$2" --drop-from "$DROP_FROM" ${LIMIT:+--limit "$LIMIT"} \
        --output "$OUTPUT/drop-$1"
}

# R1-R6: peaks, and by flip_block the layers that read a function together.
vfl-train profile "${model[@]}" --functions "$FUNCTIONS" --pairs "$PAIRS" --output "$OUTPUT/profile"

# The shape of R7-R9 on the probes themselves: each function falls when its layers are dropped, and none before.
vfl-train eval "${model[@]}" --functions "$FUNCTIONS" --pairs "$PAIRS" --drop-from "$DROP_FROM" \
    --output "$OUTPUT/drop-probes"

drop TEXTVQA exact "$TEXTVQA"
drop OCRBENCH exact "$OCRBENCH"
drop CHARTQA exact "$CHARTQA"
drop POPE choice "$POPE"
drop SQA choice "$SQA"

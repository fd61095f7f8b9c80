#!/usr/bin/env bash
# Pretrains a small model on TinyStories, from the download to a generated story. Each stage is one command, and the
# script skips a stage that is already done. After an interruption, the same command resumes it.
#
#   scripts/pretrain_tinystories.sh
#       a 6-layer model (384 channels), one pass over the data
#   scripts/pretrain_tinystories.sh --layers 4 --channels 128 --steps 2000
#       more options of train_gpt, which override those below
#
# DATA and RUN in the environment name other directories for the data and the run.
set -euo pipefail
self=$(readlink -f -- "$0")
# shellcheck source=scripts/shared.sh
. "${self%/*}/shared.sh"
cd "$top"
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    usage
    exit 0
fi
data=${DATA:-data/tinystories}
output=${RUN:-runs/tinystories}
path data
path output
literal_pattern "$data/stories"
resumes="the same line goes on from there"
take_signals

scripts/install.sh
run make tokenizer train

run scripts/download_tinystories.sh "$data"
train=$data/TinyStoriesV2-GPT4-train.txt valid=$data/TinyStoriesV2-GPT4-valid.txt

# Simple English needs only a small vocabulary, and the tokenizer learns it from the first 100 MB.
if [ ! -e "$data/tokenizer.json" ]; then
    run build/tokenizer train --vocab-size 4096 --max-bytes 100000000 --separator '<|endoftext|>' -o "$data/tokenizer.json" "$train"
fi
# This empty file marks that all shards are complete.
if [ ! -e "$data/prepared" ]; then
    run build/tokenizer prepare -t "$data/tokenizer.json" --separator '<|endoftext|>' --output-prefix "$data/stories" \
        --validation "$valid" "$train"
    touch "$data/prepared"
fi

command=(build/train_gpt -i "${literal}_train_*.bin" -j "${literal}_val_*.bin" --tokenizer "$data/tokenizer.json"
    --layers 6 --channels 384 --heads 6 --kv-heads 2 -t 512 -b 8 -d 32768
    -l 1e-3 -u 200 -k cosine -v 250 -m 10 -s 500 -n 250 --keep 2 --prompt "Once upon a time"
    --temperature 0.8 --output "$output")

# After a failure, or a kill by the system, the run resumes from its last checkpoint.
run scripts/restart.sh "${command[@]}" "$@"

run build/train_gpt --generate --init-from "$output" --prompt "Once upon a time" --sample-length 200 --temperature 0.8 --top-k 50

#!/usr/bin/env bash
# The scripts as a user calls them, on tiny texts: make's choice of the device, gpu-check without a GPU, quickstart with good and bad texts, the download from a server of its own,
# the recipe from download to story. In cmocka's words, so that scripts/run_tests.sh counts them. A minute or two; used by
# make test-long.
# shellcheck disable=SC2317 # the functions are called by way of check()
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
top=$PWD
scratch=$(mktemp -d)
server=""
trap 'if [ -n "$server" ]; then kill "$server" 2>/dev/null; fi; rm -rf "$scratch"' EXIT
failed=0

check() { # name, command...
    local name=$1
    shift
    echo "[ RUN      ] $name"
    if "$@" >"$scratch/output" 2>&1; then
        echo "[       OK ] $name"
    else
        tail -n 20 "$scratch/output"
        echo "[  FAILED  ] $name"
        failed=1
    fi
}

# The command must fail with this exit code and one line that holds the text.
refuses() { # exit code, text, command...
    local wanted=$1 text=$2 status=0
    shift 2
    "$@" >"$scratch/refused" 2>"$scratch/errors" || status=$?
    echo "$* : exit code $status"
    cat "$scratch/errors"
    [ "$status" -eq "$wanted" ] && [ "$(wc -l <"$scratch/errors")" -eq 1 ] && grep -qF -- "$text" "$scratch/errors"
}

# ----------------------------------------------------------------------------
# The device that make chooses, with tools of our own on the path: a machine that has a GPU, and one that has none.

mkdir "$scratch/gpu" "$scratch/none"
printf '#!/bin/sh\necho "GPU 0: of a test"\n' >"$scratch/gpu/nvidia-smi"
printf '#!/bin/sh\nexit 9\n' >"$scratch/none/nvidia-smi"
chmod +x "$scratch"/*/nvidia-smi

# What `make -n` of these flags builds and why, or how it refuses.
chosen() { # gpu or none, text, flags...
    local path=$scratch/$1 text=$2
    shift 2
    PATH=$path:$PATH make -n BUILD="$scratch/nowhere" "$@" >"$scratch/chosen" 2>&1
    grep -F -- "train_gpt ->" "$scratch/chosen" || tail -n 1 "$scratch/chosen"
    grep -qF -- "$text" "$scratch/chosen"
}
devices() {
    chosen none "train_gpt_cpu_dense_gqa_kconv0_fp32 (no nvcc here)" NVCC= &&
        chosen gpu "train_gpt_cpu_dense_gqa_kconv0_fp32 (no nvcc here)" NVCC= &&
        chosen none "train_gpt_cpu_dense_gqa_kconv0_fp32 (there is an nvcc, but no GPU answers nvidia-smi)" NVCC=nvcc &&
        chosen gpu "train_gpt_cuda_dense_gqa_kconv0_bf16 (nvcc and a GPU are here)" NVCC=nvcc &&
        chosen gpu "-arch=native" NVCC=nvcc V=1 &&
        chosen none "arch=compute_90,code=compute_90" NVCC=nvcc V=1 DEVICE=cuda &&
        chosen gpu "train_gpt_cuda_moba_gqa_kconv0_bf16 (nvcc and a GPU are here)" NVCC=nvcc ATTN=moba &&
        chosen gpu "train_gpt_cpu_dense_gqa_kconv0_fp64 (a GPU is here, but PRECISION=fp64" NVCC=nvcc PRECISION=fp64 &&
        chosen gpu "train_gpt_cuda_dense_gqa_kconv0_fp32 (nvcc" NVCC=nvcc PRECISION=fp32 &&
        chosen none "train_gpt_simt_dense_gqa_kconv0_bf16" DEVICE=simt &&
        chosen none "PRECISION=fp64: must be one of: bf16 fp32, with DEVICE=simt" DEVICE=simt PRECISION=fp64 &&
        chosen none "PRECISION=bf16: must be one of: fp32 fp64, with DEVICE=cpu" DEVICE=cpu PRECISION=bf16 &&
        chosen none "DEVICE=cuda: no nvcc here" DEVICE=cuda NVCC= &&
        chosen none "DEVICE=tpu: must be one of: cpu cuda simt" DEVICE=tpu
}
check make_chooses_the_device devices

gpu_check() {
    PATH=$scratch/none:$PATH refuses 2 "no GPU on this machine" scripts/gpu_check.sh &&
        refuses 2 "--now: unknown option" scripts/gpu_check.sh --now &&
        { scripts/gpu_check.sh --rehearse >"$scratch/rehearsal" || { grep -A 12 FAILED "$scratch/rehearsal" && return 1; }; } &&
        grep -q '^bf16 learns as fp32 does *ok' "$scratch/rehearsal" && ! grep -q FAILED "$scratch/rehearsal"
}
check gpu_check_says_what_is_missing_and_can_be_rehearsed gpu_check

# ----------------------------------------------------------------------------
# Quickstart, in a copy of the tree: the results of the user's own stay as they are.

mkdir "$scratch/tree"
git ls-files -z | xargs -0 cp --parents -t "$scratch/tree"
[ ! -d build ] || cp -a build "$scratch/tree/build"
seq -f "The number %g comes before the number that follows it." 1 1700 >"$scratch/small text.txt"
: >"$scratch/empty.txt"
head -c 9000 "$scratch/small text.txt" >"$scratch/short.txt"
head -c 50000 /dev/zero >"$scratch/binary"

quickstart() { (cd "$scratch" && tree/scripts/quickstart.sh "$@"); }

bad_texts() {
    refuses 1 "missing.txt: no such file" quickstart --text missing.txt &&
        refuses 1 "is empty" quickstart --text empty.txt &&
        refuses 1 "not a regular file" quickstart --text tree &&
        refuses 1 "not a text file" quickstart --text binary &&
        refuses 1 "10000 are the least" quickstart --text short.txt &&
        refuses 2 "needs at least one file" quickstart --text &&
        refuses 2 "want a number" quickstart --minutes soon &&
        refuses 2 "unknown option" quickstart --fast &&
        [ ! -e "$scratch/tree/quickstart" ]
}
check quickstart_refuses_bad_texts bad_texts

small_text() {
    quickstart --text "small text.txt" --minutes 0.3 || return 1
    local out=$scratch/tree/quickstart/01
    [ "$(wc -l <"$out/table.txt")" -eq 6 ] && [ -s "$out/loss.png" ] && [ -s "$out/loss.svg" ] && [ -s "$out/sample.txt" ] &&
        ! grep -q nan "$out/table.txt"
}
check quickstart_on_a_small_text small_text

second_time() {
    cp -a "$scratch/tree/quickstart/01" "$scratch/before"
    quickstart --text "small text.txt" --minutes 0.2 && diff -r "$scratch/before" "$scratch/tree/quickstart/01" &&
        [ -s "$scratch/tree/quickstart/02/table.txt" ]
}
check quickstart_keeps_earlier_results second_time

# ----------------------------------------------------------------------------
# Comparison, with the tokenizer and the shards that quickstart made

# compare STEPS DIR OPTION...: two variants, two seeds, the smallest model.
compare() {
    local data=$scratch/tree/quickstart/01
    exec "$scratch/tree/scripts/compare.sh" --train-data "$data/text_train_*.bin" --val-data "$data/text_val_*.bin" \
        --tokenizer "$data/tokenizer.json" --steps "$1" --output "$scratch/$2" "${@:3}" \
        -- --layers 1 --channels 32 --heads 2 --kv-heads 1 -t 64 -b 2 --val-batches 2
}

compare_usage() {
    refuses 2 "no such variant; there are: dense" "$top/scripts/compare.sh" --train-data x --val-data x --tokenizer x --steps 5 \
        --output "$scratch/never" --variants sparse &&
        refuses 2 "--steps 0" "$top/scripts/compare.sh" --train-data x --val-data x --tokenizer x --output "$scratch/never" --steps 0 &&
        refuses 2 "want 'name|flags" "$top/scripts/compare.sh" --train-data x --val-data x --tokenizer x --steps 5 \
            --output "$scratch/never" --variant 'kconv' &&
        refuses 2 "--seed: not after --" "$top/scripts/compare.sh" --train-data x --val-data x --tokenizer x --steps 5 \
            --output "$scratch/never" -- --seed 3 &&
        refuses 2 "unknown option" "$top/scripts/compare.sh" --fast && [ ! -e "$scratch/never" ]
}
check compare_refuses_bad_usage compare_usage

compare_table() {
    local out=$scratch/compared
    (compare 20 compared --seeds 2) || return 1
    [ "$(wc -l <"$out/table.md")" -eq 6 ] && [ "$(grep -c '"name"' "$out/table.json")" -eq 4 ] &&
        [ -s "$out/loss.png" ] && [ -s "$out/loss.svg" ] && ! grep -qiE 'nan|inf\b' "$out/table.md" "$out/table.json" || return 1
    # Again: nothing is trained, and the table is the same. With another seed: that alone is.
    cp -a "$out" "$scratch/compared before"
    (compare 20 compared --seeds 2) >"$scratch/again" && [ "$(grep -c 'finished before' "$scratch/again")" -eq 8 ] &&
        diff -r -x '*.png' -x '*.svg' -x build.log "$out" "$scratch/compared before" || return 1
    (compare 20 compared --seeds 3 --variants dense moba) >"$scratch/again" &&
        [ "$(grep -c 'finished before' "$scratch/again")" -eq 4 ] && [ "$(wc -l <"$out/table.md")" -eq 4 ] || return 1
    # What was begun with other options is not gone on with.
    refuses 1 "was begun with other options" compare_in_a_shell 30 compared --seeds 2
}
compare_in_a_shell() { (compare "$@"); }
check compare_makes_a_table_and_runs_nothing_twice compare_table

compare_killed() {
    local out=$scratch/killed script steps moment signal most
    # Interrupted in the middle of the second variant, then killed there with all its processes: the first is not run again,
    # the second goes on from its checkpoint.
    compare_in_a_shell 1000 killed --seeds 1 --variants dense kdgqa >"$scratch/whole" || return 1
    mv "$out" "$scratch/whole run"
    for moment in "TERM 100" "KILL 400"; do
        read -r signal most <<<"$moment"
        (compare 1000 killed --seeds 1 --variants dense kdgqa) &
        script=$!
        for _ in $(seq 1 600); do
            steps=$(grep -c step_ms "$out/kdgqa/seed_1337/timings.jsonl" 2>/dev/null)
            [ "${steps:-0}" -lt "$most" ] || break
            sleep 0.05
        done
        kill -"$signal" "$script"
        if [ "$signal" = KILL ]; then pkill -KILL -f "$out/kdgqa/seed_1337"; fi
        wait "$script" && return 1
        [ ! -e "$out/table.md" ] || return 1
    done
    compare_in_a_shell 1000 killed --seeds 1 --variants dense kdgqa >"$scratch/again" || return 1
    grep -q 'dense, seed 1337: finished before' "$scratch/again" && grep -q '^resuming' "$out/kdgqa/seed_1337.log" &&
        cmp "$out/kdgqa/seed_1337/metrics.jsonl" "$scratch/whole run/kdgqa/seed_1337/metrics.jsonl"
}
check compare_goes_on_after_an_interruption compare_killed

# ----------------------------------------------------------------------------
# Download and recipe, from a server on this machine

mkdir "$scratch/site"
for i in $(seq 1 2000); do
    echo "Once upon a time there were $i little cats. They saw $((i * 7 % 13)) dogs and were happy."
    echo "<|endoftext|>"
done >"$scratch/site/TinyStoriesV2-GPT4-train.txt"
head -n 200 "$scratch/site/TinyStoriesV2-GPT4-train.txt" >"$scratch/site/TinyStoriesV2-GPT4-valid.txt"
if ! command -v python3 >/dev/null || ! command -v curl >/dev/null; then
    echo "SKIPPED: downloads are not tested, since python3 or curl is missing"
    exit $failed
fi
python3 -u -m http.server 0 --bind 127.0.0.1 --directory "$scratch/site" >"$scratch/server" 2>&1 &
server=$!
for _ in $(seq 1 50); do
    grep -q 'port [0-9]' "$scratch/server" && break
    sleep 0.1
done
TINYSTORIES_URL=http://127.0.0.1:$(sed -n 's/.* port \([0-9]*\).*/\1/p' "$scratch/server" | head -n 1)
export TINYSTORIES_URL

download() {
    "$top/scripts/download_tinystories.sh" "$scratch/data" || return 1
    # Cut off, and with a server that cannot go on in the middle of a file.
    rm "$scratch/data/TinyStoriesV2-GPT4-train.txt"
    head -c 1000 "$scratch/site/TinyStoriesV2-GPT4-valid.txt" >"$scratch/data/TinyStoriesV2-GPT4-train.txt.partial"
    "$top/scripts/download_tinystories.sh" "$scratch/data" || return 1
    diff -r "$scratch/site" "$scratch/data"
}
check download download

lost() {
    TINYSTORIES_URL=$TINYSTORIES_URL/nowhere "$top/scripts/download_tinystories.sh" "$scratch/other" && return 1
    [ -z "$(ls "$scratch/other")" ]
}
check download_of_what_is_not_there lost

recipe() {
    export DATA=$scratch/data RUN=$scratch/run
    (cd "$scratch/tree" && scripts/pretrain_tinystories.sh --layers 2 --channels 64 --heads 2 --kv-heads 1 -t 64 -b 8 -d 512 \
        --steps 20 -u 2 -v 10 -n 10) || return 1
    [ -s "$scratch/run/step_00000020/model.safetensors" ]
}
check recipe_from_download_to_story recipe

exit $failed

#!/usr/bin/env bash
# Tests the scripts as a user calls them, on tiny texts: make's choice of the device, gpu-check without a GPU,
# quickstart with good and bad texts, comparisons and plots, the download from a local server, and the recipe
# from download to story. The output has cmocka's format, so that scripts/run_tests.sh counts the tests. It takes
# a minute or two; make test-long runs it.
# shellcheck disable=SC2317 # check() calls the functions
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

# Waits until the command succeeds, however slow the machine is. Fails after ten minutes, or when the process has ended.
wait_for() { # process, command...
    local deadline=$((SECONDS + 600))
    until "${@:2}"; do
        if [ "$SECONDS" -ge "$deadline" ] || ! kill -0 "$1" 2>/dev/null; then return 1; fi
        sleep 0.05
    done
}

# Succeeds if no process has this working directory.
no_process_in() { # directory
    local process
    for process in /proc/[0-9]*; do
        if [ "$(readlink "$process/cwd" 2>/dev/null)" = "$1" ]; then return 1; fi
    done
}

# The command must fail with this exit code, and print one line that contains the text.
refuses() { # exit code, text, command...
    local wanted=$1 text=$2 status=0
    shift 2
    "$@" >"$scratch/refused" 2>"$scratch/errors" || status=$?
    echo "$* : exit code $status"
    cat "$scratch/errors"
    [ "$status" -eq "$wanted" ] && [ "$(wc -l <"$scratch/errors")" -eq 1 ] && grep -qF -- "$text" "$scratch/errors"
}

# ----------------------------------------------------------------------------
# The device that make chooses. The test puts its own nvidia-smi on the path, for a machine
# with a GPU and for one without.

mkdir "$scratch/gpu" "$scratch/none"
printf '#!/bin/sh\necho "GPU 0: of a test"\n' >"$scratch/gpu/nvidia-smi"
printf '#!/bin/sh\nexit 9\n' >"$scratch/none/nvidia-smi"
chmod +x "$scratch"/*/nvidia-smi

# Checks the text that `make -n` prints with these flags: the program and the reason, or the refusal.
chosen() { # gpu or none, text, flags...
    local path=$scratch/$1 text=$2
    shift 2
    PATH=$path:$PATH make -n BUILD="$scratch/nowhere" "$@" >"$scratch/chosen" 2>&1
    grep -F -- "train_gpt ->" "$scratch/chosen" || tail -n 1 "$scratch/chosen"
    grep -qF -- "$text" "$scratch/chosen"
}
devices() {
    chosen none "train_gpt_cpu_fp32 (no nvcc here)" NVCC= &&
        chosen gpu "train_gpt_cpu_fp32 (no nvcc here)" NVCC= &&
        chosen none "train_gpt_cpu_fp32 (there is an nvcc, but no GPU answers nvidia-smi)" NVCC=nvcc &&
        chosen gpu "train_gpt_cuda_bf16 (nvcc and a GPU are here)" NVCC=nvcc &&
        chosen gpu "-arch=native" NVCC=nvcc V=1 &&
        chosen none "arch=compute_90,code=compute_90" NVCC=nvcc V=1 DEVICE=cuda &&
        chosen gpu "train_gpt_cuda_moba_gqa_kconv0_bf16 (nvcc and a GPU are here)" NVCC=nvcc ATTN=moba &&
        chosen gpu "train_gpt_cpu_fp64 (a GPU is here, but PRECISION=fp64" NVCC=nvcc PRECISION=fp64 &&
        chosen gpu "train_gpt_cuda_fp32 (nvcc" NVCC=nvcc PRECISION=fp32 &&
        chosen none "train_gpt_simt_bf16" DEVICE=simt &&
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
# Quickstart runs in a copy of the tree, so that the user's own results do not change.

mkdir "$scratch/tree"
git ls-files -z | xargs -0 cp -p --parents -t "$scratch/tree"
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

# A replacement for the trainer gives one variant a short limit. The table must have a star
# and a line for it, and the plot a note.
stopped_variant() {
    local real=$scratch/tree/build/train_gpt_cpu_fp32 out=$scratch/tree/quickstart/03 status=0
    mv "$real" "$real.real"
    printf '#!/bin/bash\nif [[ "$*" == *"--attention moba"*--warmup* ]]; then set -- "$@" --max-seconds 0.000001; fi\nexec %q "$@"\n' "$real.real" >"$real"
    chmod +x "$real"
    quickstart --text "small text.txt" --minutes 0.2 || status=$?
    mv "$real.real" "$real"
    cat "$out/table.txt"
    [ "$status" -eq 0 ] && grep -q '^moba \* ' "$out/table.txt" && grep -q '^dense  ' "$out/table.txt" &&
        grep -q '^\* moba was stopped at step [0-9]* of [0-9]*: not to be compared' "$out/table.txt" &&
        grep -q '>moba (only [0-9]* of [0-9]* steps)<' "$out/loss.svg" && grep -q '>dense<' "$out/loss.svg"
}
check quickstart_marks_a_variant_that_was_stopped stopped_variant

stopped_quickstart() {
    local script status signal
    for signal in HUP TERM; do
        (cd "$scratch" && exec env --default-signal=INT,HUP tree/scripts/quickstart.sh --text "small text.txt" --minutes 2) >"$scratch/stopped" 2>"$scratch/errors" &
        script=$!
        wait_for "$script" grep -q 'training dense' "$scratch/stopped" || return 1
        kill -"$signal" "$script"
        status=0
        wait "$script" || status=$?
        cat "$scratch/errors"
        [ "$status" -eq $((128 + $(kill -l "$signal"))) ] && [ "$(wc -l <"$scratch/errors")" -eq 1 ] &&
            grep -q "^quickstart.sh: ended by SIG$signal" "$scratch/errors" && wait_for $$ no_process_in "$scratch/tree" || return 1
    done
}
check quickstart_ends_by_a_signal stopped_quickstart

# ----------------------------------------------------------------------------
# Comparison, with the tokenizer and the shards that quickstart made

# compare STEPS DIR OPTION... compares variants of the smallest model.
compare() {
    local data=$scratch/tree/quickstart/01
    exec env --default-signal=INT,HUP "$scratch/tree/scripts/compare.sh" --train-data "$data/text_train_*.bin" --val-data "$data/text_val_*.bin" \
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
    # The second call trains nothing and gives the same table. With another seed, the script
    # trains only the cells of that seed.
    cp -a "$out" "$scratch/compared before"
    (compare 20 compared --seeds 2) >"$scratch/again" && [ "$(grep -c 'finished before' "$scratch/again")" -eq 8 ] &&
        diff -r -x '*.png' -x '*.svg' -x build.log -x lock "$out" "$scratch/compared before" || return 1
    (compare 20 compared --seeds 3 --variants dense moba) >"$scratch/again" &&
        [ "$(grep -c 'finished before' "$scratch/again")" -eq 4 ] && [ "$(wc -l <"$out/table.md")" -eq 4 ] || return 1
    # The script refuses to resume a cell that began with other options.
    refuses 1 "was begun with other options" compare_in_a_shell 30 compared --seeds 2
}
compare_in_a_shell() { (compare "$@"); }
check compare_makes_a_table_and_runs_nothing_twice compare_table

# Three variants are not comparable: one that its own limit stops, one with other tokens, and one with other
# sequences. The table marks all three, and the plot marks the first two.
compare_marks() {
    local out=$scratch/marked
    compare_in_a_shell 20 marked --seeds 1 --variant 'whole|ATTN=dense|' --variant 'again|ATTN=dense|' \
        --variant 'stopped|ATTN=dense|--max-seconds 0.000001' --variant 'more|ATTN=dense|-d 256' --variant 'longer|ATTN=dense|-t 128 -b 1' || return 1
    cat "$out/table.md"
    grep -q '^| whole | ' "$out/table.md" && grep -q '^| again | ' "$out/table.md" &&
        grep -q '^| stopped (not comparable: seed 1337 stopped at step [0-9]* of 20' "$out/table.md" &&
        grep -q '^| more (not comparable: 5120 tokens, others 2560)' "$out/table.md" &&
        grep -q '^| longer (not comparable: sequences of 128, others of 64)' "$out/table.md" &&
        [ "$(jq -c '[.variants[].comparable]' <"$out/table.json")" = '[true,true,false,false,false]' ] &&
        grep -q '>stopped (1 of 1 runs stopped early)<' "$out/loss.svg" && grep -q '>more (5120 tokens)<' "$out/loss.svg" &&
        refuses 2 "in --variant x" compare_in_a_shell 20 never --variant 'x|ATTN=dense|--train elsewhere' &&
        refuses 2 "in --variant x" compare_in_a_shell 20 never --variant 'x|ATTN=dense|--outp=elsewhere'
}
check compare_marks_what_is_not_of_equal_tokens compare_marks

# The steps that the second variant's run has logged.
steps_logged() { grep -c step_ms "$scratch/killed/kdgqa/seed_1337/timings.jsonl" 2>/dev/null || true; }
has_logged() { [ "$(steps_logged)" -ge "$1" ]; }
no_process() { ! pgrep -f "$1" >/dev/null; }

# Each signal interrupts the comparison in the middle of the second variant. Once, the test starts a second
# comparison, which must be refused. The last signal is SIGKILL, also for the training program. Afterwards the script
# must not repeat the first variant, and must resume the second one from its checkpoint.
compare_killed() { # steps
    local out=$scratch/killed steps=$1 script signal from status
    rm -rf "$out" "$scratch/whole run"
    compare_in_a_shell "$steps" killed --seeds 1 --variants dense kdgqa >"$scratch/whole" || return 1
    mv "$out" "$scratch/whole run"
    for signal in HUP INT TERM KILL; do
        from=$(steps_logged)
        (compare "$steps" killed --seeds 1 --variants dense kdgqa) 2>"$scratch/killed.errors" &
        script=$!
        if ! wait_for "$script" has_logged $((${from:-0} + steps / 20)); then
            wait "$script" && return 2
            return 1
        fi
        if [ "$signal" = TERM ]; then refuses 1 "process $script has been comparing" compare_in_a_shell "$steps" killed --seeds 1 || return 1; fi
        kill -"$signal" "$script"
        status=0
        wait "$script" || status=$?
        [ "$status" -ne 0 ] || return 2
        if [ "$signal" = KILL ]; then
            pkill -KILL -f "$out/kdgqa/seed_1337"
            wait_for $$ no_process "$out/kdgqa/seed_1337" || return 1
        else
            grep -q "^compare.sh: ended by SIG$signal" "$scratch/killed.errors" && no_process "$out/kdgqa/seed_1337" || return 1
        fi
        [ "$status" -eq $((128 + $(kill -l "$signal"))) ] && [ ! -e "$out/table.md" ] || return 1
    done
    compare_in_a_shell "$steps" killed --seeds 1 --variants dense kdgqa >"$scratch/again" || return 1
    grep -q 'dense, seed 1337: finished before' "$scratch/again" && grep -q '^resuming' "$out/kdgqa/seed_1337.log" &&
        cmp "$out/kdgqa/seed_1337/metrics.jsonl" "$scratch/whole run/kdgqa/seed_1337/metrics.jsonl"
}
# If a run ends before the signal arrives, the attempt shows nothing. The test repeats it with more steps.
compare_killed_in_time() {
    local steps status
    for steps in 1000 4000 16000 64000; do
        status=0
        compare_killed "$steps" || status=$?
        [ "$status" -eq 2 ] || return "$status"
    done
    return 1
}
check compare_goes_on_after_an_interruption compare_killed_in_time

# ----------------------------------------------------------------------------
# Locales, names and unwritable places, with the tokenizer and the shards that quickstart made

# Makes locales with a decimal comma, if localedef can.
locale=$scratch/locales
mkdir "$locale"
localedef -i de_DE -f UTF-8 "$locale/de_DE.UTF-8" >"$scratch/localedef" 2>&1
localedef -i tr_TR -f UTF-8 "$locale/tr_TR.UTF-8" >>"$scratch/localedef" 2>&1
has_comma() { [ "$(LOCPATH=$locale LC_ALL=$1 /usr/bin/printf %.1f 0,5 2>/dev/null)" = 0,5 ]; }
tiny=(--layers 1 --channels 32 --heads 2 --kv-heads 1 -t 64 -b 2 --val-batches 2)
tiny_run() { # directory, options
    local data=$scratch/tree/quickstart/01
    "$scratch/tree/build/train_gpt_cpu_fp32" -i "$data/text_train_*.bin" -j "$data/text_val_*.bin" \
        --tokenizer "$data/tokenizer.json" "${tiny[@]}" --steps 20 --val-every 5 --output "$1" "${@:2}" >"$scratch/run.log"
}

locales() {
    local name
    tiny_run "$scratch/in C" || return 1
    compare_in_a_shell 20 "table in C" --seeds 2 --variant 'dense|ATTN=dense|' || return 1
    for name in de_DE.UTF-8 tr_TR.UTF-8; do
        export LOCPATH=$locale LC_ALL=$name
        tiny_run "$scratch/in $name" && compare_in_a_shell 20 "table in $name" --seeds 2 --variant 'dense|ATTN=dense|' &&
            "$top/scripts/plot.sh" "x=$scratch/in C" --smooth 7.5 --output "$scratch/in $name/curve" || return 1
        unset LOCPATH LC_ALL
        cmp "$scratch/in C/metrics.jsonl" "$scratch/in $name/metrics.jsonl" &&
            jq -e . <"$scratch/table in $name/table.json" >"$scratch/jq" &&
            diff <(cut -d'|' -f1-6 <"$scratch/table in C/table.md") <(cut -d'|' -f1-6 <"$scratch/table in $name/table.md") &&
            grep -q '"step_ms":[0-9]*\.[0-9]' "$scratch/in $name/timings.jsonl" || return 1
        (env -i PATH="$PATH" LC_ALL=POSIX "$top/scripts/plot.sh" "x=$scratch/in C" --smooth 7.5 --output "$scratch/in C/curve") || return 1
        cmp "$scratch/in C/curve.svg" "$scratch/in $name/curve.svg" || return 1
    done
}
if has_comma de_DE.UTF-8 && has_comma tr_TR.UTF-8; then
    check locales_change_no_number locales
else
    echo "SKIPPED: locales with a decimal comma are not tested, since localedef makes none here"
    [ -d "$scratch/in C" ] || tiny_run "$scratch/in C"
fi

# The script must accept every directory name, from another directory, with CDPATH, and without HOME and TERM.
# Standard input gives no data, so a command that reads it would hang.
mkfifo "$scratch/silent"
exec {silent}<>"$scratch/silent"
names() ( # a subshell, because it changes the directory
    local name
    mkdir "$scratch/names" && cd "$scratch/names" || return 1
    for name in lr=1e-3 -x 'two words' "q'\"%\\\`touch hacked\`\$(touch hacked)" '[a-z]*' $'line\nfeed' $'not\xffutf8'; do
        mkdir -- "./$name" && cp "$scratch/in C/"*.jsonl "./$name/" &&
            timeout 600 env -i PATH="$PATH" CDPATH=/:/tmp BASH_ENV="$scratch/nowhere" \
                "$top/scripts/plot.sh" --title "$name" --output "$name" -- "$name" "lr=1e-3" "name=$name" <&"$silent" || return 1
        [ -s "./$name.png" ] && [ -s "./$name.svg" ] && [ ! -e hacked ] || return 1
        python3 -c 'import sys, xml.dom.minidom; xml.dom.minidom.parse(sys.stdin.buffer)' <"./$name.svg" || return 1
    done
    (umask 077 && compare_from_here 20 --output -t=32) && [ -s ./-t=32/table.json ]
)
compare_from_here() { # steps, options
    local data=$scratch/tree/quickstart/01
    timeout 600 env -u HOME -u TERM CDPATH=/:/tmp "$scratch/tree/scripts/compare.sh" --train-data "$data/text_train_*.bin" \
        --val-data "$data/text_val_*.bin" --tokenizer "$data/tokenizer.json" --steps "$1" --seeds 1 --variants dense "${@:2}" -- "${tiny[@]}" <&"$silent"
}
check every_name_of_a_directory names

spaced_tree() {
    cp -a "$scratch/tree" "$scratch/my tree" &&
        (cd / && "$scratch/my tree/scripts/compare.sh" --train-data "$scratch/tree/quickstart/01/text_train_*.bin" --val-data "$scratch/tree/quickstart/01/text_val_*.bin" \
            --tokenizer "$scratch/tree/quickstart/01/tokenizer.json" --steps 20 --seeds 1 --variants dense --output "$scratch/spaced" -- "${tiny[@]}")
}
check a_tree_with_a_space spaced_tree

# A crash truncates a line, or fills it with zeros, or makes a step occur twice: this must
# not change a curve. Infinity is not a loss.
crashed() {
    local whole=$scratch/in\ C crashed=$scratch/crashed
    mkdir "$scratch/short" "$crashed"
    head -n 15 "$whole/metrics.jsonl" >"$scratch/short/metrics.jsonl"
    cp "$whole/timings.jsonl" "$scratch/short"
    cp "$whole/timings.jsonl" "$crashed"
    {
        head -n 12 "$whole/metrics.jsonl"
        sed -n '10,15p' "$whole/metrics.jsonl"
        printf '%s\n' '{"step":18,"tokens":2304,"loss":1e999,"grad_norm":1}' '{"step":18,"tokens":2304,"loss":null}' '{"step":18,"tokens":2304,"loss":NaN}'
        printf '\0\0\0\0\n{"step":19,"tokens":2432,"loss":3.'
    } >"$crashed/metrics.jsonl"
    "$top/scripts/plot.sh" "x=$scratch/short" --output "$scratch/short/curve" && "$top/scripts/plot.sh" "x=$crashed" --output "$crashed/curve" || return 1
    grep -o '>x[^<]*<' "$scratch/short/curve.svg"
    cmp "$scratch/short/curve.svg" "$crashed/curve.svg" && grep -q '>x (only [0-9]* of 20 steps)<' "$crashed/curve.svg"
}
check lines_cut_by_a_crash_are_not_drawn crashed

# The scripts must print one line, exit with code 1, and leave no part of a file.
unwritable() {
    local plot=("$top/scripts/plot.sh" "$scratch/in C")
    refuses 1 "standard output: is closed" bash -c '"$@" >&-' - "${plot[@]}" -o "$scratch/no/curve" &&
        refuses 1 "standard output: cannot be written" bash -c '"$@" >/dev/full' - "${plot[@]}" -o "$scratch/full/curve" &&
        refuses 1 "cannot make this directory" "${plot[@]}" -o "$scratch/small text.txt/curve" &&
        refuses 1 "no directory for temporary files" env TMPDIR="$scratch/nowhere" "${plot[@]}" -o "$scratch/no/curve" &&
        refuses 1 "cannot make this directory" compare_in_a_shell 20 "small text.txt/x" --seeds 1 &&
        [ ! -e "$scratch/no" ] || return 1
    mkdir -p "$scratch/taken/curve.png"
    refuses 1 "cannot be written" "${plot[@]}" -o "$scratch/taken/curve" && [ "$(ls "$scratch/taken")" = curve.png ] || return 1
    # A limit on the size of files simulates a full disk.
    mkdir "$scratch/limited"
    refuses 1 "there is no space for it" bash -c 'trap "" XFSZ; ulimit -f 8; exec "$@"' - "${plot[@]}" -o "$scratch/limited/curve" && [ -z "$(ls "$scratch/limited")" ]
}
check output_that_cannot_be_written unwritable

# ----------------------------------------------------------------------------
# README's commands from a text to a model, in their order, in a fresh copy of the tree. Only the sizes are smaller.

readme() ( # a subshell, because it changes the directory
    mkdir "$scratch/fresh" && git ls-files -z | xargs -0 cp -p --parents -t "$scratch/fresh" && cd "$scratch/fresh" || return 1
    # A copy of the build directory, so that README's `make` need not compile again.
    cp -a "$scratch/tree/build" build && mkdir my_text && cp "$scratch/small text.txt" my_text/one.txt || return 1
    # shellcheck disable=SC2016 # the fence of Markdown
    sed -n '/^## From a text to a model/,/^## /p' README.md | sed -n '/^```sh$/,/^```$/p' | sed '/^```/d' >block.sh
    [ "$(grep -c 'build/' block.sh)" -ge 4 ] || return 1
    sed -i -e 's/--vocab-size 4096/--vocab-size 400/; s/--layers 6 --channels 384 --heads 6 --kv-heads 2 -t 512 -b 8 -d 32768/--layers 1 --channels 32 --heads 2 --kv-heads 1 -t 64 -b 2 -d 128/' \
        -e 's/ -u 100 -n 500/ -x 20 -u 5 -n 10/; s/scripts\/install.sh && make$/scripts\/install.sh \&\& make DEVICE=cpu/' block.sh
    cat block.sh
    bash -euo pipefail block.sh || return 1
    [ -s runs/mine/step_00000020/model.safetensors ] && [ -s runs/mine/loss.svg ]
)
check readme_from_a_text_to_a_model readme

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
wait_for "$server" grep -q 'port [0-9]' "$scratch/server"
TINYSTORIES_URL=http://127.0.0.1:$(sed -n 's/.* port \([0-9]*\).*/\1/p' "$scratch/server" | head -n 1)
export TINYSTORIES_URL

download() {
    "$top/scripts/download_tinystories.sh" "$scratch/data" || return 1
    # The download was interrupted, and the server cannot continue in the middle of a file.
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

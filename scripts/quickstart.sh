#!/usr/bin/env bash
# Goes from a fresh clone to trained language models in less than six minutes on two cores. Installs the missing
# packages, builds, makes a tokenizer and token shards from a text, and trains the variants below one after the other
# for the same number of steps. Ends with a table, a plot and a sample.
#
#   scripts/quickstart.sh                     trains on this machine's C headers (/usr/include); downloads only packages
#   scripts/quickstart.sh --text FILE...      trains on your own text of at least 10 kB; uses its first 32 MB
#   scripts/quickstart.sh --minutes 20        takes about 20 minutes in all (default 4.5), with the setup
#
# All variants do the same number of steps, which the script chooses from the speed it measures here. If other
# programs slow a variant down, it gets up to four times the expected time. The script stops a variant that needs
# more. The table and the plot mark it, because it cannot be compared.
#
# All results are in quickstart/01; the next call writes quickstart/02, and so on.
set -euo pipefail
self=$(readlink -f -- "$0")
# shellcheck source=scripts/shared.sh
. "${self%/*}/shared.sh"
caller=$PWD
cd "$top"

# The variants: name, options of train_gpt. BLOCK becomes an eighth of a sequence. scripts/compare.sh
# compares such variants over several seeds.
variants=(
    "dense|--attention dense --kv-heads 2"
    "moba|--attention moba --kv-heads 2 --moba-block BLOCK --moba-topk 3"
    "flashmoba|--attention flashmoba --kconv 3 --kv-heads 2 --moba-block BLOCK --moba-topk 3"
    "kdgqa|--query-heads kdgqa --kv-heads 2"
)

# The model that all variants share, and its training. docs/results/quickstart.md gives
# reasons for the sizes and the learning rate.
model=(--layers 4 --channels 128 --heads 8)
training=(--learning-rate 2e-3 --schedule cosine --final-lr-fraction 0.05 --weight-decay 0.1 --seed 1337)
step_tokens=512
text_bytes=32000000 # upper bound on the bytes of text that are read
passes=10 # upper bound on the passes over the text
val_bytes=60000 # approximate size of the validation text, which is at most a tenth of the text

# ----------------------------------------------------------------------------
# Options

minutes=4.5 texts=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    --minutes)
        [ $# -ge 2 ] || fail "--minutes: needs a value" 2
        minutes=$2
        [[ $minutes =~ ^[0-9]{1,4}(\.[0-9]+)?$ ]] || fail "--minutes $minutes: want a number" 2
        awk -v m="$minutes" 'BEGIN { exit m < 0.2 }' || fail "--minutes $minutes: must be at least 0.2" 2
        shift
        ;;
    --text)
        shift
        if [ $# -eq 0 ] || [[ $1 == --* ]]; then fail "--text: needs at least one file" 2; fi
        while [ $# -ge 1 ] && [[ $1 != --* ]]; do
            texts+=("$1")
            shift
        done
        continue
        ;;
    *) fail "$1: unknown option (see --help)" 2 ;;
    esac
    shift
done

# The names are relative to the caller's directory, but this script has changed to the top of the tree.
for i in "${!texts[@]}"; do
    text=${texts[i]}
    if [[ $text != /* ]]; then text=$caller/$text; fi
    [ -e "$text" ] || fail "--text ${texts[i]}: no such file"
    [ -f "$text" ] || fail "--text ${texts[i]}: not a regular file"
    [ -r "$text" ] || fail "--text ${texts[i]}: may not be read"
    [ -s "$text" ] || fail "--text ${texts[i]}: is empty"
    [ "$(head -c "$text_bytes" <"$text" | tr -dc '\000' | wc -c)" -eq 0 ] || fail "--text ${texts[i]}: holds zero bytes: not a text file"
    texts[i]=$text
done
if [ ${#texts[@]} -gt 0 ]; then
    bytes=$(cat -- "${texts[@]}" | wc -c)
    [ "$bytes" -ge 10000 ] || fail "--text: $bytes bytes in all are too few to train and to validate on; 10000 are the least"
fi

# ----------------------------------------------------------------------------
# Progress messages

started=$EPOCHREALTIME
elapsed() { awk -v a="$started" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.0f", b - a }'; }
tell() { say "$(printf '[%4s s] %s' "$(elapsed)" "$*")"; }

# Runs a command with its output in a log file. If the command fails, it shows the end of the log.
quietly() {
    local log=$1
    shift
    if ! run "$@" >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "failed: $* (its output is in $log)"
    fi
}

# Reads the trainer's log from standard input. Shows every validation, and one step in ten seconds.
show_progress() {
    local line last=$SECONDS
    while IFS= read -r line; do
        case "$line" in
        *"validation loss"*) ;;
        step*) [ $((SECONDS - last)) -ge 10 ] || continue ;;
        *) continue ;;
        esac
        last=$SECONDS
        printf '[%4s s]   %s\n' "$(elapsed)" "$line" 2>/dev/null || return 0
    done
}

# Each call makes its own directory, even if two calls start at the same time.
make_directory quickstart
number=1
until mkdir "quickstart/$(printf %02d $number)" 2>/dev/null; do
    [ -e "quickstart/$(printf %02d $number)" ] || fail "$top/quickstart: cannot be written to"
    number=$((number + 1))
done
out=quickstart/$(printf %02d $number)
resumes="what it has made so far is in $out"
take_signals
if [ $number -gt 1 ]; then tell "earlier results stay where they are in quickstart/; this time everything goes to $out"; fi

# ----------------------------------------------------------------------------
# Install, build

tell "installing what is missing (scripts/install.sh)"
scripts/install.sh
tell "building the tokenizer and the trainer"
lock_build build
quietly "$out/build.log" make --no-print-directory -j"$(nproc)" DEVICE=cpu PRECISION=fp32 BUILD=build tokenizer build/train_gpt_cpu_fp32
cp build/train_gpt_cpu_fp32 "$out/train_gpt"
exec {build_lock}>&-

# ----------------------------------------------------------------------------
# Text to token shards

if [ ${#texts[@]} -gt 0 ]; then
    source=("${texts[@]}") # an argument list, because a file name may contain a newline
    prompt=""
else
    # The list is sorted and has only text files, so that the same machine always gives the same data.
    LC_ALL=C find /usr/include -type f -name '*.h' -size +0 -print0 | LC_ALL=C sort -z |
        LC_ALL=C xargs -0 -r grep -lIa '' >"$out/files.txt" || true
    [ -s "$out/files.txt" ] || fail "/usr/include: holds no headers; give a text with --text FILE"
    bytes=$(tr '\n' '\0' <"$out/files.txt" | xargs -0 cat -- | wc -c)
    [ "$bytes" -ge 10000 ] || fail "/usr/include: holds too few headers; give a text with --text FILE"
    source=(--files-from "$out/files.txt")
    prompt="#ifndef"
fi

# A small text has few different words, so it gets a smaller vocabulary and shorter sequences.
vocabulary=4096 T=256
if [ "$bytes" -lt 3000000 ]; then vocabulary=1024; fi
if [ "$bytes" -lt 300000 ]; then vocabulary=512 T=128; fi
if [ "$bytes" -lt 50000 ]; then vocabulary=320 T=64; fi
used=$((bytes < text_bytes ? bytes : text_bytes))
files=${#texts[@]}
if [ "$files" -eq 0 ]; then files=$(wc -l <"$out/files.txt"); fi
tell "training a tokenizer of $vocabulary tokens on $files files, $(awk -v b=$used 'BEGIN { printf "%.2f", b / 1e6 }') MB"
fraction=$(awk -v b="$used" -v v=$val_bytes 'BEGIN { print (v / b > 0.1 ? 0.1 : v / b) }')
source=(--max-bytes "$text_bytes" "${source[@]}")
quietly "$out/tokenizer.log" build/tokenizer train --vocab-size "$vocabulary" -o "$out/tokenizer.json" "${source[@]}"
tell "writing token shards"
quietly "$out/prepare.log" build/tokenizer prepare -t "$out/tokenizer.json" --output-prefix "$out/text" \
    --validation-fraction "$fraction" "${source[@]}"
val_tokens=$(sed -n 's/.*_val_\*\.bin: \([0-9]*\) tokens.*/\1/p' "$out/prepare.log")
tokens=$(sed -n 's/.*_train_\*\.bin: \([0-9]*\) tokens.*/\1/p' "$out/prepare.log")
token_bytes=$(sed -n 's/.* \([0-9.]*\) bytes a token.*/\1/p' "$out/prepare.log")
if [ "${tokens:-0}" -le "$T" ] || [ "${val_tokens:-0}" -le "$T" ]; then
    fail "the text repeats itself: it is ${tokens:-0} tokens to train on and ${val_tokens:-0} to validate on, and each must be more than $T"
fi
tell "  $tokens tokens to train on, $val_tokens to validate on, $token_bytes bytes each"

# ----------------------------------------------------------------------------
# How fast is this machine?

batch=$((step_tokens / T))
variants=("${variants[@]//BLOCK/$((T / 8 < 16 ? 16 : T / 8))}")
shared=("${model[@]}" -i "$out/text_train_*.bin" -j "$out/text_val_*.bin" --tokenizer "$out/tokenizer.json"
    -t "$T" -b "$batch" "${training[@]}")

tell "measuring the speed of this machine"
milliseconds=0 speeds=()
for i in "${!variants[@]}"; do
    IFS='|' read -r name options <<<"${variants[i]}"
    read -ra options <<<"$options"
    quietly "$out/speed.log" "$out/train_gpt" "${shared[@]}" "${options[@]}" \
        --steps 1000 --val-every 0 --log-every 1 --max-seconds 4 --output "$out/speed_$name"
    # The mean leaves out the first two steps, if there are more than two.
    speed=$(json_lines 'select(.event == null) | .step_ms | finite' <"$out/speed_$name/timings.jsonl" |
        awk '{ if (++n == 3) sum = count = 0; sum += $1; count++ } END { if (count) printf "%.1f", sum / count }')
    [ -n "$speed" ] || fail "$name: no step in 4 seconds"
    rm -rf "$out/speed_$name"
    tell "  $name: $speed ms a step of $step_tokens tokens"
    speeds+=("$speed")
    milliseconds=$(awk -v a="$milliseconds" -v b="$speed" 'BEGIN { print a + b }')
done

# The budget is the remaining time, less 10 s for table and sample. A validation needs only the forward pass, so a
# token costs a third of its training cost. Each run has 5 validations.
budget=$(awk -v m="$minutes" -v e="$(elapsed)" 'BEGIN { left = 60 * m - e - 10; print (left < 5 ? 5 : left) }')
most=$((passes * tokens / step_tokens + 1))
validations=$((5 * val_tokens / 3 / step_tokens)) # unit: training steps
steps=$(awk -v left="$budget" -v ms="$milliseconds" -v most="$most" -v val="$validations" 'BEGIN {
    steps = int((left * 1000 / ms - val) / 10) * 10
    if (steps > most) steps = most
    print (steps < 20 ? 20 : steps)
}')
every=$(((steps + 3) / 4))
log_every=$((steps / 200 > 0 ? steps / 200 : 1))
tell "each variant is trained for $steps steps of $step_tokens tokens: all the same, about ${budget%.*} s together$(
    [ "$steps" -lt "$most" ] || echo " or less (after $passes passes over the text it ends)"
)"

# ----------------------------------------------------------------------------
# Train the variants one after the other

# If the machine becomes slower than measured, a variant may take longer: four times its
# expected time, plus half a minute.
for i in "${!variants[@]}"; do
    IFS='|' read -r name options <<<"${variants[i]}"
    read -ra options <<<"$options"
    expected=$(awk -v ms="${speeds[i]}" -v steps=$((steps + validations)) 'BEGIN { printf "%.0f", ms * steps / 1000 }')
    limit=$((4 * expected + 30))
    tell "training $name: ${options[*]}; about $expected s, at most $limit s"
    : >"$out/$name.log"
    begun=$SECONDS status=0
    start "$out/train_gpt" "${shared[@]}" "${options[@]}" --steps "$steps" --warmup $((steps / 20)) \
        --val-every "$every" --val-batches 1000000 --log-every "$log_every" --max-seconds "$limit" --output "$out/$name" \
        >"$out/$name.log" 2>"$out/$name.errors"
    tail -s 0.2 -n +1 -f --pid="$child" "$out/$name.log" 2>/dev/null | show_progress &
    progress=$!
    await || status=$?
    wait "$progress" || true
    # A variant that a signal stopped stays in the table, with a mark, if it has a validation loss.
    validated=$(json_lines '.val_loss | finite' <"$out/$name/metrics.jsonl" 2>/dev/null) || true
    if [ $status -gt 128 ] && [ -n "$validated" ]; then
        tell "  $name was stopped by SIG$(kill -l $((status - 128)))"
    elif [ $status -ne 0 ]; then
        fail "$name: training failed with exit code $status: $(tail -n 1 "$out/$name.errors")"
    fi
    if [ $((SECONDS - begun)) -gt $((expected + expected / 2 + 5)) ]; then
        tell "  $name took $((SECONDS - begun)) s, not $expected: something else used the machine"
    fi
    summary "$out/$name" "$out/$name.log" | jq -c --arg name "$name" '{name: $name} + .' >>"$out/summaries.jsonl"
done

# ----------------------------------------------------------------------------
# Table, plot, sample

# A variant that has not done all steps gets a star, and a line below the table.
rows() {
    jq -r --argjson steps "$steps" --argjson bytes "$token_bytes" '[.name + if .step < $steps then " *" else "" end, .parameters_millions, .tokens / 1e6,
        .val_loss, .val_loss / (2 | log) / $bytes, if .busy_ms > 0 then 1000 * .tokens / .busy_ms else 0 end, .seconds, .peak_memory_mb,
        .key_value_bytes / 1000] | @tsv' <"$out/summaries.jsonl"
}
marks() {
    jq -r --argjson steps "$steps" 'select(.step < $steps) | "* \(.name) was stopped at step \(.step) of \($steps): not to be compared; its validation loss is of step \(.val_step)"' \
        <"$out/summaries.jsonl"
}
{
    printf '%-11s %9s %11s %11s %10s %10s %9s %11s %12s\n' variant parameters tokens "validation" "bits per" tokens/s seconds peak "KV cache"
    printf '%-11s %9s %11s %11s %10s %10s %9s %11s %12s\n' "" "" "" loss byte "" "" memory "a token"
    rows | while IFS=$'\t' read -ra row; do
        printf '%-11s %7.2f M %9.2f M %11.4f %10.3f %10.0f %9.0f %8.0f MB %9.1f kB\n' "${row[@]}"
    done
    marks
} >"$out/table.partial"
mv "$out/table.partial" "$out/table.txt"

labelled=()
for variant in "${variants[@]}"; do labelled+=("${variant%%|*}=$out/${variant%%|*}"); done
scripts/plot.sh --output "$out/loss" --title "quickstart: ${model[*]//--/}, T $T, vocabulary $vocabulary" -- "${labelled[@]}" >/dev/null

# The best variant is chosen among those that did all steps, or among all variants if there are none.
best=$(jq -r -s --argjson steps "$steps" '(map(select(.step == $steps)) | select(length > 0)) // . | min_by(.val_loss) | .name' <"$out/summaries.jsonl")
if [ -z "$prompt" ]; then
    # The prompt is the first words of a line from the middle of the text.
    prompt=$(tail -c +$((bytes / 2)) <"${texts[0]}" 2>/dev/null | sed -n '2,200{/[^ ].* .* /{p;q}}' | cut -d' ' -f1-3 || true)
fi
options=()
if [ -n "$prompt" ]; then options=(--prompt "$prompt"); fi
run "$out/train_gpt" --generate --init-from "$out/$best" --tokenizer "$out/tokenizer.json" --sample-length "$T" \
    --temperature 0.6 --top-k 40 --seed 1 "${options[@]}" >"$out/sample.txt" 2>"$out/sample.errors" ||
    fail "the sample failed: $(tail -n 1 "$out/sample.errors")"

say
show "$out/table.txt"
say
say "--- a sample of $best (temperature 0.6, top-k 40), which begins with \"$prompt\""
show "$out/sample.txt"
say "---"
tell "done. Table, sample, curves (loss.png, loss.svg), checkpoints and shards are in $out"
say "---> HINT: $out/train_gpt_$best --generate --init-from $out/$best --prompt ${prompt@Q} --temperature 0.6 --top-k 40"

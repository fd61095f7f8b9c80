#!/usr/bin/env bash
# From a fresh clone to trained language models, in under six minutes on two cores: installs what is missing, builds, makes a
# tokenizer and token shards of a text, trains the variants below one after the other for the same number of steps, and ends
# with a table, a plot and a sample.
#
#   scripts/quickstart.sh                     on the C headers of this machine (/usr/include): nothing is downloaded but packages
#   scripts/quickstart.sh --text FILE...      on your own text, 10 kB or more; the first 32 MB of it
#   scripts/quickstart.sh --minutes 20        takes about that long in all (default 4.5); what the setup leaves goes to training
#
# Everything it makes is in quickstart/01, the next time in quickstart/02, and so on.
set -euo pipefail
cd "$(dirname "$0")/.."

# The variants: name, flags of make, options of train_gpt; BLOCK is an eighth of a sequence. scripts/compare.sh compares such
# variants over several seeds.
variants=(
    "dense|ATTN=dense GQA=gqa KCONV=0|--kv-heads 2"
    "moba|ATTN=moba GQA=gqa KCONV=0|--kv-heads 2 --moba-block BLOCK --moba-topk 3"
    "flashmoba|ATTN=flashmoba GQA=gqa KCONV=3|--kv-heads 2 --moba-block BLOCK --moba-topk 3"
    "kdgqa|ATTN=dense GQA=kdgqa KCONV=0|--kv-heads 2"
)

# The model that they share, and how it is trained. Sizes and learning rate: docs/results/quickstart.md.
model=(--layers 4 --channels 128 --heads 8)
training=(--learning-rate 2e-3 --schedule cosine --final-lr-fraction 0.05 --weight-decay 0.1 --seed 1337)
step_tokens=512
text_bytes=32000000 # at most so much of the text is read
passes=10           # at most so often is it read
val_bytes=60000     # about so much of it is kept for validation, and at most a tenth

# ----------------------------------------------------------------------------
# Options

fail() {
    echo "quickstart.sh: $1" >&2
    exit "${2:-1}"
}

minutes=4.5 texts=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        sed -n '2,/^set -/s/^# \{0,1\}//p' "scripts/quickstart.sh" | sed '$d'
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

# Relative names are the caller's, and this script has gone to the top of the tree.
for i in "${!texts[@]}"; do
    text=${texts[i]}
    if [[ $text != /* ]]; then text=$OLDPWD/$text; fi
    [ -e "$text" ] || fail "--text ${texts[i]}: no such file"
    [ -f "$text" ] || fail "--text ${texts[i]}: not a regular file"
    [ -r "$text" ] || fail "--text ${texts[i]}: may not be read"
    [ -s "$text" ] || fail "--text ${texts[i]}: is empty"
    head -c 1000000 "$text" | LC_ALL=C grep -qaP '\x00' && fail "--text ${texts[i]}: holds zero bytes: not a text file"
    texts[i]=$text
done
if [ ${#texts[@]} -gt 0 ]; then
    bytes=$(cat "${texts[@]}" | wc -c)
    [ "$bytes" -ge 10000 ] || fail "--text: $bytes bytes in all are too few to train and to validate on; 10000 are the least"
fi

# ----------------------------------------------------------------------------
# What it says while it works

started=$EPOCHREALTIME
elapsed() { awk -v a="$started" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.0f", b - a }'; }
say() { printf '[%4s s] %s\n' "$(elapsed)" "$*"; }

# Runs a command whose output goes to a log file; shows the log's end where it fails.
quietly() {
    local log=$1
    shift
    if ! "$@" >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "failed: $* (its output is in $log)"
    fi
}

# Shows every validation that passes by on standard input, and a step every ten seconds.
show_progress() {
    local line last=$SECONDS
    while IFS= read -r line; do
        case "$line" in
        *"validation loss"*) ;;
        step*) [ $((SECONDS - last)) -ge 10 ] || continue ;;
        *) continue ;;
        esac
        last=$SECONDS
        say "  $line"
    done
}

# A directory of its own for every time.
number=1
while [ -e "quickstart/$(printf %02d $number)" ]; do number=$((number + 1)); done
out=quickstart/$(printf %02d $number)
mkdir -p "$out"
if [ $number -gt 1 ]; then say "earlier results stay where they are in quickstart/; this time everything goes to $out"; fi

# ----------------------------------------------------------------------------
# Install, build

say "installing what is missing (scripts/install.sh)"
scripts/install.sh
say "building the tokenizer and the variants"
programs=() builds=("BUILD=build tokenizer")
for variant in "${variants[@]}"; do
    IFS='|' read -r _ flags _ <<<"$variant"
    read -ra flags <<<"$flags"
    declare "${flags[@]}"
    programs+=("build/train_gpt_cpu_${ATTN}_${GQA}_kconv${KCONV}_fp32")
    builds+=("${flags[*]} DEVICE=cpu PRECISION=fp32 BUILD=build ${programs[-1]}")
done
# A line of arguments for each make, as many at once as there are cores.
quietly "$out/build.log" xargs -L 1 -P "$(nproc)" make --no-print-directory < <(printf '%s\n' "${builds[@]}")
for i in "${!variants[@]}"; do cp "${programs[i]}" "$out/train_gpt_${variants[i]%%|*}"; done

# ----------------------------------------------------------------------------
# Text to token shards

if [ ${#texts[@]} -gt 0 ]; then
    printf '%s\n' "${texts[@]}" >"$out/files.txt"
    prompt=""
else
    # Sorted, and text only: the same machine gives the same data.
    LC_ALL=C find /usr/include -type f -name '*.h' -size +0 -print0 | LC_ALL=C sort -z |
        LC_ALL=C xargs -0 -r grep -lIa '' >"$out/files.txt" || true
    [ -s "$out/files.txt" ] || fail "/usr/include: holds no headers; give a text with --text FILE"
    prompt="#ifndef"
fi
bytes=$(tr '\n' '\0' <"$out/files.txt" | xargs -0 cat | wc -c)

# A small text has few words to learn: it gets a smaller vocabulary and shorter sequences.
vocabulary=4096 T=256
if [ "$bytes" -lt 3000000 ]; then vocabulary=1024; fi
if [ "$bytes" -lt 300000 ]; then vocabulary=512 T=128; fi
if [ "$bytes" -lt 50000 ]; then vocabulary=320 T=64; fi
used=$((bytes < text_bytes ? bytes : text_bytes))
say "training a tokenizer of $vocabulary tokens on $(wc -l <"$out/files.txt") files, $(awk -v b=$used 'BEGIN { printf "%.2f", b / 1e6 }') MB"
fraction=$(awk -v b="$used" -v v=$val_bytes 'BEGIN { print (v / b > 0.1 ? 0.1 : v / b) }')
source=(--files-from "$out/files.txt" --max-bytes "$text_bytes")
quietly "$out/tokenizer.log" build/tokenizer train --vocab-size "$vocabulary" -o "$out/tokenizer.json" "${source[@]}"
say "writing token shards"
quietly "$out/prepare.log" build/tokenizer prepare -t "$out/tokenizer.json" --output-prefix "$out/text" \
    --validation-fraction "$fraction" "${source[@]}"
val_tokens=$(sed -n 's/.*_val_\*\.bin: \([0-9]*\) tokens.*/\1/p' "$out/prepare.log")
tokens=$(sed -n 's/.*_train_\*\.bin: \([0-9]*\) tokens.*/\1/p' "$out/prepare.log")
token_bytes=$(sed -n 's/.* \([0-9.]*\) bytes a token.*/\1/p' "$out/prepare.log")
say "  $tokens tokens to train on, $val_tokens to validate on, $token_bytes bytes each"

# ----------------------------------------------------------------------------
# How fast is this machine?

batch=$((step_tokens / T))
variants=("${variants[@]//BLOCK/$((T / 8 < 16 ? 16 : T / 8))}")
shared=("${model[@]}" -i "$out/text_train_*.bin" -j "$out/text_val_*.bin" --tokenizer "$out/tokenizer.json"
    -t "$T" -b "$batch" "${training[@]}")

say "measuring the speed of this machine"
speed_of() { # milliseconds a step of one variant, after the first two where there are more
    local name=$1 i=$2
    read -ra options <<<"${variants[i]##*|}"
    quietly "$out/speed.log" "$out/train_gpt_$name" "${shared[@]}" "${options[@]}" \
        --steps 1000 --val-every 0 --log-every 1 --max-seconds 4 --output "$out/speed_$name"
    awk -F'"step_ms":' '/"step_ms"/ { if (++n == 3) sum = count = 0; sum += $2; count++ } END { printf "%.1f", sum / count }' "$out/speed_$name/timings.jsonl"
    rm -rf "$out/speed_$name"
}
milliseconds=0
for i in "${!variants[@]}"; do
    name=${variants[i]%%|*}
    speed=$(speed_of "$name" "$i")
    say "  $name: $speed ms a step of $step_tokens tokens"
    milliseconds=$(awk -v a="$milliseconds" -v b="$speed" 'BEGIN { print a + b }')
done

# What is left, less 10 s for the table and the sample. Of a step, a forward pass is a third: so long take 5 validations.
budget=$(awk -v m="$minutes" -v e="$(elapsed)" 'BEGIN { left = 60 * m - e - 10; print (left < 5 ? 5 : left) }')
most=$((passes * tokens / step_tokens + 1))
steps=$(awk -v left="$budget" -v ms="$milliseconds" -v most="$most" -v val="$((5 * val_tokens / 3 / step_tokens))" 'BEGIN {
    steps = int((left * 1000 / ms - val) / 10) * 10
    if (steps > most) steps = most
    print (steps < 20 ? 20 : steps)
}')
every=$(((steps + 3) / 4))
log_every=$((steps / 200 > 0 ? steps / 200 : 1))
say "each variant is trained for $steps steps of $step_tokens tokens: all the same, about ${budget%.*} s together$(
    [ "$steps" -lt "$most" ] || echo " or less (after $passes passes over the text it ends)"
)"

# ----------------------------------------------------------------------------
# Train, side by side

# Where the machine becomes slower than measured, a variant ends early rather than the command late.
longest=$(awk -v left="$budget" -v n=${#variants[@]} 'BEGIN { print 1.25 * left / n + 2 }')
for variant in "${variants[@]}"; do
    IFS='|' read -r name flags options <<<"$variant"
    read -ra options <<<"$options"
    say "training $name: $flags ${options[*]}"
    if ! "$out/train_gpt_$name" "${shared[@]}" "${options[@]}" --steps "$steps" --warmup $((steps / 20)) \
        --val-every "$every" --val-batches 1000000 --log-every "$log_every" --max-seconds "$longest" --output "$out/$name" \
        2>"$out/$name.errors" | tee "$out/$name.log" | show_progress; then
        cat "$out/$name.errors" >&2
        fail "$name: training failed; its output is in $out/$name.log"
    fi
done

# ----------------------------------------------------------------------------
# Table, plot, sample

# One line for a variant: parameters, tokens, validation loss, bits per byte, speed, seconds, memory.
table_line() {
    local name=$1
    cat "$out/$name.log" "$out/$name/timings.jsonl" "$out/$name/metrics.jsonl" | awk -v name="$name" -v token_bytes="$token_bytes" '
        function number(key) {
            return match($0, "\"" key "\":[^,}]*") ? substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3) + 0 : 0
        }
        / M parameters,/ { parameters = $1 }
        /^peak memory/ { memory = $3 }
        /"event":"start"/ { cache = 2 * 4 * number("layers") * number("kv_heads") * number("head_dim") }
        /"step_ms"/ { busy += number("step_ms") * (number("step") - before) / 1000; before = number("step"); tokens = number("tokens") }
        /"seconds"/ { seconds = number("seconds") }
        /"val_loss"/ { loss = number("val_loss") }
        END {
            printf "%-10s %8.2f M %9.2f M %11.4f %10.3f %10.0f %9.0f %8.0f MB %9.1f kB\n", name, parameters, tokens / 1e6,
                loss, loss / log(2) / token_bytes, tokens / busy, seconds, memory, cache / 1000
        }'
}

{
    printf '%-10s %10s %11s %11s %10s %10s %9s %11s %12s\n' variant parameters tokens "validation" "bits per" tokens/s seconds peak "KV cache"
    printf '%-10s %10s %11s %11s %10s %10s %9s %11s %12s\n' "" "" "" loss byte "" "" memory "a token"
    for variant in "${variants[@]}"; do table_line "${variant%%|*}"; done
} >"$out/table.txt"

labelled=()
for variant in "${variants[@]}"; do labelled+=("${variant%%|*}=$out/${variant%%|*}"); done
scripts/plot.sh "${labelled[@]}" --output "$out/loss" --title "quickstart: ${model[*]//--/}, T $T, vocabulary $vocabulary" >/dev/null

best=$(sort -k6,6n <(tail -n +3 "$out/table.txt") | awk 'NR == 1 { print $1 }')
if [ -z "$prompt" ]; then
    # The first words of a line in the middle of the text.
    prompt=$(tail -c +$((bytes / 2)) "${texts[0]}" 2>/dev/null | sed -n '2,200{/[^ ].* .* /{p;q}}' | cut -d' ' -f1-3 || true)
fi
options=()
if [ -n "$prompt" ]; then options=(--prompt "$prompt"); fi
"$out/train_gpt_$best" --generate --init-from "$out/$best" --tokenizer "$out/tokenizer.json" --sample-length "$T" \
    --temperature 0.6 --top-k 40 --seed 1 "${options[@]}" >"$out/sample.txt" 2>"$out/sample.errors" ||
    fail "the sample failed: $(tail -n 1 "$out/sample.errors")"

echo
cat "$out/table.txt"
echo
echo "--- a sample of $best (temperature 0.6, top-k 40), which begins with \"$prompt\""
cat "$out/sample.txt"
echo "---"
say "done. Table, sample, curves (loss.png, loss.svg), checkpoints and shards are in $out"
echo "---> HINT: $out/train_gpt_$best --generate --init-from $out/$best --prompt '$prompt' --temperature 0.6 --top-k 40"

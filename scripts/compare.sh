#!/usr/bin/env bash
# Compares variants of the model: builds each, trains each with the same seeds over the same order of the data, and writes a
# table and a plot. Interrupt it at any time: the same line goes on, and what is finished is not run again.
#
#   scripts/compare.sh --train-data 'data/mine_train_*.bin' --val-data 'data/mine_val_*.bin' --tokenizer data/tokenizer.json \
#       --seeds 3 --steps 2000 --output runs/kinds -- --layers 4 --channels 128 --heads 8 --kv-heads 2 -t 256 -b 8
#
#   --variants NAME...                which of the variants below (default: all)
#   --variant 'name|flags|options'    a variant of your own, or another one by that name: flags of make, options of train_gpt;
#                                     may be repeated. Without --variants only these are run.
#   --seeds N --steps N               seeds 1337, 1338, ... (default 3) and the steps of each run
#   -- OPTION...                      options of train_gpt that all variants share
#
# Cells are --output/NAME/seed_N, output directories of train_gpt; beside each are its log and its settings, and a cell that
# was begun with other settings is refused. In --output: table.md, table.json, loss.png, loss.svg. The validation loss is that
# after the last step, the spread its sample standard deviation over the seeds; tokens/s are those of training steps alone,
# the mean over the seeds, as is the part of a step that attention takes, forward and backward; peak memory is the largest of
# the seeds.
set -euo pipefail

# name, flags of make, options of train_gpt. Blocks are for sequences of some 256 tokens.
variants=(
    "dense|ATTN=dense|"
    "moba|ATTN=moba|--moba-block 32 --moba-topk 3"
    "flashmoba|ATTN=flashmoba KCONV=3|--moba-block 32 --moba-topk 3"
    "kdgqa|GQA=kdgqa|"
)
first_seed=1337

fail() {
    echo "compare.sh: $1" >&2
    exit "${2:-1}"
}

# ----------------------------------------------------------------------------
# Options

# The entry of the table that has this name.
variant_of() {
    local variant
    for variant in "${variants[@]}"; do
        if [ "${variant%%|*}" = "$1" ]; then
            echo "$variant"
            return
        fi
    done
    fail "--variants $1: no such variant; there are: ${variants[*]%%|*}" 2
}

train_data="" val_data="" tokenizer="" seeds=3 steps="" output="" names=() own=() common=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        sed -n '2,/^set -/s/^# \{0,1\}//p' "$0" | sed '$d'
        exit 0
        ;;
    --)
        shift
        common=("$@")
        break
        ;;
    --variants)
        shift
        if [ $# -eq 0 ] || [[ $1 == -* ]]; then fail "--variants: needs at least one name" 2; fi
        while [ $# -ge 1 ] && [[ $1 != -* ]]; do
            names+=("$1")
            shift
        done
        continue
        ;;
    --variant | --train-data | --val-data | --tokenizer | --seeds | --steps | --output)
        [ $# -ge 2 ] || fail "$1: needs a value" 2
        case "$1" in
        --variant) own+=("$2") ;;
        --train-data) train_data=$2 ;;
        --val-data) val_data=$2 ;;
        --tokenizer) tokenizer=$2 ;;
        --seeds) seeds=$2 ;;
        --steps) steps=$2 ;;
        --output) output=$2 ;;
        esac
        shift
        ;;
    *) fail "$1: unknown option (see --help; options of train_gpt come after --)" 2 ;;
    esac
    shift
done

[ -n "$train_data" ] || fail "--train-data GLOB: needed, the shards to train on" 2
[ -n "$val_data" ] || fail "--val-data GLOB: needed, the shards to validate on" 2
[ -n "$tokenizer" ] || fail "--tokenizer FILE: needed, the tokenizer.json of the shards" 2
[ -n "$output" ] || fail "--output DIR: needed, where runs, table and plot go" 2
[[ $seeds =~ ^[1-9][0-9]{0,2}$ ]] || fail "--seeds $seeds: want a number of at least 1" 2
[[ $steps =~ ^[1-9][0-9]{0,7}$ ]] || fail "--steps ${steps:-(none)}: want a number of at least 1" 2
for option in "${common[@]}"; do
    case "${option%%=*}" in
    --steps | --seed | --output | --resume | --overwrite | --dry-run | --train-data | --val-data | --tokenizer | --max-seconds | -[xioyj]*)
        fail "$option: not after --, it is set for every cell" 2
        ;;
    esac
done

# Only one's own, or the named ones; an own variant takes the place of one in the table.
for variant in "${own[@]}"; do
    [[ $variant =~ ^[A-Za-z0-9_.-]+\|[^|]*\|[^|]*$ && $variant != .* ]] ||
        fail "--variant $variant: want 'name|flags of make|options of train_gpt', the name of letters, digits, _ . -" 2
done
if [ ${#names[@]} -gt 0 ]; then
    variants=("${own[@]}" "${variants[@]}")
    chosen=()
    for name in "${names[@]}"; do
        variant=$(variant_of "$name") || exit 2
        chosen+=("$variant")
    done
    for variant in "${own[@]}"; do
        if [[ " ${names[*]} " != *" ${variant%%|*} "* ]]; then chosen+=("$variant"); fi
    done
    variants=("${chosen[@]}")
elif [ ${#own[@]} -gt 0 ]; then
    variants=("${own[@]}")
fi
twice=$(printf '%s\n' "${variants[@]%%|*}" | sort | uniq -d | head -n 1)
[ -z "$twice" ] || fail "$twice: named twice" 2

# Where the build goes; flags that are not given have their defaults, whatever the environment says.
top=$(cd "$(dirname "$0")/.." && pwd)
build=${BUILD:-build}
if [[ $build != /* ]]; then build=$top/$build; fi

# Sets flags (of make) and binary for a variant.
flags_of() {
    local flag DEVICE=cpu ATTN=dense GQA=gqa KCONV=0 PRECISION=fp32
    for flag in $1; do
        case "$flag" in
        DEVICE=* | ATTN=* | GQA=* | KCONV=* | PRECISION=*) declare "$flag" ;;
        *) fail "$flag: not a flag of make: want DEVICE=, ATTN=, GQA=, KCONV= or PRECISION=" 2 ;;
        esac
    done
    flags=("DEVICE=$DEVICE" "ATTN=$ATTN" "GQA=$GQA" "KCONV=$KCONV" "PRECISION=$PRECISION")
    binary=$build/train_gpt_${DEVICE}_${ATTN}_${GQA}_kconv${KCONV}_$PRECISION
}
for variant in "${variants[@]}"; do
    IFS='|' read -r _ text _ <<<"$variant"
    flags_of "$text"
done

mkdir -p "$output" 2>/dev/null || fail "--output $output: cannot make this directory"
exec 9>"$output/lock"
flock -n 9 || fail "--output $output: another comparison is at work there"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# ----------------------------------------------------------------------------
# Build, and try the options of every variant before the first is trained

# Sets name, flags, binary and command for a variant: all of its command but seed and output.
prepare() {
    local text options
    IFS='|' read -r name text options <<<"$1"
    flags_of "$text"
    read -ra options <<<"$options"
    local every=$(((steps + 9) / 10)) quarter=$(((steps + 3) / 4))
    command=(--train-data "$train_data" --val-data "$val_data" --tokenizer "$tokenizer" --val-every "$every"
        --checkpoint-every "$quarter" --keep 1 "${common[@]}" "${options[@]}" --steps "$steps")
}

for variant in "${variants[@]}"; do
    prepare "$variant"
    echo "building $name: ${flags[*]}"
    if ! make -C "$top" --no-print-directory train "BUILD=$build" "${flags[@]}" >"$output/build.log" 2>&1; then
        reason=$(sed -n 's/.*\*\*\* \(.*: must be one of: .*\)\. *Stop\.$/\1/p' "$output/build.log")
        if [ -n "$reason" ]; then fail "$name: $reason" 2; fi
        fail "$name: the build failed; see $output/build.log"
    fi
    status=0
    "$binary" "${command[@]}" --dry-run >/dev/null 2>"$scratch/errors" || status=$?
    [ $status -eq 0 ] || fail "$name: $(head -n 1 "$scratch/errors")" $status
done

# ----------------------------------------------------------------------------
# Train: seed by seed, so that what is there after an interruption can be compared

finished() { # cell
    grep -q "^{\"step\":$steps,.*\"val_loss\":[-0-9]" "$1/metrics.jsonl" 2>/dev/null &&
        [ -s "$1/$(printf 'step_%08d' "$steps")/model.safetensors" ]
}

# A signal to this script goes to the training program, which writes a checkpoint and ends.
child=""
interrupted=""
stop() {
    interrupted=yes
    if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap stop INT TERM

train_cell() { # seed; the variant is prepared
    local cell=$output/$name/seed_$1 status=0
    mkdir -p "$output/$name"
    printf '%q ' "${flags[@]}" "${command[@]}" --seed "$1" >"$scratch/settings"
    if [ -e "$cell.settings" ]; then
        cmp -s "$scratch/settings" "$cell.settings" ||
            fail "$cell: was begun with other options ($cell.settings); name another --output or delete $output/$name"
    fi
    if finished "$cell"; then
        echo "$name, seed $1: finished before"
        return
    fi
    cp "$scratch/settings" "$cell.settings"
    echo "$name, seed $1: $(date +%H:%M:%S), watch it with tail -f $cell.log"
    "$binary" "${command[@]}" --seed "$1" --output "$cell" --resume >>"$cell.log" 2>"$cell.errors" &
    child=$!
    # A trapped signal ends the wait before the child has ended.
    while kill -0 "$child" 2>/dev/null; do
        status=0
        wait "$child" || status=$?
    done
    child=""
    if [ -n "$interrupted" ]; then fail "interrupted at $name, seed $1; the same line goes on from there" 130; fi
    [ $status -eq 0 ] || fail "$name, seed $1: exit code $status: $(head -n 1 "$cell.errors")"
    finished "$cell" || fail "$name, seed $1: ended without a validation and a checkpoint of step $steps; see $cell.log"
    rm "$cell.errors"
}

for ((seed = first_seed; seed < first_seed + seeds; seed++)); do
    for variant in "${variants[@]}"; do
        prepare "$variant"
        if [ -n "$interrupted" ]; then fail "interrupted before $name, seed $seed; the same line goes on from there" 130; fi
        train_cell "$seed"
    done
done

# ----------------------------------------------------------------------------
# Table and plot

# One line for a cell: parameters in millions, validation loss, tokens, milliseconds of its steps and of their attention, peak
# memory in MB.
cell_line() {
    awk '
        function number(key) {
            return match($0, "\"" key "\":[^,}]*") ? substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3) + 0 : 0
        }
        / M parameters,/ { parameters = $1 }
        /^peak memory/ { if ($3 > memory) memory = $3 }
        /"step_ms"/ {
            steps = number("step") - before
            busy += number("step_ms") * steps
            attention += number("attention_ms") * steps
            before = number("step")
            tokens = number("tokens")
        }
        /"val_loss"/ { loss = number("val_loss") }
        END { printf "%s %.9g %d %.3f %.3f %s\n", parameters, loss, tokens, busy, attention, memory + 0 }
    ' "$1.log" "$1/timings.jsonl" "$1/metrics.jsonl"
}

json_text() {
    local text=${1//\\/\\\\}
    printf '"%s"' "${text//\"/\\\"}"
}

# A row of the table, as Markdown or JSON, from the lines of its cells.
row() { # kind, name, flags and options as JSON members
    awk -v kind="$1" -v name="$2" -v members="${3//\\/\\\\}" '
        { parameters = $1; loss[NR] = $2; sum += $2; if ($4 > 0) { rate += 1000 * $3 / $4; share += $5 / $4 }; if ($6 > memory) memory = $6 }
        END {
            mean = sum / NR
            for (i = 1; i <= NR; i++) { square += (loss[i] - mean) ^ 2; all = all (i > 1 ? ", " : "") loss[i] }
            sd = NR > 1 ? sqrt(square / (NR - 1)) : 0
            if (kind == "markdown")
                printf "| %s | %.2f M | %.4f | %s | %.0f | %.0f %% | %s |\n", name, parameters, mean,
                    (NR > 1 ? sprintf("%.4f", sd) : "-"), rate / NR, 100 * share / NR, (memory ? sprintf("%.0f MB", memory) : "-")
            else
                printf "    {%s, \"parameters_millions\": %s, \"val_losses\": [%s], \"val_loss_mean\": %.6f, \"val_loss_sd\": %s, \"tokens_per_second\": %.1f, \"attention_share\": %.4f, \"peak_memory_mb\": %s}",
                    members, parameters, all, mean, (NR > 1 ? sprintf("%.6f", sd) : "null"), rate / NR, share / NR, (memory ? memory : "null")
        }' "$scratch/cells"
}

labelled=()
{
    echo "| variant | parameters | validation loss, mean of $seeds | standard deviation | tokens/s | attention | peak memory |"
    echo "|---|---|---|---|---|---|---|"
} >"$scratch/table.md"
printf '{\n  "steps": %d,\n  "seeds": [%s],\n  "options": %s,\n  "variants": [' "$steps" \
    "$(seq -s ', ' "$first_seed" $((first_seed + seeds - 1)))" "$(json_text "${common[*]}")" >"$scratch/table.json"
separator=""
for variant in "${variants[@]}"; do
    IFS='|' read -r name text options <<<"$variant"
    for ((seed = first_seed; seed < first_seed + seeds; seed++)); do
        cell_line "$output/$name/seed_$seed"
        labelled+=("$name=$output/$name/seed_$seed")
    done >"$scratch/cells"
    row markdown "$name" "" >>"$scratch/table.md"
    printf '%s\n' "$separator" >>"$scratch/table.json"
    row json "$name" "\"name\": \"$name\", \"flags\": $(json_text "$text"), \"options\": $(json_text "$options")" >>"$scratch/table.json"
    separator=","
done
printf '\n  ]\n}\n' >>"$scratch/table.json"
cp "$scratch/table.md" "$scratch/table.json" "$output/"

"$top/scripts/plot.sh" --band "${labelled[@]}" --output "$output/loss" --title "${common[*]}" >/dev/null
cat "$output/table.md"
echo "done. Table (table.md, table.json) and curves (loss.png, loss.svg) are in $output"

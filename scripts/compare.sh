#!/usr/bin/env bash
# Compares variants of the model: builds the trainer, trains each variant with the same seeds and the
# same order of data, and writes a table and a plot. After an interruption, the same command resumes
# the comparison and repeats no finished run.
#
#   scripts/compare.sh --train-data 'data/mine_train_*.bin' --val-data 'data/mine_val_*.bin' --tokenizer data/tokenizer.json \
#       --seeds 3 --steps 2000 --output runs/kinds -- --layers 4 --channels 128 --heads 8 --kv-heads 2 -t 256 -b 8
#
#   --variants NAME...                the variants to run, from the table below (default: all)
#   --variant 'name|flags|options'    adds or replaces a variant: its name, flags of make, options of train_gpt.
#                                     May be repeated. Without --variants, the script runs only these variants.
#   --seeds N --steps N               number of seeds (1337, 1338, ...; default 3) and steps of each run
#   -- OPTION...                      options of train_gpt that all variants share
#
# A cell is one run: one variant with one seed. --output/NAME/seed_N is its train_gpt output directory, with a log and
# settings beside it. The script refuses a cell that began with other settings. It writes table.md, table.json,
# loss.png and loss.svg into --output. In the table, the loss is the validation loss after the last step, and the
# spread is its standard deviation over seeds. Tokens/s (training steps alone) and attention's share of a step are
# means over the seeds. Peak memory is the largest.
#
# The script compares variants after equal numbers of tokens. The table and the plot mark a variant with another
# number, with the reason: its own --max-seconds stopped a run, or its options change the tokens of a step. The table
# also marks a variant whose sequences have another length.
set -euo pipefail
self=$(readlink -f -- "$0")
# shellcheck source=scripts/shared.sh
. "${self%/*}/shared.sh"

# name, flags of make, options of train_gpt. The block sizes suit sequences of about 256 tokens.
variants=(
    "dense|ATTN=dense|"
    "moba|ATTN=moba|--moba-block 32 --moba-topk 3"
    "flashmoba|ATTN=flashmoba KCONV=3|--moba-block 32 --moba-topk 3"
    "kdgqa|GQA=kdgqa|"
)
first_seed=1337

# ----------------------------------------------------------------------------
# Options

# Prints the table's entry of this name.
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
        usage
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
needs jq gnuplot make
path output

# Refuses options that this script sets itself, and their abbreviations, such as --out.
refuse_own() { # where the user wrote them, options
    local option own
    for option in "${@:2}"; do
        if [[ $option == -[xioyj]* ]]; then fail "$option: not $1, it is set for every cell" 2; fi
        [[ $option == --?* ]] || continue
        for own in --steps --seed --output --resume --overwrite --dry-run --train-data --val-data --tokenizer; do
            if [[ $own == "${option%%=*}"* ]]; then fail "$option: not $1, it is set for every cell" 2; fi
        done
    done
}
refuse_own "after --" "${common[@]}"
for option in "${common[@]}"; do
    if [[ ${option%%=*} == --max* ]]; then fail "$option: not after --, every cell does all its steps" 2; fi
done

# With --variant alone, the script runs only the user's variants. A user's variant replaces
# the table's variant of the same name.
for variant in "${own[@]}"; do
    [[ $variant =~ ^[A-Za-z0-9_.-]+\|[^|]*\|[^|]*$ && $variant != [.-]* && $variant != *[[:cntrl:]]* ]] ||
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

# The build directory. make accepts no names with spaces, so the script gives make a path
# relative to the top of the tree.
build=${BUILD:-build}
build=${build#"$top"/}
[[ $build =~ ^[A-Za-z0-9_./+,@-]+$ ]] || fail "BUILD=$build: make takes no such name; want letters, digits and _ . / + , @ -" 2
programs=$build
if [[ $build != /* ]]; then programs=$top/$build; fi

# Sets flags (of make), and the binary and the options (kinds) that they select. Flags that the variant does not give
# have their defaults; the environment does not change them. One trainer has all kinds of attention, query heads and
# key convolution, so make builds one for each DEVICE and PRECISION.
flags_of() {
    local flag DEVICE=cpu ATTN=dense GQA=gqa KCONV=0 PRECISION=fp32
    for flag in $1; do
        case "$flag" in
        DEVICE=* | ATTN=* | GQA=* | KCONV=* | PRECISION=*) declare "$flag" ;;
        *) fail "$flag: not a flag of make: want DEVICE=, ATTN=, GQA=, KCONV= or PRECISION=" 2 ;;
        esac
    done
    flags=("DEVICE=$DEVICE" "ATTN=$ATTN" "GQA=$GQA" "KCONV=$KCONV" "PRECISION=$PRECISION")
    binary=$programs/train_gpt_${DEVICE}_$PRECISION
    kinds=(--attention "$ATTN" --query-heads "$GQA" --kconv "$KCONV")
}
for variant in "${variants[@]}"; do
    IFS='|' read -r name text options <<<"$variant"
    flags_of "$text"
    read -ra options <<<"$options"
    refuse_own "in --variant $name" "${options[@]}"
done

# The lock file names the process that holds the lock. Its training program inherits the lock: after a kill of the
# comparison, no other one starts until that program has ended.
holder() {
    local process since
    IFS=' ' read -r process since <"$output/lock" || true
    if kill -0 "$process" 2>/dev/null; then
        echo "process $process has been comparing there since $since"
    else
        echo "a training program that process ${process:-(unknown)} started there (since ${since:-(unknown)}) still runs"
    fi
}
make_directory "$output"
{ exec 9>>"$output/lock"; } 2>/dev/null || fail "--output $output: cannot be written to"
flock -n 9 || fail "--output $output: $(holder)"
printf '%s %s on %s\n' $$ "$(date '+%F %T')" "${HOSTNAME:-this machine}" >"$output/lock" || fail "--output $output: cannot be written to"
resumes="the same line goes on from there"
take_signals
make_scratch

# ----------------------------------------------------------------------------
# Build, and check the options of every variant before the first one trains

# Sets name, flags, binary, kinds and command for a variant. The command lacks only seed and output.
prepare() {
    local text options
    IFS='|' read -r name text options <<<"$1"
    flags_of "$text"
    read -ra options <<<"$options"
    local every=$(((steps + 9) / 10)) quarter=$(((steps + 3) / 4))
    command=(--train-data "$train_data" --val-data "$val_data" --tokenizer "$tokenizer" --val-every "$every"
        --checkpoint-every "$quarter" --keep 1 "${common[@]}" "${options[@]}" --steps "$steps")
}

lock_build "$build"
for variant in "${variants[@]}"; do
    prepare "$variant"
    say "building $name: ${flags[*]}"
    : >"$output/build.log" || fail "$output/build.log: cannot be written"
    if ! run make -C "$top" --no-print-directory "BUILD=$build" train "${flags[0]}" "${flags[4]}" >"$output/build.log" 2>&1; then
        reason=$(sed -n 's/.*\*\*\* \(.*: must be one of: .*\)\. *Stop\.$/\1/p' "$output/build.log")
        if [ -n "$reason" ]; then fail "$name: $reason" 2; fi
        fail "$name: the build failed; see $output/build.log"
    fi
    status=0
    run "$binary" "${kinds[@]}" "${command[@]}" --dry-run >/dev/null 2>"$scratch/errors" || status=$?
    [ $status -eq 0 ] || fail "$name: $(tail -n 1 "$scratch/errors")" $status
done
exec {build_lock}>&-

# ----------------------------------------------------------------------------
# Train all variants with one seed before the next seed, so that an interrupted comparison has comparable runs

# A cell is finished when it has a checkpoint and a validation of the last step. If the variant has its own
# --max-seconds, train_cell also accepts a run that this limit ended.
finished() { # cell
    [ -s "$1/metrics.jsonl" ] && [ -s "$1/$(printf 'step_%08d' "$steps")/model.safetensors" ] &&
        [ -n "$(json_lines "select(.step == $steps) | .val_loss | finite" <"$1/metrics.jsonl")" ]
}

train_cell() { # seed; call prepare for the variant first
    local cell=$output/$name/seed_$1 status=0
    make_directory "$output/$name"
    printf '%q ' "${flags[@]}" "${command[@]}" --seed "$1" >"$scratch/settings"
    if [ -e "$cell.settings" ]; then
        cmp -s "$scratch/settings" "$cell.settings" ||
            fail "$cell: was begun with other options ($cell.settings); name another --output or delete $output/$name"
    fi
    if finished "$cell"; then
        say "$name, seed $1: finished before"
        return
    fi
    publish "$scratch/settings" "$cell.settings"
    say "$name, seed $1: $(date +%H:%M:%S), watch it with tail -f $cell.log"
    run "$binary" "${kinds[@]}" "${command[@]}" --seed "$1" --output "$cell" --resume >>"$cell.log" 2>"$scratch/errors" || status=$?
    [ $status -eq 0 ] || fail "$name, seed $1: exit code $status: $(tail -n 1 "$scratch/errors")"
    finished "$cell" || [[ " ${command[*]}" == *" --max"* ]] ||
        fail "$name, seed $1: ended without a validation and a checkpoint of step $steps; see $cell.log"
}

for ((seed = first_seed; seed < first_seed + seeds; seed++)); do
    for variant in "${variants[@]}"; do
        prepare "$variant"
        train_cell "$seed"
    done
done

# ----------------------------------------------------------------------------
# Table and plot

labelled=()
for variant in "${variants[@]}"; do
    IFS='|' read -r name text options <<<"$variant"
    for ((seed = first_seed; seed < first_seed + seeds; seed++)); do
        labelled+=("$name=$output/$name/seed_$seed")
        summary "$output/$name/seed_$seed" "$output/$name/seed_$seed.log" | jq -c --arg name "$name" --arg flags "$text" \
            --arg options "$options" --argjson seed "$seed" '{name: $name, flags: $flags, options: $options, seed: $seed} + .'
    done
done >"$scratch/cells"

# The rows have the order of the variants. A row is comparable if it has the number of tokens that most complete runs
# have, and the sequence length of the first row.
jq -s --argjson steps "$steps" --arg options "${common[*]}" '
    def mean: add / length;
    def rounded: if . == null then null else . * 1e6 | round / 1e6 end;
    (map(select(.step == $steps)) | group_by(.tokens) | max_by([length, .[0].tokens]) | .[0].tokens) as $tokens
    | .[0].sequence_length as $length
    | . as $cells
    | {steps: $steps, seeds: (map(.seed) | unique), options: $options, variants: [
        reduce $cells[].name as $name ([]; if index($name) then . else . + [$name] end) | .[] as $name
        | [$cells[] | select(.name == $name)] | . as $runs | map(.val_loss | numbers) as $losses
        | [ (.[] | select(.step < $steps) | "seed \(.seed) stopped at step \(.step) of \($steps)"
                + if .val_step == null then "" else ", loss of step \(.val_step)" end),
            (map(.tokens) | unique | select(all($runs[]; .step == $steps)) | select(. != [$tokens]) | "\(map(tostring) | join(", ")) tokens, others \($tokens)"),
            (.[0].sequence_length | select(. != $length) | "sequences of \(.), others of \($length)") ] as $notes
        | .[0] | {
            name, flags, options, parameters_millions,
            val_losses: ($runs | map(.val_loss)),
            val_loss_mean: (if ($losses | length) == 0 then null else $losses | mean | rounded end),
            val_loss_sd: (if ($losses | length) < 2 then null else
                ($losses | mean) as $mean | $losses | (map((. - $mean) * (. - $mean)) | add) / (length - 1) | sqrt | rounded end),
            tokens: ($runs | map(.tokens)),
            tokens_per_second: ($runs | map(select(.busy_ms > 0) | 1000 * .tokens / .busy_ms) | if length == 0 then null else mean | rounded end),
            attention_share: ($runs | map(select(.busy_ms > 0) | .attention_ms / .busy_ms) | if length == 0 then null else mean | rounded end),
            peak_memory_mb: ($runs | map(.peak_memory_mb) | max | select(. > 0) // null),
            comparable: ($notes | length == 0), note: ($notes | if length == 0 then null else join("; ") end) }]}
' <"$scratch/cells" >"$scratch/table.json"

markdown() {
    local name parameters mean sd tokens rate attention memory note cell
    echo "| variant | parameters | validation loss, mean of $seeds | standard deviation | tokens | tokens/s | attention | peak memory |"
    echo "|---|---|---|---|---|---|---|---|"
    # read skips empty fields, so a missing value becomes a dash.
    jq -r '.variants[] | [.name, .parameters_millions, .val_loss_mean, .val_loss_sd, (.tokens | add / length / 1e6),
        .tokens_per_second, (.attention_share | numbers * 100) // null, .peak_memory_mb, .note] | map(. // "-") | @tsv' <"$scratch/table.json" |
        while IFS=$'\t' read -r name parameters mean sd tokens rate attention memory note; do
            if [ "$note" != - ]; then name+=" (not comparable: $note)"; fi
            printf '| %s |' "$name"
            for cell in "%.2f M=$parameters" "%.4f=$mean" "%.4f=$sd" "%.3f M=$tokens" "%.0f=$rate" "%.0f %%=$attention" "%.0f MB=$memory"; do
                # shellcheck disable=SC2059 # the format of this column
                if [ "${cell##*=}" = - ]; then printf ' - |'; else printf " ${cell%%=*} |" "${cell##*=}"; fi
            done
            printf '\n'
        done
}
markdown >"$scratch/table.md"

"$top/scripts/plot.sh" --band --output "$output/loss" --title "${common[*]}" -- "${labelled[@]}" >/dev/null
publish "$scratch/table.md" "$output/table.md"
publish "$scratch/table.json" "$output/table.json"
show "$output/table.md"
say "done. Table (table.md, table.json) and curves (loss.png, loss.svg) are in $output"

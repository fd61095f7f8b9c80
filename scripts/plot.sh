#!/usr/bin/env bash
# Draws the training and validation loss of one or more runs over tokens and over seconds.
#
#   scripts/plot.sh runs/mha runs/gqa --output curves               writes curves.png and curves.svg
#   scripts/plot.sh "4 KV heads=runs/a" "1 KV head=runs/b" -o curves --title "Tiny Stories"
#   scripts/plot.sh --band mha=runs/a1 mha=runs/a2 gqa=runs/b1 gqa=runs/b2 -o curves
#
# A run is the output directory of train_gpt (--output). Its name in the legend is the directory's name, or NAME of
# NAME=DIR. Losses come from metrics.jsonl and seconds from timings.jsonl. If a run has no timings.jsonl, the script
# draws only the first panel. The training loss is smoothed by an exponential moving average of the logged losses, and
# the figure says so. Its memory is 5 % of the run (--smooth PERCENT; 0 turns it off). The loss axis ends at the
# largest loss after the first twentieth of a run. Seconds are wall-clock time and include validation and checkpoints.
# Runs differ in dash and marker, so that the figure is readable without colour.
#
# --band draws the runs of one name, which differ in their seed, as one curve: the mean of their validation losses, with
# a band from the least to the largest. The curve has the validations that all these runs made, at their mean seconds.
#
# The legend marks runs that cannot be compared. If a run stopped early, the legend gives its steps. If the other runs
# have different numbers of tokens, the legend gives the tokens of each.
set -euo pipefail
self=$(readlink -f -- "$0")
# shellcheck source=scripts/shared.sh
. "${self%/*}/shared.sh"

output="" title="" smooth=5 band=0 runs=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    -o | --output | --title | --smooth)
        [ $# -ge 2 ] || fail "$1: needs a value" 2
        case "$1" in
        --title) title=$2 ;;
        --smooth) smooth=$2 ;;
        *) output=$2 ;;
        esac
        shift
        ;;
    --band) band=1 ;;
    --)
        runs+=("${@:2}")
        break
        ;;
    -*) fail "$1: unknown option (see --help)" 2 ;;
    *) runs+=("$1") ;;
    esac
    shift
done
[ ${#runs[@]} -gt 0 ] || fail "no run given: name at least one output directory of train_gpt" 2
[ -n "$output" ] || fail "--output PREFIX: needed; PREFIX.png and PREFIX.svg are written" 2
[[ $output != */ ]] || fail "--output $output: ends in a slash; want the beginning of two file names" 2
[[ $smooth =~ ^[0-9]{1,2}(\.[0-9]+)?$ ]] || fail "--smooth $smooth: want a percentage of the run, from 0 to 99" 2
needs gnuplot jq
path output
take_signals
make_scratch
if [[ $output == */* ]]; then make_directory "${output%/*}/"; fi

# ----------------------------------------------------------------------------
# Writes the lines of each run as columns: tokens, seconds (or nan), loss, in N.train and N.val.

# Prints one line for each value: kind, step, value. The lines are in order of steps, and
# within one step in order of the files.
# shellcheck disable=SC2016 # variables of jq
values() { # directory
    {
        if [ -s "$1/timings.jsonl" ]; then
            json_lines 'select(.step | finite) | select(.seconds | finite)
                | if .event == "validation" then "val_seconds \(.step) \(.seconds)" elif .event == null then "seconds \(.step) \(.seconds)" else empty end' \
                <"$1/timings.jsonl"
        fi
        json_lines 'if .event == "start" or .event == "resume" then (.steps | finite | "steps 0 \(.)")
            else select(.step | finite) | select(.tokens | finite) | . as $line | ("loss", "val_loss") as $kind
                | $line[$kind] | finite | "\($kind) \($line.step) \(.) \($line.tokens)" end' <"$1/metrics.jsonl"
    } | sort -s -n -k 2,2
}

# Prints four numbers: the upper end of the loss axis (the largest loss after the run's first twentieth), the run's
# tokens, the finished steps, and the planned steps, or 0 if the run does not give them.
columns() { # directory, files
    values "$1" | awk -v name="$2" -v smooth="$smooth" '
        BEGIN { train = name ".train"; val = name ".val" }
        $1 == "steps" { planned = $3; next }
        $1 == "seconds" { seconds[$2] = $3; next }
        $1 == "val_seconds" { val_seconds[$2] = $3; next }
        { done = $2; last = $4 }
        $1 == "loss" { if (!($2 in loss)) order[++count] = $2; loss[$2] = $3; tokens[$2] = $4 }
        $1 == "val_loss" { if (!($2 in val_loss)) val_order[++validations] = $2; val_loss[$2] = $3; val_tokens[$2] = $4 }
        END {
            memory = count * smooth / 100
            keep = memory > 1 ? 1 - 1 / memory : 0
            for (i = 1; i <= count; i++) {
                step = order[i]
                sum = keep * sum + loss[step]; weight = keep * weight + 1
                print tokens[step], (step in seconds ? seconds[step] : "nan"), sum / weight > train
                if (tokens[step] + 0 >= last / 20 && sum / weight > top) top = sum / weight
            }
            for (i = 1; i <= validations; i++) {
                step = val_order[i]
                when = step in val_seconds ? val_seconds[step] : step in seconds ? seconds[step] : "nan"
                print val_tokens[step], when, val_loss[step] > val
                if (val_tokens[step] + 0 >= last / 20 && val_loss[step] + 0 > top) top = val_loss[step] + 0
            }
            print top + 0, last + 0, done + 0, planned + 0
        }'
}

# From here on all files have short names, so that awk and gnuplot never read a name of the user.
caller=$PWD
absolute() { if [[ $1 == /* ]]; then printf %s "$1"; else printf '%s/%s' "$caller" "$1"; fi; }
cd "$scratch"
timed=1 top_loss=0 names=() directories=() tokens=() notes=()
for i in "${!runs[@]}"; do
    directory=${runs[i]} name=""
    if [[ $directory == *=* && ! -d $(absolute "$directory") ]]; then name=${directory%%=*} directory=${directory#*=}; fi
    found=$(absolute "$directory")
    if [ -z "$name" ]; then
        name=${directory%"${directory##*[!/]}"}
        name=${name##*/}
    fi
    [ -d "$found" ] || fail "$directory: no such directory; a run is what train_gpt --output names"
    [ -s "$found/metrics.jsonl" ] || fail "$directory: holds no run: metrics.jsonl is missing or empty"
    [ -r "$found/metrics.jsonl" ] || fail "$directory/metrics.jsonl: may not be read"
    [ -s "$found/timings.jsonl" ] || timed=0
    : >"$i.train"
    : >"$i.val"
    columns "$found" "$i" >"$i.end" 2>log || fail "$directory: $(tail -n 1 log)"
    read -r run_top run_tokens steps planned <"$i.end"
    [ -s "$i.train" ] || [ -s "$i.val" ] || fail "$directory/metrics.jsonl: has no loss yet"
    top_loss=$(awk -v a="$top_loss" -v b="$run_top" 'BEGIN { print (a > b ? a : b) }')
    note=""
    if [ "$steps" -lt "$planned" ]; then note="only $steps of $planned steps"; fi
    names+=("$name") directories+=("$directory") tokens+=("$run_tokens") notes+=("$note")
done

# ----------------------------------------------------------------------------
# With --band, the runs of one name become one file of columns: tokens, mean seconds, mean, least and largest loss.

group_runs() {
    local i j name labels=("${names[@]}") tokens_of=("${tokens[@]}") notes_of=("${notes[@]}") cut=()
    names=() tokens=() notes=()
    for i in "${!labels[@]}"; do
        name=${labels[i]}
        [ -s "$i.val" ] || fail "${directories[i]}: has no validation yet, and --band draws nothing else"
        for j in "${!names[@]}" new; do
            if [ "$j" = new ] || [ "${names[j]}" = "$name" ]; then break; fi
        done
        if [ "$j" = new ]; then
            j=${#names[@]}
            names+=("$name") counts+=(0) cut+=(0) tokens+=("${tokens_of[i]}")
            : >"$j.group"
        fi
        cat <"$i.val" >>"$j.group"
        counts[j]=$((counts[j] + 1))
        if [ -n "${notes_of[i]}" ]; then cut[j]=$((cut[j] + 1)); fi
        if [ "${tokens_of[i]}" != "${tokens[j]}" ]; then tokens[j]="different numbers of"; fi
    done
    for j in "${!names[@]}"; do
        : >"$j.train"
        awk -v runs="${counts[j]}" '
            { count[$1]++; seconds[$1] += $2; sum[$1] += $3 }
            count[$1] == 1 || $3 < least[$1] { least[$1] = $3 }
            count[$1] == 1 || $3 > largest[$1] { largest[$1] = $3 }
            END { for (at in count) if (count[at] == runs) print at, seconds[at] / runs, sum[at] / runs, least[at], largest[at] }
        ' <"$j.group" | sort -n >"$j.val"
        [ -s "$j.val" ] || fail "${names[j]}: its runs have no validation at the same number of tokens"
        notes[j]=""
        if [ "${cut[j]}" -gt 0 ]; then notes[j]="${cut[j]} of ${counts[j]} runs stopped early"; fi
    done
}
counts=()
if [ "$band" = 1 ]; then group_runs; fi

# If curves end at different numbers of tokens, their names in the legend say so.
all_equal=1 first=""
for i in "${!names[@]}"; do
    if [ -n "${notes[i]}" ]; then continue; fi
    first=${first:-${tokens[i]}}
    if [ "${tokens[i]}" != "$first" ] || [[ ${tokens[i]} == different* ]]; then all_equal=0; fi
done
for i in "${!names[@]}"; do
    if [ -z "${notes[i]}" ] && [ $all_equal = 0 ]; then notes[i]="${tokens[i]} tokens"; fi
    if [ -n "${notes[i]}" ]; then names[i]+=" (${notes[i]})"; fi
done

# ----------------------------------------------------------------------------
# The figure

# Puts a text into gnuplot's single quotes, where only the quote itself has a meaning. Drawing and
# SVG need UTF-8 without control characters.
quote() {
    local text=${1//[[:cntrl:]]/ }
    text=$(iconv -f UTF-8 -t UTF-8 <<<"$text" 2>/dev/null) || text=$(tr '\200-\377' '?' <<<"$text")
    printf "'%s'" "${text//\'/\'\'}"
}

# Runs differ in colour (each of another brightness), dash and marker.
colours=('#000000' '#c1440e' '#2878b5' '#6b9e3e' '#8d5fa8' '#b8860b' '#7a7a7a' '#d48fb0')
dashes=('solid' "'-'" "'.'" "'_.'" "'-..'" "'_-'" "'..-'" "'__..'")
markers=(7 4 9 2 12 10 3 6)

# Prints the plot commands of one panel; $1 is the x column of its files.
curves() {
    local parts=() i style
    if [ "$band" = 1 ]; then
        for i in "${!names[@]}"; do
            parts+=("'$i.val' using $1:4:5 with filledcurves lc rgb '${colours[i % 8]}' fs transparent solid 0.2 noborder notitle")
        done
    fi
    for i in "${!names[@]}"; do
        style="lc rgb '${colours[i % 8]}' dt ${dashes[i % 8]}"
        if [ -s "$i.train" ]; then
            parts+=("'$i.train' using $1:3 with lines $style lw 1 notitle")
        fi
        if [ -s "$i.val" ]; then
            parts+=("'$i.val' using $1:3 with linespoints $style lw 2.2 pt ${markers[i % 8]} ps 0.9 title $(quote "${names[i]}")")
        else
            parts+=("NaN with lines $style lw 2.2 title $(quote "${names[i]}")")
        fi
    done
    local joined
    printf -v joined '%s, ' "${parts[@]}"
    echo "plot ${joined%, }"
}

panels=1
if [ "$timed" = 1 ]; then panels=2; fi
draw() {
    cat <<SETTINGS
set terminal $1
set output '$2'
set encoding utf8
set multiplot layout 1,$panels title $heading noenhanced font ',12'
set grid lc rgb '#c8c8c8' lw 0.6 dt solid
set border 3 lw 1
set tics nomirror out
set key top right Left reverse samplen 5 spacing 1.25 noenhanced
set yrange [*:$top_loss]
set xrange [0:*]
set xtics autofreq
set format x '%.0s%c'
set ylabel 'loss (nats a token)'
set xlabel 'training tokens'
SETTINGS
    curves 1
    if [ "$panels" = 2 ]; then
        printf '%s\n' "set format x '%g'" "set xlabel 'seconds on the clock'" "unset key"
        curves 2
    fi
    echo "unset multiplot"
}

heading="with markers: validation loss; thin: training loss"
if [ "$smooth" != 0 ]; then heading+=" (moving average over $smooth % of the run)"; fi
if [ "$band" = 1 ]; then
    least=$(printf '%s\n' "${counts[@]}" | sort -n | head -n 1)
    largest=$(printf '%s\n' "${counts[@]}" | sort -n | tail -n 1)
    seeds=$least
    if [ "$least" != "$largest" ]; then seeds="$least to $largest"; fi
    heading="validation loss: mean of $seeds runs each, bands from the least to the largest"
fi
heading=$(quote "$heading")
if [ -n "$title" ]; then heading="$(quote "$title") . \"\\n\" . $heading"; fi
width=$((panels * 560))
draw "pngcairo size $((width * 2)),900 font 'sans,11' fontscale 1.8 lw 2 pointscale 1.8 dashlength 1.2" out.png >png.gp
draw "svg size $width,450 dynamic font 'sans,11' lw 1 dashlength 1.2 background 'white'" out.svg >svg.gp
# -d makes gnuplot ignore the user's .gnuplot. gnuplot reports no error on a full disk, so
# the script checks the end of the file.
for kind in png svg; do
    run gnuplot -d "$kind.gp" 2>log || fail "gnuplot failed: $(tail -n 1 log)"
    tail -c 20 "out.$kind" | grep -qaE 'IEND|</svg>' || fail "$scratch/out.$kind: is cut: there is no space for it"
done
for kind in png svg; do publish "out.$kind" "$(absolute "$output.$kind")"; done
say "$output.png, $output.svg"

#!/usr/bin/env bash
# Draws training and validation loss of one or more runs, against tokens and against seconds.
#
#   scripts/plot.sh runs/mha runs/gqa --output curves               writes curves.png and curves.svg
#   scripts/plot.sh "4 KV heads=runs/a" "1 KV head=runs/b" -o curves --title "Tiny Stories"
#   scripts/plot.sh --band mha=runs/a1 mha=runs/a2 gqa=runs/b1 gqa=runs/b2 -o curves
#
# A run is the directory that train_gpt wrote to (--output), named in the legend as the directory or by NAME=DIR. Its
# metrics.jsonl gives the losses, its timings.jsonl the seconds; without the latter only the first panel is drawn. Training
# loss is smoothed, and the figure says so: an exponential moving average of the logged losses whose memory is 5 % of the run
# (--smooth PERCENT; 0 draws it as it is). The loss axis ends at the largest loss after the first twentieth of a run. Seconds
# are those of the clock, validation and checkpoints included. Dash and marker tell the runs apart without colour.
#
# --band draws the runs of one name, which differ in their seed, as one: the mean of their validation losses, and a band from
# the least to the largest. It has the validations that all of them made, at the mean of their seconds.
set -euo pipefail
export LC_ALL=C

fail() {
    echo "plot.sh: $1" >&2
    exit "${2:-1}"
}

output="" title="" smooth=5 band=0 runs=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"
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
    -*) fail "$1: unknown option (see --help)" 2 ;;
    *) runs+=("$1") ;;
    esac
    shift
done
[ ${#runs[@]} -gt 0 ] || fail "no run given: name at least one output directory of train_gpt" 2
[ -n "$output" ] || fail "--output PREFIX: needed; PREFIX.png and PREFIX.svg are written" 2
[[ $smooth =~ ^[0-9]{1,2}(\.[0-9]+)?$ ]] || fail "--smooth $smooth: want a percentage of the run, from 0 to 99" 2
command -v gnuplot >/dev/null || fail "gnuplot is missing: run scripts/install.sh"
mkdir -p "$(dirname "$output")" || fail "$output: cannot make its directory"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# ----------------------------------------------------------------------------
# Each run's lines to columns: tokens, seconds (or nan), loss, in N.train and N.val.

# Prints the upper end of the loss axis for the run: the largest loss after its first twentieth.
columns() {
    awk -v train="$1.train" -v val="$1.val" -v smooth="$smooth" '
        function number(key,    text) {
            if (!match($0, "\"" key "\":[^,}]*")) return ""
            text = substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3)
            return text == "null" || text ~ /1e999/ ? "" : text + 0
        }
        FILENAME ~ /timings.jsonl$/ {
            if ($0 ~ /"event":"validation"/) val_seconds[number("step")] = number("seconds")
            else if ($0 !~ /"event"/) seconds[number("step")] = number("seconds")
            next
        }
        {
            step = number("step"); tokens = number("tokens"); loss = number("loss"); validation = number("val_loss")
        }
        tokens > last { last = tokens }
        loss != "" {
            at[++count] = tokens; losses[count] = loss
            when[count] = (step in seconds) ? seconds[step] : "nan"
        }
        validation != "" {
            if (!(step in val_seconds)) val_seconds[step] = (step in seconds) ? seconds[step] : "nan"
            print tokens, val_seconds[step], validation > val
            val_at[++validations] = tokens; val_loss[validations] = validation
        }
        END {
            memory = count * smooth / 100
            keep = memory > 1 ? 1 - 1 / memory : 0
            for (i = 1; i <= count; i++) {
                sum = keep * sum + losses[i]; weight = keep * weight + 1
                print at[i], when[i], sum / weight > train
                if (at[i] >= last / 20 && sum / weight > top) top = sum / weight
            }
            for (i = 1; i <= validations; i++)
                if (val_at[i] >= last / 20 && val_loss[i] > top) top = val_loss[i]
            print top + 0
        }' "${@:2}"
}

timed=1 top=0 names=()
for i in "${!runs[@]}"; do
    directory=${runs[i]} name=""
    if [[ ! -d $directory && $directory == *=* ]]; then name=${directory%%=*} directory=${directory#*=}; fi
    if [ -z "$name" ]; then name=$(basename "$directory"); fi
    [ -d "$directory" ] || fail "$directory: no such directory; a run is what train_gpt --output names"
    [ -s "$directory/metrics.jsonl" ] || fail "$directory: holds no run: metrics.jsonl is missing or empty"
    files=("$directory/metrics.jsonl")
    if [ -s "$directory/timings.jsonl" ]; then files=("$directory/timings.jsonl" "${files[@]}"); else timed=0; fi
    : >"$scratch/$i.train"
    : >"$scratch/$i.val"
    run_top=$(columns "$scratch/$i" "${files[@]}")
    [ -s "$scratch/$i.train" ] || [ -s "$scratch/$i.val" ] || fail "$directory/metrics.jsonl: has no loss yet"
    top=$(awk -v a="$top" -v b="$run_top" 'BEGIN { print (a > b ? a : b) }')
    names+=("$name")
done

# ----------------------------------------------------------------------------
# With --band: the runs of a name become one, of columns tokens, mean seconds, mean, least and largest loss.

group_runs() {
    local i j name labels=("${names[@]}")
    names=()
    for i in "${!labels[@]}"; do
        name=${labels[i]}
        [ -s "$scratch/$i.val" ] || fail "${runs[i]}: has no validation yet, and --band draws nothing else"
        : >"$scratch/$i.train"
        for j in "${!names[@]}"; do
            if [ "${names[j]}" = "$name" ]; then
                cat "$scratch/$i.val" >>"$scratch/$j.group"
                counts[j]=$((counts[j] + 1))
                continue 2
            fi
        done
        cp "$scratch/$i.val" "$scratch/${#names[@]}.group"
        counts[${#names[@]}]=1
        names+=("$name")
    done
    for j in "${!names[@]}"; do
        awk -v runs="${counts[j]}" '
            { count[$1]++; seconds[$1] += $2; sum[$1] += $3 }
            count[$1] == 1 || $3 < least[$1] { least[$1] = $3 }
            count[$1] == 1 || $3 > largest[$1] { largest[$1] = $3 }
            END { for (at in count) if (count[at] == runs) print at, seconds[at] / runs, sum[at] / runs, least[at], largest[at] }
        ' "$scratch/$j.group" | sort -n >"$scratch/$j.val"
        [ -s "$scratch/$j.val" ] || fail "${names[j]}: its runs have no validation at the same number of tokens"
    done
}
counts=()
if [ "$band" = 1 ]; then group_runs; fi

# ----------------------------------------------------------------------------
# The figure

# Text inside gnuplot's single quotes.
quote() { printf "'%s'" "${1//\'/\'\'}"; }

# What differs from run to run: colour (of different brightness), dash, marker.
colours=('#000000' '#c1440e' '#2878b5' '#6b9e3e' '#8d5fa8' '#b8860b' '#7a7a7a' '#d48fb0')
dashes=('solid' "'-'" "'.'" "'_.'" "'-..'" "'_-'" "'..-'" "'__..'")
markers=(7 4 9 2 12 10 3 6)

# plot commands of one panel: its column, and whether it carries the legend.
curves() {
    local parts=() i style
    if [ "$band" = 1 ]; then
        for i in "${!names[@]}"; do
            parts+=("$(quote "$scratch/$i.val") using $1:4:5 with filledcurves lc rgb '${colours[i % 8]}' fs transparent solid 0.2 noborder notitle")
        done
    fi
    for i in "${!names[@]}"; do
        style="lc rgb '${colours[i % 8]}' dt ${dashes[i % 8]}"
        if [ -s "$scratch/$i.train" ]; then
            parts+=("$(quote "$scratch/$i.train") using $1:3 with lines $style lw 1 notitle")
        fi
        if [ -s "$scratch/$i.val" ]; then
            parts+=("$(quote "$scratch/$i.val") using $1:3 with linespoints $style lw 2.2 pt ${markers[i % 8]} ps 0.9 title $(quote "${names[i]}")")
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
set output $(quote "$2")
set encoding utf8
set multiplot layout 1,$panels title "$heading" noenhanced font ',12'
set grid lc rgb '#c8c8c8' lw 0.6 dt solid
set border 3 lw 1
set tics nomirror out
set key top right Left reverse samplen 5 spacing 1.25 noenhanced
set yrange [*:$top]
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
title=${title//\\/\\\\}
if [ -n "$title" ]; then heading="${title//\"/\\\"}\\n$heading"; fi
width=$((panels * 560))
draw "pngcairo size $((width * 2)),900 font 'sans,11' fontscale 1.8 lw 2 pointscale 1.8 dashlength 1.2" "$scratch/out.png" >"$scratch/png.gp"
draw "svg size $width,450 dynamic font 'sans,11' lw 1 dashlength 1.2 background 'white'" "$scratch/out.svg" >"$scratch/svg.gp"
for kind in png svg; do
    gnuplot "$scratch/$kind.gp" 2>"$scratch/log" || fail "gnuplot failed: $(tail -n 1 "$scratch/log")"
    cp "$scratch/out.$kind" "$output.$kind.partial" || fail "$output.$kind: cannot write"
    mv "$output.$kind.partial" "$output.$kind"
done
echo "$output.png, $output.svg"

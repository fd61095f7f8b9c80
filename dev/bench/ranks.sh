#!/usr/bin/env bash
# Compares two ways to run the CPU trainer with the same total batch: N processes of one thread, and one process of N
# threads. It measures each three times, in turn, and prints the milliseconds of a step and their ratio. On two cores
# of an AMD EPYC with Open MPI 4.1.4, 24 November 2026, two processes were 1.12, 1.21 and 1.13 times as fast.
#
#   dev/bench/ranks.sh              N is the number of cores of this machine
#   dev/bench/ranks.sh 2 --zero 1   N is 2; the rest are options of the trainer
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${BUILD:-build}
ranks=${1:-$(nproc)}
shift || true
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 # mpirun needs them only if the user is root
trainer=$build/train_gpt_cpu_fp32
make --no-print-directory BUILD="$build" "$trainer" "$build/tokenizer"

git ls-files '*.[ch]' '*.cuh' '*.cu' >"$out/files.txt"
"$build/tokenizer" train -q --vocab-size 1024 -o "$out/tokenizer.json" --files-from "$out/files.txt" --max-bytes 1000000
"$build/tokenizer" prepare -q -t "$out/tokenizer.json" --output-prefix "$out/text" --files-from "$out/files.txt" --max-bytes 1000000

# Prints the median milliseconds of a step, without the first two steps.
train() { # name, batch, command...
    local name=$1 batch=$2
    shift 2
    "$@" "$trainer" -i "$out/text_train_*.bin" --layers 6 --channels 384 -t 256 -b "$batch" -d $((ranks * 8 * 256)) -x 8 -v 0 \
        "${more[@]}" -o "$out/$name" --overwrite >"$out/log" 2>&1 || { cat "$out/log" >&2; return 1; }
    sed -n 's/.*"step_ms":\([0-9.]*\),.*/\1/p' "$out/$name/timings.jsonl" | tail -n +3 | sort -g | awk '{ a[NR] = $1 } END { print a[int((NR + 1) / 2)] }'
}
more=("$@")
for turn in 1 2 3; do
    threads=$(train threads $((ranks * 8)) env OMP_NUM_THREADS="$ranks")
    processes=$(train processes 8 mpirun --oversubscribe --bind-to none -np "$ranks")
    awk -v turn="$turn" -v n="$ranks" -v a="$threads" -v b="$processes" \
        'BEGIN { printf "%d: 1 process x %d threads %.1f ms a step, %d processes x 1 thread %.1f ms: %.2f x the speed\n", turn, n, a, n, b, a / b }'
done

#!/usr/bin/env bash
# Runs all checks that need a GPU. They are: the kernels' tests on the hardware, fragment layouts first; the trainer
# against the CPU trainer; 200 steps in bf16 against the same steps in fp32; benchmarks, and the same in PyTorch if it
# is installed. Takes less than 8 minutes on one H200. Prints a table and writes a JSON record. make gpu-check calls it.
#
#   scripts/gpu_check.sh                 exit code 0: every check passed, 1: a check failed, 2: no GPU or no nvcc here
#   scripts/gpu_check.sh --rehearse      the same on the emulator with tiny sizes, which tests only this script
# shellcheck disable=SC2317 # check() calls the functions
set -uo pipefail
self=$(readlink -f -- "$0")
# shellcheck source=scripts/shared.sh
. "${self%/*}/shared.sh"
cd "$top" || exit

build=${BUILD:-build}
out=$build/gpu_check
device=cuda
if [ "${1:-}" = "--rehearse" ]; then device=simt; shift; fi
if [ $# -gt 0 ]; then
    echo "gpu_check.sh: $1: unknown option (there is --rehearse)" >&2
    exit 2
fi

if [ $device = cuda ]; then
    if ! gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | head -n 1) || [ -z "$gpu" ]; then
        echo "gpu-check: there is no GPU on this machine (nvidia-smi finds none): nothing was checked" >&2
        exit 2
    fi
    nvcc=${NVCC:-$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)}
    if [ -z "$nvcc" ]; then
        echo "gpu-check: no nvcc on this machine: nothing was checked; install the CUDA toolkit (12.4 or newer)" >&2
        exit 2
    fi
    cuda=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
else
    gpu="emulator, none, none" cuda=none
fi
rm -rf "$out"
mkdir -p "$out"

# ----------------------------------------------------------------------------
# A check is a command. Its output goes to a log, and the log's last line is the check's detail in the table.

started=$EPOCHREALTIME
since() { awk -v a="$1" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }'; }
quote() { sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e 's/[[:cntrl:]]//g' <<<"$1"; }

checks=() table=() failed=0
note() { # name, result, seconds, detail
    checks+=("{\"name\": \"$1\", \"result\": \"$2\", \"seconds\": $3, \"detail\": \"$(quote "$4")\"}")
    table+=("$(printf '%-34s %-8s %6.1f s  %s' "$1" "$2" "$3" "$4")")
    echo "${table[-1]}"
}
check() { # name, command...
    local name=$1 log=$out/${1// /_}.log begun=$EPOCHREALTIME result=ok
    shift
    "$@" >"$log" 2>&1
    case $? in
    0) ;;
    77) result=skipped ;;
    *) result=FAILED failed=1 ;;
    esac
    note "$name" $result "$(since "$begun")" "$(tail -n 1 "$log" | cut -c 1-110)"
    if [ $result = FAILED ]; then tail -n 12 "$log" | sed 's/^/    /'; fi
    [ $result = ok ]
}

# ----------------------------------------------------------------------------
# Build and run the tests

finish() {
    record=$out/gpu_check_$(tr -cs 'A-Za-z0-9\n' _ <<<"${gpu%%,*}")_$(date -u +%Y-%m-%d).json
    piece() { if [ -s "$out/$1" ]; then cat "$out/$1"; else echo null; fi; }
    {
        printf '{"date": "%s", "commit": "%s", "gpu": "%s", "cuda": "%s", "seconds": %s,\n' \
            "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(git describe --always --dirty 2>/dev/null)" "$(quote "$gpu")" "$cuda" "$(since "$started")"
        printf '"checks": [\n%s\n],\n' "$(IFS=$'\n'; sed '$!s/$/,/' <<<"${checks[*]}")"
        printf '"curves": %s,\n"attention": %s,\n"moba": %s,\n"step_1024": %s,\n"step_8192": %s,\n"peers": %s}\n' "$(piece curves.json)" \
            "$(piece attention.json)" "$(piece moba.json)" "$(piece step_1024.json)" "$(piece step_8192.json)" "$(piece peers.json)"
    } >"$record"
    echo
    echo "$gpu; CUDA $cuda; $(date -u +%Y-%m-%d); $(since "$started") s"
    printf '%s\n' "${table[@]}"
    echo
    for log in attention moba; do if [ -s "$out/$log.log" ]; then cat "$out/$log.log"; fi; done
    for length in 1024 8192; do if [ -s "$out/step_$length.log" ]; then cat "$out/step_$length.log"; fi; done
    if [ -s "$out/peers.json" ]; then cat "$out/PyTorch.log"; fi
    echo
    echo "the record is $record"
    if [ $device = cuda ]; then echo "---> HINT: cp $record docs/results/"; fi
    exit $failed
}

check "build" make --no-print-directory -j"$(nproc)" BUILD="$build" DEVICE=$device HAS_GPU="$([ $device = cuda ] && echo 1)" gpu-check-programs || finish
read -ra tests <<<"$(make --no-print-directory -s BUILD="$build" DEVICE=$device gpu-check-tests)"
for test in "${tests[@]}"; do check "${test##*/}" scripts/run_tests.sh "$test"; done
check "trainer against the CPU's" env BUILD="$build" DEVICE=$device scripts/run_tests.sh "$build/test/test_simt_trainer"

# ----------------------------------------------------------------------------
# 200 steps in bf16, compared with the same steps in fp32

prepare_text() {
    { git ls-files '*.[ch]' '*.cuh' '*.cu' '*.md'; find /usr/include -name '*.h' -type f 2>/dev/null | LC_ALL=C sort; } >"$out/files.txt"
    local source=(--files-from "$out/files.txt" --max-bytes "$text_bytes")
    "$build/tokenizer" train -q --vocab-size 1024 -o "$out/tokenizer.json" "${source[@]}" &&
        "$build/tokenizer" prepare -q -t "$out/tokenizer.json" --output-prefix "$out/text" "${source[@]}"
}
train() {
    "$build/train_gpt_${device}_$1" -i "$out/text_train_*.bin" -j "$out/text_val_*.bin" --tokenizer "$out/tokenizer.json" \
        "${model[@]}" -x 200 -l 1e-3 -u 20 -v 100 -m 4 -o "$out/$1" --overwrite
}
# The mean difference of the two loss curves may be at most 1 %, and so may the difference of
# the last validation losses.
compare_curves() {
    paste -d' ' <(sed -n 's/.*"loss":\([0-9.e-]*\),.*/\1/p' "$out/bf16/metrics.jsonl") <(sed -n 's/.*"loss":\([0-9.e-]*\),.*/\1/p' "$out/fp32/metrics.jsonl") >"$out/losses.txt"
    local bf16 fp32
    bf16=$(sed -n 's/.*"val_loss":\([0-9.e-]*\).*/\1/p' "$out/bf16/metrics.jsonl" | tail -n 1)
    fp32=$(sed -n 's/.*"val_loss":\([0-9.e-]*\).*/\1/p' "$out/fp32/metrics.jsonl" | tail -n 1)
    awk -v bf16="$bf16" -v fp32="$fp32" -v json="$out/curves.json" '
        function abs(x) { return x < 0 ? -x : x }
        { off = abs($1 / $2 - 1); sum += off; if (off > most) most = off }
        END {
            val = abs(bf16 / fp32 - 1)
            printf "{\"steps\": %d, \"mean_difference\": %.6f, \"largest_difference\": %.6f, \"bf16_val_loss\": %.5f, \"fp32_val_loss\": %.5f}\n", \
                NR, sum / NR, most, bf16, fp32 > json
            printf "%d steps: losses differ by %.3f %% in the mean and %.2f %% at most; at the end %.4f in bf16, %.4f in fp32\n", \
                NR, 100 * sum / NR, 100 * most, bf16, fp32
            exit !(NR == 200 && sum / NR <= 0.01 && val <= 0.01)
        }' <"$out/losses.txt"
}

text_bytes=8000000
model=(--layers 6 --channels 384 --heads 6 --kv-heads 2 -t 256 -b 32 -d 16384) small_batch=4
attention=() moba=(-t 32768 -r 10) steps=(--steps 20) short=(--sequence-length 1024 --batch 32) long=(--sequence-length 8192 --batch 4)
if [ $device = simt ]; then
    text_bytes=300000
    model=(--layers 1 --channels 64 --heads 2 -t 32 -b 2 -d 128) small_batch=1
    attention=(-t 64 -q 2 -k 1 -r 2) moba=(-t 128 -B 1 -q 2 -d 32 -s 32 -k 3 -r 3) steps=(--steps 2 --model d1 --vocab 200) short=(--batch 2 --sequence-length 32) long=(--batch 1 --sequence-length 64)
fi
if check "text" prepare_text && check "200 steps in bf16" train bf16 && check "200 steps in fp32" train fp32; then
    check "bf16 learns as fp32 does" compare_curves
fi

# ----------------------------------------------------------------------------
# Many processes. One process with NCCL gives bitwise the results of the program without NCCL. All GPUs together give
# its losses within 0.1 %, and sharded state changes no bit of them.

ranks() { # name, mpirun command or nothing, options...
    local name=$1 by=$2
    shift 2
    # shellcheck disable=SC2086 # words of a command
    $by "$build/train_gpt_${device}_bf16" -i "$out/text_train_*.bin" --tokenizer "$out/tokenizer.json" \
        "${model[@]}" -b "$small_batch" -x 20 -l 1e-3 -u 5 -v 0 -o "$out/$name" --overwrite "$@"
}
one_process_by_nccl() {
    ranks alone "" && ranks one "$mpirun 1" && cmp "$out/alone/metrics.jsonl" "$out/one/metrics.jsonl" &&
        cmp "$out/alone/step_00000020/model.safetensors" "$out/one/step_00000020/model.safetensors" &&
        echo "20 steps by mpirun -np 1: bitwise those without"
}
all_gpus_together() {
    ranks many "$mpirun $gpus" --zero 0 && ranks sharded "$mpirun $gpus" --zero 1 &&
        cmp "$out/many/metrics.jsonl" "$out/sharded/metrics.jsonl" &&
        paste -d' ' <(sed -n 's/.*"loss":\([0-9.e-]*\),.*/\1/p' "$out/many/metrics.jsonl") <(sed -n 's/.*"loss":\([0-9.e-]*\),.*/\1/p' "$out/alone/metrics.jsonl") |
        awk -v gpus="$gpus" '{ off = $1 / $2 - 1; if (off < 0) off = -off; if (off > most) most = off }
            END { printf "20 steps by %d processes: losses within %.2g of one, --zero 1 bitwise --zero 0\n", gpus, most; exit !(NR == 20 && most < 1e-3) }'
}
gpus=2 # on GPUs: the largest power of two that the machine has, at most 16
if [ $device = cuda ]; then gpus=$(nvidia-smi -L | wc -l | awk '{ for (n = 1; 2 * n <= $1 && n < 16; n *= 2); print n }'); fi
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 # mpirun needs them only if the user is root
mpirun="mpirun --oversubscribe --bind-to none -np"
if command -v mpirun >/dev/null && check "one process by mpirun" one_process_by_nccl && [ "$gpus" -gt 1 ]; then
    check "all GPUs together" all_gpus_together
fi

# ----------------------------------------------------------------------------
# Benchmarks, and the same shapes in PyTorch

bench=$build/bench
check "attention" "$bench/attention_${device}_bf16" "${attention[@]}" --json "$out/attention.json"
check "moba" "$bench/moba_${device}_bf16" "${moba[@]}" --json "$out/moba.json"
check "step 1024" "$bench/step_${device}_bf16" "${steps[@]}" "${short[@]}" --json "$out/step_1024.json"
check "step 8192" "$bench/step_${device}_bf16" "${steps[@]}" "${long[@]}" --json "$out/step_8192.json"
check "PyTorch" python3 dev/bench/peers.py --attention "$out/attention.json" --step "$out/step_1024.json" --moba "$out/moba.json" --json "$out/peers.json"
finish

#!/usr/bin/env bash
# Layout by clang-format, mistakes by clang-tidy, scripts by shellcheck. Used by make lint; scripts/install.sh --tests brings
# the three.
set -euo pipefail
cd "$(dirname "$0")/.."

mapfile -t sources < <(git ls-files '*.h' '*.c' '*.cu' '*.cuh')
# train_gpt.cu is C as well; every other .cu is C++, for nvcc and the emulator.
mapfile -t programs < <(git ls-files '*.c' train_gpt.cu)
mapfile -t kernels < <(git ls-files '*.cu' ':!train_gpt.cu')
mapfile -t scripts < <(git ls-files '*.sh' '.ci/run')

clang-format --dry-run --Werror "${sources[@]}"
echo "clang-format: ${#sources[@]} files"
printf '%s\0' "${programs[@]}" | xargs -0 -P "$(nproc)" -I {} clang-tidy --quiet {} -- \
    -x c -std=gnu11 -fopenmp -DPRECISION_FP32 -DDEVICE_CPU -I. \
    2> >(grep -vE 'warnings? generated|^Suppressed|^Use -header-filter' >&2)
printf '%s\0' "${kernels[@]}" | xargs -0 -P "$(nproc)" -I {} clang-tidy --quiet {} -- \
    -x c++ -std=gnu++17 -DPRECISION_FP32 -DDEVICE_SIMT -Wno-unknown-pragmas -I. \
    2> >(grep -vE 'warnings? generated|^Suppressed|^Use -header-filter' >&2)
echo "clang-tidy: ${#programs[@]} programs in C, ${#kernels[@]} in C++"
shellcheck "${scripts[@]}"
echo "shellcheck: ${#scripts[@]} scripts"

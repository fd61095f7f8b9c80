#!/usr/bin/env bash
# Layout by clang-format, mistakes by clang-tidy, scripts by shellcheck. Used by make lint; scripts/install.sh --tests brings
# the three.
set -euo pipefail
cd "$(dirname "$0")/.."

mapfile -t sources < <(git ls-files '*.h' '*.c' '*.cu' '*.cuh')
mapfile -t programs < <(git ls-files '*.c' train_gpt.cu)
mapfile -t kernels < <(git ls-files 'test/*.cu')
mapfile -t scripts < <(git ls-files '*.sh' '.ci/run')

clang-format --dry-run --Werror "${sources[@]}"
echo "clang-format: ${#sources[@]} files"
printf '%s\0' "${programs[@]}" | xargs -0 -P "$(nproc)" -I {} clang-tidy --quiet {} -- \
    -x c -std=gnu11 -fopenmp -DPRECISION_FP32 -DDEVICE_CPU -I. \
    2> >(grep -vE 'warnings? generated|^Suppressed|^Use -header-filter' >&2)
printf '%s\0' "${kernels[@]}" | xargs -0 -P "$(nproc)" -I {} clang-tidy --quiet {} -- \
    -x c++ -std=gnu++17 -fopenmp -DPRECISION_BF16 -DDEVICE_SIMT -I. \
    2> >(grep -vE 'warnings? generated|^Suppressed|^Use -header-filter' >&2)
echo "clang-tidy: ${#programs[@]} programs, ${#kernels[@]} tests of kernels"
shellcheck "${scripts[@]}"
echo "shellcheck: ${#scripts[@]} scripts"

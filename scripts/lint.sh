#!/usr/bin/env bash
# Checks layout with clang-format, scripts with shellcheck, and mistakes with clang-tidy, and that each header
# compiles on its own. make lint calls it; scripts/install.sh --tests installs the three tools.
set -euo pipefail
self=$(readlink -f -- "$0")
# shellcheck source=scripts/shared.sh
. "${self%/*}/shared.sh"
cd "$top"

mapfile -t sources < <(git ls-files '*.h' '*.c' '*.cu' '*.cuh')
# train_gpt.cu is also C. Every other .cu file is C++, for nvcc and the emulator.
mapfile -t programs < <(git ls-files '*.c' train_gpt.cu)
mapfile -t kernels < <(git ls-files '*.cu' ':!train_gpt.cu')
mapfile -t scripts < <(git ls-files '*.sh' '*.sbatch' '.ci/run')

clang-format --dry-run --Werror "${sources[@]}"
echo "clang-format: ${#sources[@]} files"

# Every header must compile on its own: host headers as C for the CPU, headers of the kernels and the emulator as C++.
mapfile -t device_headers < <(git ls-files '*.cuh' 'dev/simt/*.h' 'test/device_*.h' dev/bench/ceilings.h dev/bench/moba_counts.h)
mapfile -t host_headers < <(git ls-files '*.h' | grep -vxF "$(printf '%s\n' "${device_headers[@]}")")
printf '%s\0' "${host_headers[@]}" |
    xargs -0 -P "$(nproc)" -I {} gcc -std=gnu11 -DPRECISION_FP32 -DDEVICE_CPU -D_GNU_SOURCE -Werror=implicit-function-declaration -fopenmp -I. -fsyntax-only -x c {}
printf '%s\0' "${device_headers[@]}" |
    xargs -0 -P "$(nproc)" -I {} g++ -std=gnu++17 -DPRECISION_BF16 -DDEVICE_SIMT -fopenmp -I. -w -fsyntax-only -x c++ {}
echo "headers on their own: $((${#host_headers[@]} + ${#device_headers[@]}))"

tidy() { # compiler flags...; reads the file names from standard input
    xargs -0 -P "$(nproc)" -I {} clang-tidy --quiet {} -- "$@" -fopenmp -I. \
        2> >(grep -vE 'warnings? generated|^Suppressed|^Use -header-filter' >&2)
}
printf '%s\0' "${programs[@]}" | tidy -x c -std=gnu11 -DPRECISION_FP32 -DDEVICE_CPU
if command -v mpicc >/dev/null; then # checks the trainer again, as the build with MPI
    read -ra mpi <<<"$(mpicc --showme:incdirs | sed 's/[^ ]\+/-isystem &/g')"
    printf 'train_gpt.cu\0' | tidy -x c -std=gnu11 -DPRECISION_FP32 -DDEVICE_CPU -DCOMM_MPI -D_GNU_SOURCE "${mpi[@]}"
fi
printf '%s\0' "${kernels[@]}" | tidy -x c++ -std=gnu++17 -DPRECISION_BF16 -DDEVICE_SIMT -Wno-unknown-pragmas
echo "clang-tidy: $((${#programs[@]} + ${#kernels[@]})) programs"
shellcheck -x "${scripts[@]}"
echo "shellcheck: ${#scripts[@]} scripts"

#!/usr/bin/env bash
# Installs the missing packages, builds everything, and runs every test. This takes a quarter of an hour on two cores,
# and two thirds of that time is compilation.
set -euo pipefail
self=$(readlink -f -- "$0")
# shellcheck source=scripts/shared.sh
. "${self%/*}/shared.sh"
cd "$top"
scripts/install.sh --tests
make lint
make -j"$(nproc)" all
make -j"$(nproc)" test

#!/usr/bin/env bash
# Installs the packages that the build needs and that are missing, by apt. Uses sudo if the user is not root. If sudo
# fails, the script prints the command for an administrator.
#
#   scripts/install.sh            packages to build and train
#   scripts/install.sh --tests    also the packages for the tests and the linters
set -euo pipefail
self=$(readlink -f -- "$0")
# shellcheck source=scripts/shared.sh
. "${self%/*}/shared.sh"

# mpirun needs an ssh program to start, even on one machine.
packages=(build-essential libdnnl-dev libpcre2-dev libcjson-dev libopenmpi-dev openmpi-bin openssh-client gnuplot-nox jq)
if [ "${1:-}" = "--tests" ]; then packages+=(libcmocka-dev clang-format clang-tidy shellcheck python3 iproute2 procps); fi

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
    [ "$status" = "install ok installed" ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then exit 0; fi

install=(apt-get install -y --no-install-recommends "${missing[@]}")
if ! command -v apt-get >/dev/null; then
    echo "install.sh: no apt-get on this system; install these by its own means: ${missing[*]}" >&2
    exit 1
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo)
    if ! command -v sudo >/dev/null || ! sudo -v; then
        echo "install.sh: not root, and sudo refuses. Ask for this line to be run, then start again:" >&2
        echo "    apt-get update && ${install[*]}" >&2
        exit 1
    fi
fi
echo "installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { "${as_root[@]}" apt-get update && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive "${install[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "install.sh: apt-get failed; its output is in $log" >&2
    exit 1
fi
rm -f "$log"

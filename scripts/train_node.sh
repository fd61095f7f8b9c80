#!/usr/bin/env bash
# Trains on one machine with several processes, one for each GPU, and resumes from the last checkpoint after a failure.
#
#   scripts/train_node.sh -- -i 'data/mine_train_*.bin' -b 32 -d 524288 -n 500 -o runs/mine
#       one process for each GPU
#   scripts/train_node.sh --processes 2 -- -i 'data/mine_train_*.bin' -n 500 -o runs/mine
#       two processes, also on CPUs
#
# --processes N   (default: the number of GPUs that nvidia-smi lists, or 1)
# --program FILE  (default: build/train_gpt)
# --tries N, --pause N   as in scripts/restart.sh, which restarts the command
#
# Arguments after -- are options of train_gpt. --output is required; the script adds --resume.
set -euo pipefail
self=$(readlink -f -- "$0")
# shellcheck source=scripts/shared.sh
. "${self%/*}/shared.sh"

fail_usage() { fail "$*" 2; }

processes="" program=build/train_gpt restart=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    --processes | --program | --tries | --pause)
        [ $# -gt 1 ] || fail_usage "$1: needs a value"
        case $1 in
        --processes) [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || fail_usage "--processes $2: want a number from 1"; processes=$2 ;;
        --program) program=$2 ;;
        *) restart+=("$1" "$2") ;;
        esac
        shift 2
        ;;
    *) fail_usage "$1: unknown option (see --help; options of train_gpt come after --)" ;;
    esac
done
[ $# -gt 0 ] || fail_usage "no options of train_gpt after --"
[ -x "$program" ] || fail_usage "--program $program: no such program; run make"
command -v mpirun >/dev/null || fail_usage "no mpirun here: scripts/install.sh installs Open MPI"
if [ -z "$processes" ]; then
    processes=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    if [ "$processes" -eq 0 ]; then processes=1; fi
fi

# Each process has several threads, so mpirun must not bind it to one core. --oversubscribe
# permits more processes than cores.
exec "$top/scripts/restart.sh" "${restart[@]}" mpirun -np "$processes" --bind-to none --oversubscribe "$program" "$@"

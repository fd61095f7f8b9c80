#!/usr/bin/env bash
# Trains on several machines, and resumes from the last checkpoint after a failure. ssh must reach
# each machine without a password. The tree, the data and the run's directory must have the same path
# on all machines: use a shared file system.
#
#   cat hosts.txt
#       node1 slots=8
#       node2 slots=8
#   scripts/train_hosts.sh --hosts hosts.txt --interface eth0 -- -i '/data/mine_train_*.bin' -b 32 -d 1048576 --zero 1 -n 500 -o /data/run
#
# --hosts FILE      one machine on each line, with its number of processes as slots=N (default 1)
# --interface NAME  the network that all machines share, for TCP traffic (default: MPI and NCCL choose)
# --program FILE    (default: build/train_gpt)
# --tries N, --pause N   as in scripts/restart.sh, which restarts the command
#
# Arguments after -- are options of train_gpt. --output is required; the script adds --resume. Run the script on the
# first machine of the list. It passes environment variables that begin with NCCL_, OMP_ or MOBA_ to all machines.
set -euo pipefail
self=$(readlink -f -- "$0")
# shellcheck source=scripts/shared.sh
. "${self%/*}/shared.sh"

fail_usage() { fail "$*" 2; }

hosts="" interface="" program=build/train_gpt restart=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    --hosts | --interface | --program | --tries | --pause)
        [ $# -gt 1 ] || fail_usage "$1: needs a value"
        case $1 in
        --hosts) hosts=$2 ;;
        --interface) interface=$2 ;;
        --program) program=$2 ;;
        *) restart+=("$1" "$2") ;;
        esac
        shift 2
        ;;
    *) fail_usage "$1: unknown option (see --help; options of train_gpt come after --)" ;;
    esac
done
[ $# -gt 0 ] || fail_usage "no options of train_gpt after --"
[ -n "$hosts" ] || fail_usage "--hosts: needed, a file with a machine a line"
[ -r "$hosts" ] || fail_usage "--hosts $hosts: no such file"
[ -x "$program" ] || fail_usage "--program $program: no such program; run make"
command -v mpirun >/dev/null || fail_usage "no mpirun here: scripts/install.sh installs Open MPI, on every machine"

# The list has the form node1:8,node2:8. If mpirun read the file itself, it would give a machine
# without slots= one process for each core.
machines=$(awk '
    { sub(/#.*/, "") }
    NF {
        slots = 1
        if (match($0, /[ \t]slots *= *[0-9]+/)) { slots = substr($0, RSTART, RLENGTH); sub(/.*= */, "", slots) }
        printf "%s%s:%d", comma, $1, slots
        comma = ","
    }' <"$hosts")
[ -n "$machines" ] || fail_usage "--hosts $hosts: names no machine"

# MPI starts the processes and exchanges NCCL's identifiers. On CPUs it also sends the gradients.
environment=()
if [ -n "$interface" ]; then
    export OMPI_MCA_btl_tcp_if_include=$interface OMPI_MCA_oob_tcp_if_include=$interface PRTE_MCA_oob_tcp_if_include=$interface
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
fi
# Without BatchMode, ssh would wait forever for a password, and nobody would see the prompt. If the user chose another
# launch agent, its options stay as they are.
if [ -z "${OMPI_MCA_plm_rsh_agent:-}${PRTE_MCA_plm_ssh_agent:-}" ]; then
    options="-o BatchMode=yes -o ConnectTimeout=15"
    export OMPI_MCA_plm_rsh_args=${OMPI_MCA_plm_rsh_args:-$options} PRTE_MCA_plm_ssh_args=${PRTE_MCA_plm_ssh_args:-$options}
fi
for name in $(compgen -e | grep -E '^(NCCL|OMP|MOBA)_'); do environment+=(-x "$name"); done

# Each process has several threads, so mpirun must not bind it to one core.
exec "$top/scripts/restart.sh" "${restart[@]}" mpirun --host "$machines" --map-by slot --bind-to none "${environment[@]}" \
    "$(realpath "$program")" "$@"

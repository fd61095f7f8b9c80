#!/usr/bin/env bash
# Runs a training command until its run is finished. After a failure it runs again with --resume, from the last checkpoint; a
# wrong command line (exit code 2) is not tried again, and a signal to this script ends it, once a checkpoint is written. The
# other train_*.sh use it; it is of use with any launcher.
#
#   scripts/restart.sh build/train_gpt -i 'data/mine_train_*.bin' -n 500 -o runs/mine
#   scripts/restart.sh --tries 5 --pause 30 mpirun -np 8 build/train_gpt ... -o runs/mine
#
# --tries N      gives up after N failures in a row without a new checkpoint (default 3)
# --pause N      seconds between a failure and the next try (default 5)
#
# Exit code: 0 finished, 2 the command line was wrong, 128 + the signal where one ended it, else that of the last failure.
set -uo pipefail

usage() { awk 'NR > 1 && !sub(/^# ?/, "") && !/^#/ { exit } NR > 1' "$0"; }
fail_usage() {
    echo "restart.sh: $*" >&2
    exit 2
}

tries=3 pause=5
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage; exit 0 ;;
    --tries) [[ ${2:-} =~ ^[1-9][0-9]{0,5}$ ]] || fail_usage "--tries ${2:-}: want a number from 1"; tries=$2; shift 2 ;;
    --pause) [[ ${2:-} =~ ^[0-9]{1,6}$ ]] || fail_usage "--pause ${2:-}: want a number of seconds"; pause=$2; shift 2 ;;
    -*) fail_usage "$1: unknown option (see --help)" ;;
    *) break ;;
    esac
done
[ $# -gt 0 ] || fail_usage "no command: want the training's own, with --output"

# The run's directory is where the command writes its checkpoints.
output=""
arguments=("$@")
for i in "${!arguments[@]}"; do
    case ${arguments[i]} in
    -o | --output) output=${arguments[i + 1]:-} ;;
    --output=*) output=${arguments[i]#--output=} ;;
    -o?*) output=${arguments[i]#-o} ;;
    esac
done
[ -n "$output" ] || fail_usage "the command has no --output: without checkpoints there is nothing to go on from"

# The newest whole checkpoint's step, or 0.
last_step() {
    local path step last=0
    for path in "$output"/step_*; do
        step=${path##*/step_}
        if [[ $step =~ ^[0-9]+$ ]] && [ "$((10#$step))" -gt "$last" ]; then last=$((10#$step)); fi
    done
    echo "$last"
}

# mpirun refuses root, the only user of many containers, unless it is told twice.
if [ "$(id -u)" -eq 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi

# Whatever the output goes to, mpirun's processes see a terminal; in a file they would redraw their line of progress.
if [ ! -t 1 ]; then export TERM=dumb; fi

# The first signal becomes SIGUSR1, on which train_gpt writes a checkpoint, and which mpirun passes on to every process: of
# SIGTERM it would kill them a second later, too soon for a checkpoint. The second one ends the command at once.
child="" signal=0
# shellcheck disable=SC2317 # the traps call it
pass_on() {
    if [ -n "$child" ]; then kill -"$([ "$signal" -eq 0 ] && echo USR1 || echo TERM)" "$child" 2>/dev/null; fi
    signal=$1
}
trap 'pass_on 2' INT
trap 'pass_on 15' TERM
trap 'pass_on 1' HUP
# The command is a process group of its own, so that Ctrl-C reaches this script alone.
set -m

# wait returns early when a signal comes in; the command is waited for until it has ended.
run() {
    "$@" </dev/null &
    child=$!
    while :; do
        wait "$child" 2>/dev/null # where bash would say how it ended
        status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    child=""
}

failures=0 step=$(last_step)
while [ "$signal" -eq 0 ]; do
    run "${arguments[@]}" --resume
    if [ "$status" -eq 0 ]; then exit 0; fi
    if [ "$signal" -ne 0 ]; then break; fi
    if [ "$status" -eq 2 ]; then exit 2; fi
    now=$(last_step)
    if [ "$now" -gt "$step" ]; then failures=0; fi
    step=$now failures=$((failures + 1))
    if [ "$failures" -ge "$tries" ]; then
        echo "restart.sh: gave up: exit code $status, $failures times in a row without a new checkpoint in $output (step $step)" >&2
        exit "$status"
    fi
    echo "restart.sh: exit code $status; in $pause s on from step $step (failure $failures of $tries since that checkpoint)" >&2
    run sleep "$pause"
done
echo "restart.sh: ended by a signal; the last checkpoint is of step $(last_step)" >&2
exit $((128 + signal))

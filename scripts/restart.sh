#!/usr/bin/env bash
# Runs a training command until its run is finished. After a failure, it runs the command again with --resume, from
# the last checkpoint. It does not repeat a wrong command line (exit code 2). A signal to this script makes the run
# write a checkpoint, and then ends both. The train_*.sh scripts call it, and it works with any launcher.
#
#   scripts/restart.sh build/train_gpt -i 'data/mine_train_*.bin' -n 500 -o runs/mine
#   scripts/restart.sh --tries 5 --pause 30 mpirun -np 8 build/train_gpt ... -o runs/mine
#
# --tries N      gives up after N failures in a row without a new checkpoint (default 3)
# --pause N      seconds between a failure and the next try (default 5)
# --where        prints the step that the run would resume from, and runs nothing
#
# Exit code: 0 finished; 2 wrong command line; 128 + the signal if a signal ended the run after its checkpoint;
# otherwise the command's own exit code. It is a failure if the signal came but the run could not write its
# checkpoint. A run that --max-seconds stopped counts as finished.
set -uo pipefail
self=$(readlink -f -- "$0")
# shellcheck source=scripts/shared.sh
. "${self%/*}/shared.sh"

fail_usage() { fail "$*" 2; }

tries=3 pause=5 where=0
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage; exit 0 ;;
    --tries) [[ ${2:-} =~ ^[1-9][0-9]{0,5}$ ]] || fail_usage "--tries ${2:-}: want a number from 1"; tries=$2; shift 2 ;;
    --pause) [[ ${2:-} =~ ^[0-9]{1,6}$ ]] || fail_usage "--pause ${2:-}: want a number of seconds"; pause=$2; shift 2 ;;
    --where) where=1; shift ;;
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

# Prints the step that the run would resume from. This is the step of the checkpoint that `latest` names, which a
# user may have set back. Without that file it is the newest checkpoint's step, or 0. If the step changes between
# two failures, the run has made progress.
last_step() {
    local path step last=0
    if [ -s "$output/latest" ]; then
        read -r step <"$output/latest"
        step=${step#step_}
        if [[ $step =~ ^[0-9]+$ ]]; then step=$((10#$step)); fi
        echo "$step"
        return
    fi
    for path in "$output"/step_*; do
        step=${path##*/step_}
        if [[ $step =~ ^[0-9]+$ ]] && [ "$((10#$step))" -gt "$last" ]; then last=$((10#$step)); fi
    done
    echo "$last"
}

if [ "$where" -eq 1 ]; then
    last_step
    exit 0
fi

# mpirun refuses to run as root without both variables, and root is the only user of many containers.
if [ "$(id -u)" -eq 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi

# Open MPI then notices a lost machine after half a minute, not after eight minutes. Its settings have one name up to
# version 4 and another from version 5 on.
for setting in time=10 intvl=5 probes=4; do
    for name in OMPI_MCA_oob_tcp_keepalive_ PRTE_MCA_oob_tcp_keepalive_; do
        name+=${setting%=*}
        export "$name=${!name:-${setting#*=}}"
    done
done

# mpirun's processes always see a terminal, whatever the output is. TERM=dumb makes them print plain lines into a
# file, not one line of progress that they redraw.
if [ ! -t 1 ]; then export TERM=dumb; fi

# The first signal becomes SIGUSR1: mpirun passes it to every process, and train_gpt writes a checkpoint. After
# SIGTERM, mpirun would kill the processes within a second. A second signal ends the command at once. The script
# ignores signals within a second of the first, because timeout and a closing shell send theirs twice.
child="" signal=0 signalled=0
# shellcheck disable=SC2317 # the traps call it
pass_on() {
    if [ "$signal" -ne 0 ] && [ $((SECONDS - signalled)) -le 1 ]; then return; fi
    if [ "$signal" -eq 0 ]; then signalled=$SECONDS; fi
    if [ -n "$child" ]; then kill -"$([ "$signal" -eq 0 ] && echo USR1 || echo TERM)" "$child" 2>/dev/null; fi
    signal=$1
}
trap 'pass_on 2' INT
trap 'pass_on 15' TERM
trap 'pass_on 1' HUP
# The command has its own process group, so that Ctrl-C reaches only this script.
set -m

# wait returns early when a signal arrives. The loop waits until the command has really
# ended, and the last wait gets its exit code.
run() {
    "$@" </dev/null &
    child=$!
    while :; do
        wait "$child" 2>/dev/null # hides bash's message about the end of the command
        kill -0 "$child" 2>/dev/null || break
    done
    wait "$child" 2>/dev/null
    status=$?
    child=""
}

stopped=$((128 + $(kill -l USR1))) # train_gpt's exit code after a stop with a checkpoint
failures=0 step=$(last_step) status=$stopped
while [ "$signal" -eq 0 ]; do
    run "${arguments[@]}" --resume
    if [ "$status" -eq 0 ]; then exit 0; fi
    if [ "$signal" -ne 0 ]; then break; fi
    if [ "$status" -eq 2 ]; then exit 2; fi
    now=$(last_step)
    if [ "$now" != "$step" ]; then failures=0; fi
    step=$now failures=$((failures + 1))
    if [ "$failures" -ge "$tries" ]; then
        echo "restart.sh: gave up: exit code $status, $failures times in a row without a new checkpoint in $output (step $step)" >&2
        exit "$status"
    fi
    echo "restart.sh: exit code $status; in $pause s on from step $step (failure $failures of $tries since that checkpoint)" >&2
    run sleep "$pause"
    status=$stopped # a signal during the pause ends no training
done
# The second signal sends SIGTERM, which leaves no time for another checkpoint.
if [ "$status" -eq "$stopped" ] || [ "$status" -eq 143 ]; then
    echo "restart.sh: ended by a signal; the last checkpoint is of step $(last_step)" >&2
    exit $((128 + signal))
fi
echo "restart.sh: exit code $status after a signal; the last checkpoint is of step $(last_step)" >&2
exit "$status"

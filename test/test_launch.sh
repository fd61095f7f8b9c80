#!/usr/bin/env bash
# Tests the scripts that train with many processes, as a user calls them: the restart loop, one machine, two
# machines, and Slurm. The two machines are network namespaces with their own addresses and host names, connected by
# a virtual cable. Scripts of this test replace Slurm's commands. The output has cmocka's format, so that
# scripts/run_tests.sh counts the tests. BUILD names the directory of the programs. TEST_LONG=1 runs all tests;
# TEST_LONG=rest runs only the tests that need it.
# shellcheck disable=SC2317 # check() calls the functions
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
top=$PWD
build=$(realpath "${BUILD:-build}")
program=$build/train_gpt_cpu_fp32
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=0} # memory that a killed program still holds is not a leak

# Network namespaces need root. An ordinary user may be root inside a user namespace.
if [ "$(id -u)" -ne 0 ] && unshare --user --map-root-user --net --uts true 2>/dev/null; then
    exec unshare --user --map-root-user "$0" "$@"
fi

scratch=$(mktemp -d)
export TMPDIR=$scratch # mpirun uses it too
export OMPI_MCA_mpi_yield_when_idle=1 # a waiting rank leaves its core to the others
hosts=() # processes that keep the namespaces alive
trap 'kill "${hosts[@]}" 2>/dev/null; rm -rf "$scratch"' EXIT
cd "$scratch" || exit 1
failed=0

# Waits until the command succeeds. The limit of five minutes is enough for the busiest machine.
wait_until() { # command...
    local since=$SECONDS
    until "$@"; do
        if [ $((SECONDS - since)) -gt 300 ]; then
            echo "waited in vain for: $*"
            return 1
        fi
        sleep 0.02
    done
}

check() { # name, command...
    if [ "${TEST_LONG:-}" != rest ]; then run_check "$@"; fi
}
check_long() { # name, command...
    if [ -n "${TEST_LONG:-}" ]; then run_check "$@"; fi
}
run_check() { # name, command...
    local name=$1
    shift
    echo "[ RUN      ] $name"
    if "$@" >"$scratch/output" 2>&1; then
        echo "[       OK ] $name"
    else
        tail -n 30 "$scratch/output"
        echo "[  FAILED  ] $name"
        failed=1
    fi
}

# The command must fail with this exit code, and print one line that contains the text.
refuses() { # exit code, text, command...
    local wanted=$1 text=$2 status=0
    shift 2
    "$@" >"$scratch/refused" 2>"$scratch/errors" || status=$?
    echo "$* : exit code $status"
    cat "$scratch/errors"
    [ "$status" -eq "$wanted" ] && [ "$(wc -l <"$scratch/errors")" -eq 1 ] && grep -qF -- "$text" "$scratch/errors"
}
ends_with() { # exit code, command...
    local wanted=$1 status=0
    shift
    "$@" || status=$?
    echo "$* : exit code $status"
    [ "$status" -eq "$wanted" ]
}

# ----------------------------------------------------------------------------
# The restart loop, with a replacement for the training program. Each line of plan.txt is one start:
# the step it reaches, and the way it ends.

cat >trainer <<'END'
#!/usr/bin/env bash
echo "$*" >>arguments.txt
read -r step end <plan.txt
sed -i 1d plan.txt
mkdir -p out
env | grep keepalive | sort >environment.txt
if [ "$step" -gt 0 ]; then
    mkdir -p "out/step_$(printf %08d "$step")"
    if [ -n "${LATEST:-}" ]; then printf 'step_%08d\n' "$step" >out/latest; fi
fi
stop() {
    if [ "$end" = break ]; then exit 1; fi
    if [ "$end" = wait ]; then mkdir -p out/step_00000099; fi
    exit 138
}
case $end in
wait | break | idle)
    trap stop USR1
    touch waiting
    for _ in $(seq 1 6000); do sleep 0.05; done
    ;;
kill) kill -KILL $$ ;;
*) exit "$end" ;;
esac
END
chmod +x trainer
plan() {
    rm -rf out arguments.txt waiting
    printf '%s\n' "$@" >plan.txt
}
# A test that runs in the background, or under nohup, ignores signals, and its children would
# ignore them too. env restores the default.
restart() { exec env --default-signal=INT,HUP "$top/scripts/restart.sh" --pause 0 "$@"; }
in_a_shell() { ("$@"); }
starts() { wc -l <arguments.txt; }

restart_usage() {
    refuses 2 "--tries 0" "$top/scripts/restart.sh" --tries 0 ./trainer -o out &&
        refuses 2 "--pause soon" "$top/scripts/restart.sh" --pause soon ./trainer -o out &&
        refuses 2 "no command" "$top/scripts/restart.sh" && refuses 2 "no --output" "$top/scripts/restart.sh" ./trainer -i x &&
        refuses 2 "--fast: unknown option" "$top/scripts/restart.sh" --fast ./trainer &&
        "$top/scripts/restart.sh" --help | grep -- "--tries N"
}
check restart_refuses_bad_usage restart_usage

goes_on() {
    # Each failure follows a new checkpoint, so the script tries as often as necessary.
    plan "8 1" "9 kill" "10 1" "40 134" "50 0"
    ends_with 0 in_a_shell restart --tries 2 ./trainer -i x --output out && [ "$(starts)" -eq 5 ] &&
        [ "$(sort -u arguments.txt)" = "-i x --output out --resume" ]
}
check a_run_that_fails_goes_on goes_on

gives_up() {
    plan "10 1" "10 1" "20 1" "20 1" "20 7" "30 0"
    ends_with 7 in_a_shell restart --tries 3 ./trainer --output=out && [ "$(starts)" -eq 5 ] || return 1
    plan "0 1" "0 1" "0 1"
    refuses 1 "gave up: exit code 1, 2 times in a row without a new checkpoint in out (step 0)" \
        bash -c "\"$top/scripts/restart.sh\" --pause 0 --tries 2 ./trainer -oout 2>&1 | tail -n 1 >&2; exit \"\${PIPESTATUS[0]}\"" &&
        [ "$(starts)" -eq 2 ]
}
check a_run_that_makes_no_progress_is_given_up gives_up

# A run that a user set back stays below its highest step for a while. A change of `latest` counts as progress.
set_back() {
    plan "10 1" "20 1" "30 1" "30 1" "30 3" "40 0"
    mkdir -p out/step_00000090
    LATEST=1 ends_with 3 in_a_shell restart --tries 3 ./trainer --output=out && [ "$(starts)" -eq 5 ]
}
check a_run_that_was_set_back_makes_progress set_back

# Every launcher must notice a silent machine soon. The user's own settings stay as they are.
keepalive() {
    plan "0 0"
    OMPI_MCA_oob_tcp_keepalive_time=99 in_a_shell restart ./trainer -o out || return 1
    cat environment.txt
    grep -qx OMPI_MCA_oob_tcp_keepalive_time=99 environment.txt && grep -qx OMPI_MCA_oob_tcp_keepalive_probes=4 environment.txt &&
        grep -qx PRTE_MCA_oob_tcp_keepalive_intvl=5 environment.txt
}
check all_launchers_look_for_silent_machines keepalive

wrong_line() {
    plan "0 2" "10 0"
    ends_with 2 in_a_shell restart ./trainer -o out && [ "$(starts)" -eq 1 ]
}
check a_wrong_command_line_is_not_tried_again wrong_line

# A signal ends the loop: after the command has written its checkpoint, or while the loop waits for the next try.
signalled() {
    local script signal
    set -m # otherwise background processes ignore SIGINT
    for signal in TERM:143 INT:130 HUP:129; do
        plan "10 wait" "20 0"
        restart ./trainer -o out &
        script=$!
        wait_until [ -e waiting ] || return 1
        # The first signal goes to the whole process group, as from a terminal. The second goes to the
        # script, as from a shell whose terminal closes.
        kill -"${signal%:*}" -- "-$script"
        kill -"${signal%:*}" "$script" 2>/dev/null
        ends_with "${signal#*:}" wait "$script" && [ "$(starts)" -eq 1 ] && [ -d out/step_00000099 ] || return 1
    done
    # If the run cannot write its checkpoint, the exit code must say so.
    plan "10 break" "20 0"
    restart ./trainer -o out &
    script=$!
    wait_until [ -e waiting ] || return 1
    kill -TERM "$script"
    ends_with 1 wait "$script" && [ "$(starts)" -eq 1 ] || return 1
    plan "10 1" "20 0"
    "$top/scripts/restart.sh" --pause 1000 ./trainer -o out &
    script=$!
    wait_until pgrep -P "$script" -x sleep || return 1
    kill -TERM "$script"
    set +m
    ends_with 143 wait "$script" && [ "$(starts)" -eq 1 ]
}
check a_signal_ends_the_loop_with_a_checkpoint signalled

# Slurm's script with the same replacement, when the job's time is over. The script queues the job
# again only if there is a new checkpoint.
ln -s "$top/scripts" scripts
mkdir stand_ins
# shellcheck disable=SC2016 # the replacement scripts expand these variables
printf '#!/bin/sh\nwhile [ "$1" != ./trainer ]; do shift; done\nexec "$@"\n' >stand_ins/mpirun
# shellcheck disable=SC2016
printf '#!/bin/sh\necho "$*" >>scontrol.txt\n' >stand_ins/scontrol
printf '#!/bin/sh\n' >stand_ins/ompi_info
printf '#!/bin/sh\necho "                 MCA plm: slurm (MCA v1.0.0, API v2.0.0, Component v3.0.1)"\n' >stand_ins/prte_info # Open MPI 5
chmod +x stand_ins/*
job() { exec env PATH="$scratch/stand_ins:$PATH" SLURM_JOB_ID=7 SLURM_SUBMIT_DIR="$scratch" PROGRAM=./trainer "$top/scripts/train_slurm.sbatch" "$@"; }
time_runs_out() { # line of the plan, exit code, expected call of scontrol
    local script
    plan "$1"
    mkdir -p out/step_00000009
    rm -f scontrol.txt
    job -o out &
    script=$!
    wait_until [ -e waiting ] || return 1
    kill -USR1 "$script"
    ends_with "$2" wait "$script" && [ "$(cat scontrol.txt 2>/dev/null)" = "$3" ]
}
queued_again() {
    time_runs_out "10 wait" 0 "requeue 7" && time_runs_out "0 idle" 1 "" && time_runs_out "10 break" 1 "" || return 1
    refuses 2 "no --output" in_a_shell job -i x || return 1
    printf '#!/bin/sh\n' >stand_ins/prte_info
    refuses 2 "built without Slurm" in_a_shell job -o out
}
check a_job_without_a_new_checkpoint_is_not_queued_again queued_again

# ----------------------------------------------------------------------------
# One machine. A run that was killed and resumed must end bitwise like an uninterrupted run
# with the same number of processes.

if ! command -v mpirun >/dev/null || ! "$program" --help | grep -- --zero >/dev/null; then
    echo "SKIPPED: nothing was trained by many processes: mpirun is missing, or the program was built without it"
    exit $failed
fi
seq -f "The number %g comes before the number that follows it." 1 3000 >text.txt
"$build/tokenizer" train -q --vocab-size 300 -o tokenizer.json text.txt &&
    "$build/tokenizer" prepare -q -t tokenizer.json --output-prefix text text.txt || exit 1
# A step takes some hundredths of a second, so that the tests below can end a run in the middle.
training=(-i "$scratch/text_train_*.bin" -j "$scratch/text_val_*.bin" --tokenizer "$scratch/tokenizer.json" --layers 1 --channels 32
    --heads 2 --kv-heads 1 -t 32 -b 8 -d 16384 -l 1e-3 -x 30 -v 15 -m 2 -n 5)

same_run() { # directory, directory
    cmp "$1/metrics.jsonl" "$2/metrics.jsonl" && cmp "$1/step_00000030/model.safetensors" "$2/step_00000030/model.safetensors"
}
steps_of() { grep -hs '"loss"' "$1/metrics.jsonl" | awk 'END { print NR }'; }
has_steps() { [ "$(steps_of "$1")" -ge "$2" ]; } # directory, steps
wait_for_steps() { wait_until has_steps "$@"; }
# Once the run has logged this many steps, kills one of the processes that the command prints.
kill_one() { # directory, steps, command...
    local victim
    wait_for_steps "$1" "$2" && victim=$("${@:3}" | shuf -n 1) && echo "killing $victim" && kill -KILL "$victim"
}
ranks() { pgrep -f "^$program .*$1"; }

node_usage() {
    refuses 2 "--processes none" "$top/scripts/train_node.sh" --processes none -- -o out &&
        refuses 2 "no such program" "$top/scripts/train_node.sh" --program nowhere -- -o out &&
        refuses 2 "options of train_gpt" "$top/scripts/train_node.sh" --program "$program" &&
        refuses 2 "come after --" "$top/scripts/train_node.sh" -o out &&
        refuses 2 "--tries: needs a value" "$top/scripts/train_node.sh" --tries &&
        refuses 2 "no --output" "$top/scripts/train_node.sh" --program "$program" -- -i x
}
check train_node_refuses_bad_usage node_usage

node() { exec "$top/scripts/train_node.sh" --program "$program" --processes 2 --pause 0 -- "${training[@]}" "$@"; }
in_a_shell node -o "$scratch/whole" >whole.txt || exit 1
one_machine() {
    # In a file, progress must be plain lines.
    grep -q '^step 30/30 ' whole.txt && ! grep -q $'\r.*\r' whole.txt || return 1
    node -o "$scratch/killed" &
    kill_one "$scratch/killed" 6 ranks "$scratch/killed" && wait $! && same_run whole killed
}
check one_machine_goes_on_after_a_kill one_machine

one_machine_stopped() {
    node -o "$scratch/stopped" &
    local script=$!
    wait_for_steps "$scratch/stopped" 8 || return 1
    kill -TERM "$script"
    ends_with 143 wait "$script" || return 1
    compgen -G "stopped/step_*" && in_a_shell node -o "$scratch/stopped" && same_run whole stopped
}
check_long one_machine_stopped_by_a_signal_goes_on one_machine_stopped

# ----------------------------------------------------------------------------
# Two machines

if ! unshare --net --uts true 2>/dev/null || ! command -v ip >/dev/null; then
    echo "SKIPPED: nothing was trained across two machines: network namespaces are not permitted here, or ip (iproute2) is missing"
    exit $failed
fi

on() { nsenter --target "$1" --net --uts "${@:2}"; } # host's process, command...
for name in first second; do
    unshare --net --uts sleep infinity &
    hosts+=($!)
done
has_namespaces() { # process of a host. unshare makes the namespaces before it becomes sleep
    [ "$(cat "/proc/$1/comm")" = sleep ] && ! [ "/proc/$1/ns/net" -ef /proc/self/ns/net ]
}
for host in "${hosts[@]}"; do wait_until has_namespaces "$host" || exit 1; done
on "${hosts[0]}" hostname moba-first
on "${hosts[1]}" hostname moba-second
on "${hosts[0]}" ip link add cable0 type veth peer name cable0 netns "${hosts[1]}"
on "${hosts[0]}" ip address add 10.77.0.1/24 dev cable0
on "${hosts[1]}" ip address add 10.77.0.2/24 dev cable0
for host in "${hosts[@]}"; do
    on "$host" ip link set lo up
    on "$host" ip link set cable0 up
done
printf '# the two machines\n10.77.0.1\n10.77.0.2 max_slots=4 slots=1\n' >hosts.txt

# This replacement for ssh takes options, a host, and a shell command to run there.
mkdir bin
cat >bin/ssh <<END
#!/bin/sh
while :; do
    case \$1 in
    -o) echo "\$2" >>$scratch/ssh_options.txt; shift 2 ;;
    -*) shift ;;
    *) break ;;
    esac
done
host=\$1
shift
case \$host in 10.77.0.1) target=${hosts[0]} ;; 10.77.0.2) target=${hosts[1]} ;; *) exit 255 ;; esac
exec nsenter --target \$target --net --uts sh -c "\$*"
END
chmod +x bin/ssh

across() {
    export PATH=$scratch/bin:$PATH
    exec nsenter --target "${hosts[0]}" --net --uts "$top/scripts/train_hosts.sh" --hosts hosts.txt --interface cable0 --program "$program" \
        --pause "${pause:-0}" -- "${training[@]}" "$@"
}
# shellcheck disable=SC2016 # awk expands $10
sent() { on "${hosts[0]}" awk '/cable0:/ { print $10 }' /proc/net/dev; }
ranks_on() { # process of a host, text in the ranks' command lines
    local process
    for process in $(ranks "$2"); do
        if [ "/proc/$process/ns/net" -ef "/proc/$1/ns/net" ]; then echo "$process"; fi
    done
}

hosts_usage() {
    refuses 2 "--hosts: needed" "$top/scripts/train_hosts.sh" -- -o out &&
        refuses 2 "no such file" "$top/scripts/train_hosts.sh" --hosts nowhere -- -o out &&
        refuses 2 "names no machine" "$top/scripts/train_hosts.sh" --hosts <(echo '# none') --program "$program" -- -o out
}
check train_hosts_refuses_bad_usage hosts_usage

two_machines() {
    local before after
    before=$(sent)
    in_a_shell across --zero 1 -o "$scratch/across" || return 1
    after=$(sent)
    # In every step, a process sends half of the gradients and half of the parameters to the other machine.
    local parameters=$((300 * 32 + 4 * 32 * 32 + 3 * 32 * 128))
    echo "bytes over the cable: $((after - before))"
    # Without BatchMode, ssh would wait forever for a password, and nobody would see the prompt.
    grep -qx BatchMode=yes ssh_options.txt && [ $((after - before)) -gt $((30 * parameters * (4 + 4) / 2)) ] && same_run whole across
}
check two_machines_train_over_the_cable two_machines

two_machines_killed() {
    local host
    for host in "$@"; do
        rm -rf "$scratch/broken"
        across --zero 1 -o "$scratch/broken" 2>errors.txt &
        kill_one "$scratch/broken" 6 ranks_on "$host" "$scratch/broken" && wait $! && same_run whole broken && cat errors.txt &&
            grep -q "^restart.sh: exit code" errors.txt || return 1
    done
}
check a_process_killed_on_the_other_machine two_machines_killed "${hosts[1]}"
check_long a_process_killed_on_the_first_machine two_machines_killed "${hosts[0]}"

# The remaining machine notices the loss within half a minute, and resumes when the other machine is back.
cable_pulled() {
    local pause=5 # enough time for the cable to return
    across --zero 1 -o "$scratch/pulled" 2>errors.txt &
    wait_for_steps "$scratch/pulled" 6 && on "${hosts[1]}" ip link set cable0 down || return 1
    wait_until grep -q "^restart.sh: exit code" errors.txt
    on "${hosts[1]}" ip link set cable0 up
    cat errors.txt
    grep -q "lost communication" errors.txt && wait $! && same_run whole pulled
}
check_long a_machine_that_is_cut_off cable_pulled

# ----------------------------------------------------------------------------
# Slurm on the same two machines. The replacements do only what the script and mpirun need: sbatch gives the job its
# environment, srun starts a process on each named machine, and scontrol writes its arguments to a file.

mkdir slurm
cat >slurm/sbatch <<END
#!/usr/bin/env bash
export SLURM_JOB_ID=7 SLURM_JOBID=7 SLURM_SUBMIT_DIR=\$PWD SLURM_NNODES=2 SLURM_JOB_NUM_NODES=2 SLURM_TASKS_PER_NODE='1(x2)'
export SLURM_NODELIST=moba-first,moba-second SLURM_JOB_NODELIST=moba-first,moba-second
cp "\$1" "$scratch/slurm_script" # a copy is what Slurm runs
exec nsenter --target ${hosts[0]} --net --uts "$scratch/slurm_script" "\${@:2}"
END
cat >slurm/srun <<END
#!/usr/bin/env bash
while [[ \$1 == --* ]]; do
    if [[ \$1 == --nodelist=* ]]; then nodes=\${1#*=}; fi
    shift
done
export SLURM_NODEID=0 SLURM_PROCID=0
for node in \${nodes//,/ }; do
    case \$node in moba-first) target=${hosts[0]} ;; moba-second) target=${hosts[1]} ;; *) exit 1 ;; esac
    nsenter --target \$target --net --uts "\$@" &
    SLURM_NODEID=\$((SLURM_NODEID + 1)) SLURM_PROCID=\$((SLURM_PROCID + 1))
done
wait
END
cat >slurm/scontrol <<END
#!/bin/sh
echo "\$*" >>"$scratch/scontrol.txt"
END
chmod +x slurm/*

submit() {
    cd "$top" || exit 1
    export PATH=$scratch/slurm:$PATH PROGRAM=$program OMPI_MCA_btl_tcp_if_include=cable0 OMPI_MCA_oob_tcp_if_include=cable0
    exec sbatch scripts/train_slurm.sbatch "${training[@]}" "$@"
}
slurm_job() {
    local before after
    before=$(sent)
    in_a_shell submit -o "$scratch/job" || return 1
    after=$(sent)
    [ $((after - before)) -gt 500000 ] && same_run whole job
}
check slurm_trains_on_the_machines_of_the_job slurm_job

# Before the job's time is over, Slurm sends SIGUSR1: the run writes a checkpoint, and the job goes back into the
# queue. scancel sends SIGTERM, which ends the job.
slurm_time_is_over() {
    local moment signal code script steps
    refuses 2 "not a job of Slurm" "$top/scripts/train_slurm.sbatch" -o out || return 1
    for moment in "TERM 143" "USR1 0"; do
        read -r signal code <<<"$moment"
        steps=$(($(steps_of "$scratch/queued") + 4)) # more steps than the run already has
        submit -o "$scratch/queued" &
        script=$!
        wait_for_steps "$scratch/queued" "$steps" && kill -"$signal" "$script" && ends_with "$code" wait "$script" || return 1
        if [ "$signal" = TERM ] && [ -e scontrol.txt ]; then return 1; fi
    done
    [ "$(cat scontrol.txt)" = "requeue 7" ] && [ ! -e queued/step_00000030 ] && in_a_shell submit -o "$scratch/queued" && same_run whole queued
}
check_long slurm_job_whose_time_is_over_is_queued_again slurm_time_is_over
exit $failed

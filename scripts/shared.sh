# shellcheck shell=bash
# Functions that all scripts share: environment, messages, names, signals, complete files, and
# reading a run's JSON. A script begins with
#
#     self=$(readlink -f -- "$0")
#     . "${self%/*}/shared.sh"
#
# Afterwards $script is the script's name, and $top is the top of the tree.
script=${self:?}
script=${script##*/}
top=$(readlink -f -- "${BASH_SOURCE[0]}")
top=${top%/scripts/shared.sh}
top=${top:-/}

# In every locale, numbers have a decimal point and each byte is a letter. CDPATH makes cd go elsewhere and print;
# the other variables change bash or grep.
export LC_ALL=C
unset CDPATH GLOBIGNORE GREP_OPTIONS POSIXLY_CORRECT BASH_ENV ENV

# ----------------------------------------------------------------------------
# Messages

# Ends the script with one line, whatever characters a name in it has. The line goes to the user even if a
# command's standard error goes to a file.
exec {user}>&2
fail() { # message, exit code
    printf '%s: %s\n' "$script" "${1//[[:cntrl:]]/?}" >&"$user"
    exit "${2:-1}"
}

say() { printf '%s\n' "$*" 2>/dev/null || fail "standard output: cannot be written"; }
show() { cat <"$1" 2>/dev/null || fail "standard output: cannot be written"; }

# Prints the comment at the top of the script.
usage() { awk 'NR > 1 && !sub(/^# ?/, "") && !/^#/ { exit } NR > 1 && !/^shellcheck / && !/^!/' <"$self"; }

needs() { # programs
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null || fail "$program is missing: run scripts/install.sh"
    done
}

# If standard output is closed, the next file that a program opens becomes its standard output.
{ true 3>&1; } 2>/dev/null || fail "standard output: is closed"

# ----------------------------------------------------------------------------
# Names

# No command takes a name for an option if the name begins with ./ and not with a dash.
path() { # variable
    if [[ ${!1} == -* ]]; then printf -v "$1" './%s' "${!1}"; fi
}

# Sets $literal to a pattern of files that matches the name itself: its own *, ?, [ and backslashes are escaped.
literal_pattern() { # name
    local i
    literal=""
    for ((i = 0; i < ${#1}; i++)); do
        case ${1:i:1} in
        [\*\?\[\\]) literal+="\\${1:i:1}" ;;
        *) literal+=${1:i:1} ;;
        esac
    done
}

# Gives a file its final name in one step. If this fails, an earlier file of that name does not change.
publish() { # file, final name
    local reason
    partial=$2.$$.partial
    reason=$({ cp -- "$1" "$partial" && mv -fT -- "$partial" "$2"; } 2>&1) || fail "$2: cannot be written: ${reason##*: }"
    partial=""
}

make_directory() { # name
    local reason
    reason=$(mkdir -p -- "$1" 2>&1) || fail "$1: cannot make this directory: ${reason##*: }"
}

# ----------------------------------------------------------------------------
# Scratch directory, signals, children

partial="" scratch="" child="" interrupted="" resumes=""
clean_up() {
    if [ -n "$partial" ]; then rm -f -- "$partial"; fi
    if [ -n "$scratch" ]; then rm -rf -- "$scratch"; fi
}
trap clean_up EXIT

make_scratch() {
    local reason
    reason=$(mktemp -d 2>&1) || fail "no directory for temporary files: ${reason##*: }"
    scratch=$reason
    if [[ $scratch != /* ]]; then scratch=$PWD/$scratch; fi
}

# start() gives a command its own session. A signal of the terminal then reaches only this script, which
# sends SIGTERM to the command once. After the command has ended, the script exits with 128 + the signal.
# $resumes tells the user what to do next.
stop() { # signal
    interrupted=$1
    if [ -n "$child" ]; then signal_child TERM; else end_interrupted; fi
}
end_interrupted() { fail "ended by SIG$interrupted${resumes:+; $resumes}" $((128 + $(kill -l "$interrupted"))); }
# Until setsid has made the session, the child is a copy of this shell and loses the signal, so the loop repeats it.
signal_child() { # signal
    until kill "-$1" -- "-$child" 2>/dev/null; do
        kill -0 "$child" 2>/dev/null || break
        sleep 0.01
    done
}
pause() {
    if [ -n "$child" ]; then signal_child STOP; fi
    kill -STOP $$
    if [ -n "$child" ]; then signal_child CONT; fi
}
take_signals() {
    local signal
    for signal in INT TERM HUP; do
        # shellcheck disable=SC2064 # $signal is expanded now, for this trap
        trap "stop $signal" "$signal"
    done
    trap pause TSTP
}

start() { # command...
    setsid -- "$@" </dev/null {user}>&- &
    child=$!
}

# Waits for the command and returns its exit code. A signal ends bash's wait early, but bash
# keeps the exit code of the child.
await() {
    local status=0
    while :; do
        wait "$child" 2>/dev/null || true
        kill -0 "$child" 2>/dev/null || break
    done
    wait "$child" 2>/dev/null || status=$?
    child=""
    if [ -n "$interrupted" ]; then end_interrupted; fi
    return $status
}

run() { # command...
    start "$@"
    await
}

# Only one script at a time builds in a directory, because two compilers would write the same program. The
# caller closes $build_lock after the build.
lock_build() { # build directory, as make gets it
    local directory=$1
    if [[ $directory != /* ]]; then directory=$top/$directory; fi
    make_directory "$directory"
    { exec {build_lock}>>"$directory/scripts.lock"; } 2>/dev/null || fail "$directory: cannot be written to"
    flock -n "$build_lock" && return
    say "waiting for another script's build in $directory"
    run flock "$build_lock"
}

# ----------------------------------------------------------------------------
# Runs

# Reads JSON lines from standard input and applies a jq program to each line. It skips a line that is not JSON,
# because a crash truncated it or filled it with zeros. `finite` selects numbers: jq reads 1e999 as the largest
# double, and NaN as a number smaller than all others.
finite="def finite: numbers | select((isnan | not) and fabs < 1e308);"
json_lines() { # program
    jq -R -r "$finite fromjson? | objects | $1"
}

# Prints a run as a JSON object, from train_gpt's output directory and its log. The object has the planned and finished
# steps, the tokens, and the last validation loss and its step. It also has the milliseconds of all steps and of their
# attention, the parameters in millions, and the peak memory in MB. If a step occurs twice, the last line counts.
summary() { # directory, log
    {
        json_lines tojson <"$1/metrics.jsonl"
        if [ -e "$1/timings.jsonl" ]; then json_lines tojson <"$1/timings.jsonl"; fi
    } | jq -s -c --argjson log "$(summary_of_log <"$2")" "$finite"'
        def by_step: map(select(.step | finite)) | group_by(.step) | map(last);
        (map(select(.event == "start" or .event == "resume")) | add // {}) as $description
        | (map(select((.loss // .val_loss) | finite)) | by_step | last // {}) as $done
        | (map(select(.val_loss | finite)) | by_step | last // {}) as $validation
        | (map(select((.step_ms | finite) and .event == null)) | by_step) as $timed
        | (reduce $timed[] as $line ({before: 0, busy: 0, attention: 0};
            ($line.step - .before) as $steps
            | {before: $line.step, busy: (.busy + $steps * $line.step_ms),
               attention: (.attention + $steps * ($line.attention_ms | finite // 0))})) as $time
        | $log + {
            planned_steps: $description.steps, sequence_length: $description.sequence_length,
            key_value_bytes: (8 * (($description.layers // 0) * ($description.kv_heads // 0) * ($description.head_dim // 0))),
            step: ($done.step // 0), tokens: ($done.tokens // 0),
            val_loss: $validation.val_loss, val_step: $validation.step,
            complete: ($description.steps != null and $validation.step == $description.steps),
            busy_ms: $time.busy, attention_ms: $time.attention, seconds: (map(.seconds | finite) | max)
        }'
}
summary_of_log() {
    awk '/ M parameters,/ { parameters = $1 }
        /^peak memory/ && $3 > memory { memory = $3 }
        END { printf "{\"parameters_millions\": %.9g, \"peak_memory_mb\": %.9g}", parameters, memory }'
}

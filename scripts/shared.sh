# shellcheck shell=bash
# Functions that all scripts share: environment, messages, names, signals, complete files, and reading a run's
# JSON. A script begins with
#
#     self=$(readlink -f -- "$0")
#     . "${self%/*}/shared.sh"
#
# and has then $script, its name, and $top, the top of the tree.
script=${self:?}
script=${script##*/}
top=$(readlink -f -- "${BASH_SOURCE[0]}")
top=${top%/scripts/shared.sh}
top=${top:-/}

# A number has a point and a letter is a byte in every locale. CDPATH makes cd go elsewhere and print; the others change bash or grep.
export LC_ALL=C
unset CDPATH GLOBIGNORE GREP_OPTIONS POSIXLY_CORRECT BASH_ENV ENV

# ----------------------------------------------------------------------------
# Messages

# Ends the script with one line, whatever characters a name in it has, also where the errors of a command go to a file.
exec {user}>&2
fail() { # message, exit code
    printf '%s: %s\n' "$script" "${1//[[:cntrl:]]/?}" >&"$user"
    exit "${2:-1}"
}

say() { printf '%s\n' "$*" 2>/dev/null || fail "standard output: cannot be written"; }
show() { cat <"$1" 2>/dev/null || fail "standard output: cannot be written"; }

# Prints the comment at the head of the script.
usage() { awk 'NR > 1 && !sub(/^# ?/, "") && !/^#/ { exit } NR > 1 && !/^shellcheck / && !/^!/' <"$self"; }

needs() { # programs
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null || fail "$program is missing: run scripts/install.sh"
    done
}

# A file that a program opens would otherwise become the standard output.
{ true 3>&1; } 2>/dev/null || fail "standard output: is closed"

# ----------------------------------------------------------------------------
# Names

# A name that begins with a dash is no option to any command when it begins with ./ instead.
path() { # variable
    if [[ ${!1} == -* ]]; then printf -v "$1" './%s' "${!1}"; fi
}

# For a pattern of files: the name with its own *, ?, [ and backslashes taken literally. Sets $literal.
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

# Gives a file its final name in one step. Where that fails, an earlier file by the name stays as it is.
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

# A command that start() has started is a session of its own: a signal of the terminal reaches this script alone, which passes
# on SIGTERM, once. When the command has ended, so does the script, with 128 + the signal. $resumes says what the user can do.
stop() { # signal
    interrupted=$1
    if [ -n "$child" ]; then signal_child TERM; else end_interrupted; fi
}
end_interrupted() { fail "ended by SIG$interrupted${resumes:+; $resumes}" $((128 + $(kill -l "$interrupted"))); }
# Before the child is a session of its own it is still this shell's copy, in which a signal would be lost.
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
        # shellcheck disable=SC2064 # the signal of this round
        trap "stop $signal" "$signal"
    done
    trap pause TSTP
}

start() { # command...
    setsid -- "$@" </dev/null {user}>&- &
    child=$!
}

# Waits for the command and returns its exit code. A signal ends bash's wait early, and bash keeps the exit code of a child.
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

# One script at a time builds in a directory: two compilers would write one program. $build_lock is closed when it has.
lock_build() { # build directory, as make takes it
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

# Values of a file of JSON lines on standard input, by a program of jq for one line. A line that a crash has cut, or filled with
# zeros, is no JSON and is left out. `finite` selects numbers: jq reads 1e999 as the largest double, NaN as a number below all.
finite="def finite: numbers | select((isnan | not) and fabs < 1e308);"
json_lines() { # program
    jq -R -r "$finite fromjson? | objects | $1"
}

# A run as a JSON object, from what train_gpt wrote to its directory and to its log: steps planned and done, tokens, the last
# validation and its step, milliseconds of the steps and of their attention, parameters in millions, peak memory in MB.
# A step that stands there twice counts as its last line says.
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

#!/usr/bin/env bash
# Runs cmocka programs, reports how each one ended, and prints one line of totals. make test calls it. TEST_JOBS
# programs run at a time (default 1), because most of them have one thread. Each argument is a program with its
# arguments, and environment variables before it: 'SIMT_ORDER=reverse build/test/test_simt'.
set -ufo pipefail
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # waiting threads do not occupy a core

records=$(mktemp -d) || exit 1
trap 'rm -rf "$records"' EXIT

# A program's record is its output and a line with its exit code and seconds. The rename of that line's file marks the
# end of the program. A script's background processes ignore Ctrl-C unless env restores the default.
run() { # words, record
    local started words
    read -ra words <<<"$1"
    started=$(date +%s.%N)
    env --default-signal=INT,QUIT "${words[@]}" >"$2.output" 2>&1
    echo "$? $(echo "$(date +%s.%N) $started" | awk '{printf "%.1f", $1 - $2}')" >"$2.line"
    mv "$2.line" "$2.ended"
}

passed=0 failed=0 broken=()
# The name of a program, then its environment variables. BUILD shows which sanitizer the program has.
name_of() { # words
    local word settings="" program=""
    for word in $1; do
        case $word in
        TOKENIZER=* | CXX=* | MAKE=*) ;;
        *=*) settings+=" $word" ;;
        *) program+="${program:+ }${word##*/}" ;;
        esac
    done
    echo "$program$settings"
}
report() { # words, record
    local status seconds passed_here failed_here name
    name=$(name_of "$1")
    read -r status seconds <"$2.ended"
    passed_here=$(grep -c '^\[       OK \]' "$2.output")
    failed_here=$(grep -oE '^\[  FAILED  \] [a-z][^ ]*$' "$2.output" | sort -u | wc -l)
    # A program has failed if it dies, even if no test reports a failure. It has also failed
    # if it ran no test and gave no reason.
    if [ "$status" -ne 0 ] || { [ "$passed_here" -eq 0 ] && ! grep -q 'SKIPPED:' "$2.output"; }; then
        [ "$failed_here" -gt 0 ] || failed_here=1
        broken+=("$name")
        cat "$2.output"
    fi
    grep -iE '^\[  SKIPPED \]|SKIPPED:' "$2.output"
    printf '%3d passed, %d failed, %6.1f s  %s\n' "$passed_here" "$failed_here" "$seconds" "$name"
    passed=$((passed + passed_here)) failed=$((failed + failed_here))
    rm "$2.ended"
}
report_ended() {
    local i
    for i in "${!programs[@]}"; do
        if [ -e "$records/$i.ended" ]; then report "${programs[i]}" "$records/$i"; fi
    done
}

programs=("$@")
for i in "${!programs[@]}"; do
    if [ "$i" -ge "${TEST_JOBS:-1}" ]; then wait -n; fi
    report_ended
    run "${programs[i]}" "$records/$i" &
done
wait
report_ended
for name in "${broken[@]}"; do echo "failed: $name"; done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ] && [ $passed -gt 0 ]

#!/usr/bin/env bash
# Runs cmocka programs, says how each ended, and ends with one line of totals. Used by make test. TEST_JOBS of them run at a time, 1
# by default: most have one thread. An argument is a program, with arguments of its own after it and settings of the environment
# before it: 'SIMT_ORDER=reverse build/test/test_simt'.
set -ufo pipefail
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # threads that wait leave the core to others

records=$(mktemp -d) || exit 1
trap 'rm -rf "$records"' EXIT

# A program's record: what it printed; then a line with its exit code and seconds, by which it is known to have ended. In the
# background of a script Ctrl-C is ignored, unless that is undone.
run() { # words, record
    local started words
    read -ra words <<<"$1"
    started=$(date +%s.%N)
    env --default-signal=INT,QUIT "${words[@]}" >"$2.output" 2>&1
    echo "$? $(echo "$(date +%s.%N) $started" | awk '{printf "%.1f", $1 - $2}')" >"$2.line"
    mv "$2.line" "$2.ended"
}

passed=0 failed=0 broken=()
# A program's name, then its settings: of a sanitizer's it is told by BUILD.
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
    # A program that dies, or that ran nothing and does not say why, has failed even where no test says so.
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

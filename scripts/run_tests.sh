#!/usr/bin/env bash
# Runs cmocka programs, shows what each prints, and ends with one line of totals. Used by make test. TEST_JOBS of them run at a
# time, 1 by default: most have one thread.
set -uo pipefail
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # threads that wait leave the core to others

records=$(mktemp -d)
trap 'rm -rf "$records"' EXIT

# A program's record: what it printed; then a line with its exit code and seconds, by which it is known to have ended. In the
# background of a script Ctrl-C is ignored, unless that is undone.
run() { # program, record
    local started
    started=$(date +%s.%N)
    env --default-signal=INT,QUIT "$1" >"$2.output" 2>&1
    echo "$? $(echo "$(date +%s.%N) $started" | awk '{printf "%.1f", $1 - $2}')" >"$2.line"
    mv "$2.line" "$2.ended"
}

passed=0 failed=0 broken=()
report() { # program, record
    local status seconds passed_here failed_here
    read -r status seconds <"$2.ended"
    passed_here=$(grep -c '^\[       OK \]' "$2.output")
    failed_here=$(grep -oE '^\[  FAILED  \] [a-z][^ ]*$' "$2.output" | sort -u | wc -l)
    # A program that dies, or that ran nothing, has failed even where no test says so.
    if [ "$status" -ne 0 ] || [ "$passed_here" -eq 0 ]; then
        [ "$failed_here" -gt 0 ] || failed_here=1
        broken+=("${1##*/}")
        cat "$2.output"
    fi
    grep -iE '^\[  SKIPPED \]|SKIPPED:' "$2.output"
    printf '%-28s %3d passed, %d failed, %6.1f s\n' "${1##*/}" "$passed_here" "$failed_here" "$seconds"
    passed=$((passed + passed_here)) failed=$((failed + failed_here))
    rm "$2.ended"
}
report_ended() {
    local record
    for record in "$records"/*.ended; do
        if [ -e "$record" ]; then
            record=${record%.ended}
            report "${programs[${record##*/}]}" "$record"
        fi
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
[ ${#broken[@]} -eq 0 ] || echo "failed: ${broken[*]}"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ] && [ $passed -gt 0 ]

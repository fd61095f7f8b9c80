#!/usr/bin/env bash
# Runs cmocka programs one after the other, shows what each prints, and ends with one line of totals. Used by make test.
set -uo pipefail
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # threads that wait leave the core to others

passed=0 failed=0 broken=()
for program in "$@"; do
    started=$(date +%s.%N)
    output=$("$program" 2>&1)
    status=$?
    seconds=$(echo "$(date +%s.%N) $started" | awk '{printf "%.1f", $1 - $2}')
    passed_here=$(grep -c '^\[       OK \]' <<<"$output")
    failed_here=$(grep -oE '^\[  FAILED  \] [a-z][^ ]*$' <<<"$output" | sort -u | wc -l)
    # A program that dies, or that ran nothing, has failed even where no test says so.
    if [ $status -ne 0 ] || [ "$passed_here" -eq 0 ]; then
        [ "$failed_here" -gt 0 ] || failed_here=1
        broken+=("${program##*/}")
        printf '%s\n' "$output"
    fi
    grep -iE '^\[  SKIPPED \]|SKIPPED:' <<<"$output"
    printf '%-28s %3d passed, %d failed, %6.1f s\n' "${program##*/}" "$passed_here" "$failed_here" "$seconds"
    passed=$((passed + passed_here)) failed=$((failed + failed_here))
done
[ ${#broken[@]} -eq 0 ] || echo "failed: ${broken[*]}"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ] && [ $passed -gt 0 ]

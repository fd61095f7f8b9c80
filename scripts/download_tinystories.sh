#!/usr/bin/env bash
# Downloads TinyStories, two million short stories in simple English (Eldan and Li, 2023; CDLA-Sharing-1.0): 1.9 GB
# for training and 19 MB for validation. <|endoftext|> separates the stories.
#
#   scripts/download_tinystories.sh [DIRECTORY]       default: data/tinystories
#   scripts/download_tinystories.sh --small           only the validation file, which is enough for a first try
#
# TINYSTORIES_URL names another place that has the files. After an interruption, the same command continues the
# download. A file gets its final name only when it is complete.
set -euo pipefail
self=$(readlink -f -- "$0")
# shellcheck source=scripts/shared.sh
. "${self%/*}/shared.sh"

url=${TINYSTORIES_URL:-https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main}
files=(TinyStoriesV2-GPT4-valid.txt TinyStoriesV2-GPT4-train.txt)
directory=data/tinystories

while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    --small) files=("${files[0]}") ;;
    -*) fail "$1: unknown option (see --help)" 2 ;;
    *) directory=$1 ;;
    esac
    shift
done
command -v curl >/dev/null || fail "curl is missing: apt-get install curl"
path directory
make_directory "$directory"
resumes="the same command goes on from what is there"
take_signals

# Prints the size that the server reports, or nothing if the server reports none.
remote_size() {
    curl -sSfIL --retry 3 "$1" | tr -d '\r' | awk 'tolower($1) == "content-length:" { size = $2 } END { print size }'
}

for file in "${files[@]}"; do
    target=$directory/$file
    if [ -e "$target" ]; then
        say "$target is there"
        continue
    fi
    size=$(remote_size "$url/$file") || fail "$url/$file: cannot be had (see above)"
    [ "${size:-0}" -gt 0 ] || fail "$url/$file: the server does not say how long it is"
    free=$(df -P --block-size=1 "$directory" | awk 'NR == 2 { print $4 }')
    have=$(stat -c %s "$target.partial" 2>/dev/null || echo 0)
    if [ "$have" -gt "$size" ]; then
        rm "$target.partial"
        have=0
    fi
    [ "$free" -gt $((size - have)) ] || fail "$directory: $((size - have)) bytes are needed, $free are free"
    say "$target: $size bytes, $have of them are there"
    if [ "$have" -lt "$size" ]; then
        status=0
        run curl -fL --progress-bar --retry 3 -C - -o "$target.partial" "$url/$file" || status=$?
        if [ $status -eq 33 ]; then # curl 33: the server cannot continue in the middle of a file
            rm "$target.partial"
            status=0
            run curl -fL --progress-bar --retry 3 -o "$target.partial" "$url/$file" || status=$?
        fi
        [ $status -eq 0 ] || fail "$url/$file: cut off; the same command goes on from what is there"
    fi
    have=$(stat -c %s "$target.partial")
    [ "$have" -eq "$size" ] || fail "$target.partial: $have bytes, must be $size; delete it and start again"
    mv "$target.partial" "$target"
done
say "---> HINT: scripts/pretrain_tinystories.sh trains on it"

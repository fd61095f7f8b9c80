#!/usr/bin/env bash
# Produces the results in docs/results/variants.md: every variant on one text and on the retrieval task, with three
# seeds each. It takes about two hours on two cores. After an interruption, the same command resumes it.
#
#   docs/results/variants.sh runs/variants
set -euo pipefail
self=$(readlink -f -- "$0")
# shellcheck source=scripts/shared.sh
. "${self%/docs/*}/scripts/shared.sh"
[ $# -eq 1 ] || fail "want one directory, for the runs" 2
out=$1
if [[ $out != /* ]]; then out=$PWD/$out; fi
cd "$top"
export OMP_NUM_THREADS=1
make_directory "$out"
literal_pattern "$out"
pattern=$literal
resumes="the same line goes on from there"
take_signals
run make -j"$(nproc)" DEVICE=cpu all >/dev/null

# ----------------------------------------------------------------------------
# The text: C headers

if [ ! -e "$out/text_val_000000.bin" ]; then
    find /usr/include -name '*.h' | LC_ALL=C sort >"$out/files.txt"
    run build/tokenizer train -q --vocab-size 1024 --max-bytes 32000000 --files-from "$out/files.txt" -o "$out/tokenizer.json"
    run build/tokenizer prepare -q -t "$out/tokenizer.json" --max-bytes 32000000 --files-from "$out/files.txt" --output-prefix "$out/text"
fi

blocks=(
    --variant 'dense|ATTN=dense|'
    --variant 'moba_128x2|ATTN=flashmoba|--moba-block 128 --moba-topk 2'
    --variant 'moba_64x4|ATTN=flashmoba|--moba-block 64 --moba-topk 4'
    --variant 'moba_32x8|ATTN=flashmoba|--moba-block 32 --moba-topk 8'
    --variant 'moba_32x8_k3|ATTN=flashmoba KCONV=3|--moba-block 32 --moba-topk 8'
    --variant 'moba_32x8_k5|ATTN=flashmoba KCONV=5|--moba-block 32 --moba-topk 8'
    --variant 'dense_k3|ATTN=dense KCONV=3|'
)
run scripts/compare.sh --train-data "$pattern/text_train_*.bin" --val-data "$pattern/text_val_*.bin" --tokenizer "$out/tokenizer.json" \
    --seeds 3 --steps 600 --output "$out/text" "${blocks[@]}" \
    --variant 'dense_k5|ATTN=dense KCONV=5|' \
    --variant 'kdgqa|GQA=kdgqa|' \
    --variant 'random_map|GQA=kdgqa|--kd-source random' \
    --variant 'shuffled_map|GQA=kdgqa|--kd-source shuffled' \
    --variant 'dgqa_diff|GQA=dgqa|--kd-window 20 --dgqa-kind diff' \
    --variant 'pgqa|GQA=pgqa|' \
    --variant 'moba_32x8_k3_kdgqa|ATTN=flashmoba KCONV=3 GQA=kdgqa|--moba-block 32 --moba-topk 8' \
    -- --layers 4 --channels 128 --heads 8 --kv-heads 4 -t 1024 -b 1 -d 1024 --learning-rate 2e-3 -u 20 --val-batches 24

curves() { # file, directory of the runs, variants
    local name runs=()
    for name in "${@:3}"; do
        for seed in 1337 1338 1339; do runs+=("$name=$out/$2/$name/seed_$seed"); done
    done
    scripts/plot.sh --band --output "$out/$1" --title "$1" -- "${runs[@]}" >/dev/null
}
curves variants_blocks text dense moba_128x2 moba_64x4 moba_32x8 moba_32x8_k3 dense_k3
curves variants_heads text dense kdgqa shuffled_map random_map dgqa_diff pgqa

# ----------------------------------------------------------------------------
# The retrieval task: one key-value pair is hidden among five sentences that repeat. A model with
# dense attention learns the task at 32 tokens, and then at twice the length again and again, up to
# 1024. The variants continue from that model.

if [ ! -e "$out/needle_index.jsonl" ]; then
    for _ in $(seq 3000); do
        printf ' The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.'
    done >"$out/filler.txt"
    { cat "$out/filler.txt" && for letter in {a..z} {A..Z}; do printf ' Code %s: %s.' "$letter" "$letter"; done; } >"$out/words.txt"
    run build/tokenizer train -q --vocab-size 384 -o "$out/words.json" "$out/words.txt"
    run build/retrieval -q -t "$out/words.json" --filler "$out/filler.txt" --lengths 32,64,128,256,512,1024 --samples 40000 --pairs 1 \
        --template ' Code {key}: {value}.' --key-length 1 --value-length 1 --value-alphabet ABCDEFGHIJKLMNOPQRSTUVWXYZ \
        --evaluation-samples 40 --output-prefix "$out/needle"
fi
from=()
for T in 32 64 128 256 512 1024; do
    settings=(--steps 300 --learning-rate 2e-3 -u 20)
    if [ "$T" = 32 ]; then settings=(--steps 1500 --learning-rate 4e-3 -u 50); fi
    run build/train_gpt_cpu_fp32 -i "$pattern/needle_${T}_train_*.bin" -j "$pattern/needle_${T}_val_*.bin" \
        --tokenizer "$out/words.json" --layers 2 --channels 64 --heads 4 --kv-heads 4 -t "$T" -b $((1024 / T)) -d 1024 --seed 3 \
        --weight-decay 0 -v 200 --val-batches 8 "${settings[@]}" "${from[@]}" -o "$out/base_$T" --resume
    from=(--init-from "$out/base_$T")
done

needle() { # steps, directory, options of compare.sh
    run scripts/compare.sh --train-data "$pattern/needle_1024_train_*.bin" --val-data "$pattern/needle_1024_val_*.bin" \
        --tokenizer "$out/words.json" --steps "$1" --output "$out/$2" "${@:3}"
}
model=(--init-from "$out/base_1024" -t 1024 -b 1 -d 1024 --weight-decay 0 --val-batches 8)
# These models get another attention without training for it. compare.sh runs at least one
# step, so the step has almost no size.
needle 1 swapped --seeds 1 "${blocks[@]}" -- "${model[@]}" --learning-rate 1e-9
needle 400 needle --seeds 3 "${blocks[@]}" \
    --variant 'moba_128x2_k3|ATTN=flashmoba KCONV=3|--moba-block 128 --moba-topk 2' \
    --variant 'gqa|ATTN=dense|--kv-heads 2' \
    --variant 'kdgqa|GQA=kdgqa|--kv-heads 2' \
    --variant 'random_map|GQA=kdgqa|--kv-heads 2 --kd-source random' \
    --variant 'dgqa_diff|GQA=dgqa|--kv-heads 2 --kd-window 20 --dgqa-kind diff' \
    --variant 'pgqa|GQA=pgqa|--kv-heads 2' \
    -- "${model[@]}" --learning-rate 1e-3 -u 20

curves variants_needle needle dense moba_128x2 moba_64x4 moba_32x8 moba_32x8_k3 dense_k3

# The accuracy of every cell at 1024 tokens: over all samples, and by the needle's depth.
jq -c 'select(.length == 1024)' <"$out/needle_index.jsonl" >"$out/far_index.jsonl"
cp "$out/needle_1024_val_000000.bin" "$out/far_1024_val_000000.bin"
for cell in "$out"/swapped/*/seed_* "$out"/needle/*/seed_*; do
    [ -d "$cell" ] || continue
    flags=$(tr ' ' '\n' <"$cell.settings" | sed -n '1,5s/^[A-Z]*=//p' | paste -s -d ' ')
    read -r device attn gqa kconv precision <<<"$flags"
    printf '%s ' "${cell#"$out"/}"
    "build/train_gpt_${device}_$precision" --attention "$attn" --query-heads "$gqa" --kconv "$kconv" --eval-retrieval "$out/far" --init-from "$cell" -b 4 |
        sed -n 's/^ *1024 //p'
done | tee "$out/accuracy.txt"

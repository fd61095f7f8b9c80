#!/usr/bin/env python3
"""Prints docs/results/kernels.md: the resources of a multiprocessor that each kernel uses, flashmoba's operations at each length beside
the least possible ones, and the predicted times. make kernel-table calls this script and makes its inputs:

    --ptxas      the output of nvcc -Xptxas -v for each object
    --launches   "kernel threads dynamic-bytes", a line for every launch of the tests on the emulator (SIMT_LAUNCHES)
    --counts     JSON of build/bench/moba_simt_bf16 --count, one file for each kind of selection
    --roomy      the same with more workspace
    --ladder     the current page: the new page keeps its notes on measurements
"""
import argparse
import json
import re
import subprocess

OPERATIONS_OF_PRODUCT = 2 * 16 * 8 * 16

# Limits of a multiprocessor: bytes of shared memory, warps, blocks. All have 65536 registers. sm_86 and sm_89
# run the code of sm_80.
MULTIPROCESSORS = {
    "sm_80": {"shared": 164 << 10, "warps": 64, "blocks": 32, "code": "sm_80"},
    "sm_86": {"shared": 100 << 10, "warps": 48, "blocks": 16, "code": "sm_80"},
    "sm_89": {"shared": 100 << 10, "warps": 48, "blocks": 24, "code": "sm_80"},
    "sm_90": {"shared": 228 << 10, "warps": 64, "blocks": 32, "code": "sm_90"},
}
REGISTERS, RESERVED_SHARED = 65536, 1024

# The predicted time of a stage, as a multiple of its least time.
MISSES = 2

# Forward and backward on one H100 in ms, from the figure of arXiv 2511.11571: FlashAttention-2, FlashMoBA
# (with routing).
PUBLISHED = {8192: (6.8, 6.0), 16384: (24, 13.1), 32768: (94, 28.0), 65536: (373, 68.0), 131072: (1490, 174), 262144: (5970, 530), 524288: (23900, 1620)}


# ----------------------------------------------------------------------------
# Kernels


def plain_name(demangled):
    """Removes result and parameters: f<128, 64>, for any linkage."""
    depth = 0
    for i, letter in enumerate(demangled):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            demangled = demangled[:i]
            break
    return demangled.removeprefix("void ").replace("__nv_bfloat16", "bf16")


def demangle(names):
    shown = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, map(plain_name, shown.splitlines())))


def read_ptxas(paths):
    """Returns {mangled name: {architecture: registers, static shared bytes, stack and spilled bytes}}."""
    kernels = {}
    for path in paths:
        entry = None
        with open(path, encoding="utf-8") as file:
            for line in file:
                if found := re.search(r"Compiling entry function '(\w+)' for '(sm_\d+)'", line):
                    entry = kernels.setdefault(found[1], {}).setdefault(found[2], {})
                elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
                    entry["stack"], entry["spills"] = int(found[1]), int(found[2]) + int(found[3])
                elif found := re.search(r"Used (\d+) registers", line):
                    shared = re.search(r"(\d+) bytes smem", line)
                    entry["registers"], entry["shared"] = int(found[1]), int(shared[1]) if shared else 0
    return kernels


def read_launches(path):
    """Returns {mangled name: (threads of the largest block, most dynamic shared bytes)}."""
    launches = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            name, threads, dynamic = line.split()
            known = launches.get(name, (0, 0))
            launches[name] = (max(known[0], int(threads)), max(known[1], int(dynamic)))
    return launches


def resident_warps(kernel, architecture, threads, dynamic):
    """Returns the warps of all blocks that fit on a multiprocessor at once."""
    limits, code = MULTIPROCESSORS[architecture], kernel[MULTIPROCESSORS[architecture]["code"]]
    warps = -(-threads // 32)
    of_warp = -(-code["registers"] * 32 // 256) * 256
    by_registers = REGISTERS // of_warp // 4 * 4 // warps
    by_shared = limits["shared"] // (-(-(code["shared"] + dynamic) // 128) * 128 + RESERVED_SHARED)
    return warps * min(by_registers, by_shared, limits["warps"] // warps, limits["blocks"])


def by_number(name):
    """Returns a key that sorts <64> before <128>."""
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", name)]


def print_kernels(kernels, launches):
    demangled = demangle(list(kernels) + list(launches))
    by_name = {demangled[name]: launched for name, launched in launches.items()}
    print("| kernel | threads | registers sm_80, sm_90 | shared KB, static + dynamic | stack, spills | warps at once: " + ", ".join(MULTIPROCESSORS) + " |")
    print("|---|--:|--:|--:|--:|--:|")
    for name in sorted(kernels, key=lambda name: by_number(demangled[name])):
        kernel, launched = kernels[name], by_name.get(demangled[name])
        row = [f"`{demangled[name]}`"]
        registers = ", ".join(str(kernel[code]["registers"]) for code in ("sm_80", "sm_90"))
        lost = ", ".join(str(max(code[what] for code in kernel.values())) for what in ("stack", "spills"))
        static = max(code["shared"] for code in kernel.values())
        if launched:
            warps = ", ".join(str(resident_warps(kernel, architecture, *launched)) for architecture in MULTIPROCESSORS)
            row += [str(launched[0]), registers, f"{static / 1024:.1f} + {launched[1] / 1024:.1f}", lost, warps]
        else:
            row += ["-", registers, f"{static / 1024:.1f} + -", lost, "-"]
        print("| " + " | ".join(row) + " |")


# ----------------------------------------------------------------------------
# Counts


def stages_of(count):
    return {stage["name"]: stage for stage in count["stages"]}


def moved(stage):
    return stage["read"] + stage["written"]


def of_floor(stage):
    return f"{moved(stage) / stage['floor']:.2f}" if stage["floor"] else ""


def print_stages(count):
    print("| stage | launches | products, M | TFLOP done | useful | GB read | written | floor, GB | of floor | atomics, M | least ms |")
    print("|---|" + "--:|" * 10)
    for stage in count["stages"]:
        floor = f"{1e-9 * stage['floor']:.2f}" if stage["floor"] else ""
        print(
            f"| {stage['name']} | {stage['launches']} | {1e-6 * stage['products']:.1f} | {1e-12 * stage['products'] * OPERATIONS_OF_PRODUCT:.3f} "
            f"| {1e-12 * stage['useful']:.3f} | {1e-9 * stage['read']:.2f} | {1e-9 * stage['written']:.2f} | {floor} | {of_floor(stage)} "
            f"| {1e-6 * stage['atomics']:.1f} | {stage['least_ms']:.2f} |"
        )


def print_lengths(counts):
    print("| T | products done, TFLOP | useful | bytes, GB | router of floor | forward | merge | backward, all | all | least ms | predicted ms | FlashMoBA, published | FA2, published | FA2 / predicted |")
    print("|--:|" + "--:|" * 13)
    for count in counts:
        stages = stages_of(count)
        total = stages["all"]
        dense, sparse = PUBLISHED[count["T"]]
        predicted = MISSES * total["least_ms"]
        ratios = " | ".join(of_floor(stages[name]) for name in ("router", "forward", "merge", "backward, all", "all"))
        print(
            f"| {count['T']} | {1e-12 * total['products'] * OPERATIONS_OF_PRODUCT:.2f} | {1e-12 * total['useful']:.2f} | {1e-9 * moved(total):.1f} "
            f"| {ratios} | {total['least_ms']:.1f} | {predicted:.1f} | {sparse:g} | {dense:g} | {dense / predicted:.1f} |"
        )


def print_selections(counts):
    print("| selection | bytes of the routed forward, GB | floor | of floor | with the merge | backward, all, of floor |")
    print("|---|--:|--:|--:|--:|--:|")
    for count in counts:
        stages = stages_of(count)
        forward, merge = stages["forward"], stages["merge"]
        both = (moved(forward) + moved(merge)) / (forward["floor"] + merge["floor"])
        print(
            f"| {count['selection']} | {1e-9 * moved(forward):.2f} | {1e-9 * forward['floor']:.2f} | {of_floor(forward)} | {both:.2f} "
            f"| {of_floor(stages['backward, all'])} |"
        )


# ----------------------------------------------------------------------------

LADDER = """## The ladder

One line for each version that was measured, newest last, with the prediction that was written down before it ran. Written by hand.

| version | shape | predicted ms | measured ms | outcome, and what it asks for next | GPU | date | commit |
|---|---|--:|--:|---|---|---|---|
| none yet | | | | nothing has run on hardware | | | |"""


def ladder(path):
    try:
        with open(path, encoding="utf-8") as file:
            page = file.read()
    except FileNotFoundError:
        return LADDER
    begin = page.find("## The ladder")
    return page[begin:].rstrip() if begin >= 0 else LADDER


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvcc", required=True)
    parser.add_argument("--ptxas", nargs="+", required=True)
    parser.add_argument("--launches", required=True)
    parser.add_argument("--counts", nargs="+", required=True)
    parser.add_argument("--roomy", required=True)
    parser.add_argument("--ladder", required=True)
    arguments = parser.parse_args()
    version = subprocess.run([arguments.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+), V([\d.]+)", version)
    records = []
    for path in arguments.counts:
        with open(path, encoding="utf-8") as file:
            records.append(json.load(file))
    uniform = records[0]["counts"]
    middle = [[count for count in record["counts"] if count["T"] == 65536][0] for record in records]
    shape = middle[0]
    sizes = ", ".join(f"{key} {shape[key]}" for key in "BHGDSK")

    print(
        f"""# The kernels: what they take, what they do, what that predicts

Written by `make kernel-table` (dev/bench/kernel_table.py), but for the ladder at the end. **No GPU has run any of this.** Registers and shared memory
are the compiler's, counts are formulas that `test_moba_counts` compares with the emulator's counters, and times are predictions.

## What each kernel takes of a multiprocessor

bf16, nvcc {release[1]} (V{release[2]}), `-Xptxas -v` for sm_80 and sm_90. Threads and dynamic shared memory are the most that the kernels'
tests launch with. Of warps a multiprocessor has room for 64 (48 on sm_86 and sm_89, which run the code of sm_80). A block may have
99 KB of shared memory on sm_86 and sm_89 and 227 KB on sm_90; no kernel asks for more than 99, which it asserts where the amount is
computed. `make compile-cuda` fails where a bf16 kernel spills. What has no threads here is launched by `make test-long` only.
"""
    )
    print_kernels(read_ptxas(arguments.ptxas), read_launches(arguments.launches))
    print(
        f"""
## What flashmoba does, and the least it could do

`build/bench/moba_simt_bf16 --count`: matrix products (mma.sync m16n8k16), bytes, atomics and launches of each stage, with every row of
queries, keys, values and partial results counted as often as a kernel asks for it. Caches make some of that cheaper: all of a head's
centroids, which every tile of queries reads again, fit in the L2 cache of an H100. Floors are the least that any kernels could do:

    router      2TD + (T/128)(n/2) 2D + 2T(K-1)           forward    T(K-1)(4D + 4) + items * 4SD
    merge       T(K-1)(2D + 4) + 8TD                       backward   twice the forward

of a query head, with n = T/S blocks. The merge's floor includes the own block, which here is part of the forward: it is a choice like
the others. "Least ms" of a stage is the longer of its products at {records[0]["assumed_tflops"]:.0f} TFLOP/s and its bytes at {records[0]["assumed_tbs"]} TB/s, about what an H100
has for mma.sync and for memory.

{sizes}, T 65536, every block with equal chance:
"""
    )
    print_stages(shape)
    print("\nThe routed forward at T 65536 by what queries choose: equal chance; by 1 / distance; the first block always; always the oldest ones.\n")
    print_selections(middle)
    print(
        f"""
## Predictions

{sizes}; milliseconds of forward and backward. **Predicted, not measured**: twice the sum of the stages' least times, as if every
stage reached half of what bounds it. Published figures are read off the paper's figure (arXiv 2511.11571, one H100 80 GB) and rounded;
dense attention and this were never timed on one GPU.
"""
    )
    print_lengths(uniform)
    with open(arguments.roomy, encoding="utf-8") as file:
        roomy = json.load(file)["counts"]
    megabytes = [counts[0]["workspace"] >> 20 for counts in (uniform, roomy)]
    print(
        f"""
That is with {megabytes[0]} MB of workspace (`--moba-workspace`, the default). Long sequences then go in pieces of a head, which read keys and
values again for each piece and carry sums of their gradients from one to the next. With {megabytes[1]} MB:
"""
    )
    print_lengths([count for count in roomy if count["T"] >= 131072])
    print()
    print(ladder(arguments.ladder))



if __name__ == "__main__":
    main()

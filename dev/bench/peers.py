#!/usr/bin/env python3
"""Measures PyTorch on the same GPU and the same shapes, and compares it with the results of the benchmarks.

    build/bench/attention_cuda_bf16 --json attention.json
    build/bench/step_cuda_bf16 --batch 32 --json step.json
    build/bench/moba_cuda_bf16 --json moba.json
    dev/bench/peers.py --attention attention.json --step step.json --moba moba.json --json peers.json

Attention is scaled_dot_product_attention with each of its backends: flash (FlashAttention-2), cudnn, and math if its T x T scores fit.
The step is a step of a Llama of the same shape: bf16 autocast over fp32 weights, torch.compile, fused AdamW, clipping. Times are
medians from CUDA events. The script counts useful operations as the benchmarks do. It compares block-sparse attention with dense
attention by flash and cudnn, up to --most-dense tokens, and with FlashMoBA if its package flash_moba is installed. FlashMoBA too counts
a query's own block among the selected blocks. Exit code 0: measured; 77: torch or a GPU is missing.
"""
import argparse
import json
import sys

SKIPPED = 77


def fail_without(reason):
    print(f"SKIPPED: peers.py: {reason}")
    sys.exit(SKIPPED)


try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    fail_without(f"torch is missing ({error})")
if not torch.cuda.is_available():
    fail_without("torch sees no GPU")

try:
    from flash_moba import flash_moba_varlen_func
except ImportError:
    flash_moba_varlen_func = None

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
MATH_BYTES = 8 << 30  # upper bound on the scores of the math backend


def median_seconds(call, rounds, warmup=3):
    times = []
    for round_number in range(-warmup, rounds):
        begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        call()
        done.record()
        done.synchronize()
        if round_number >= 0:
            times.append(begun.elapsed_time(done) / 1e3)
    return sorted(times)[len(times) // 2]


# ----------------------------------------------------------------------------
# Attention


def visible_pairs(T, window):
    width = window if 0 < window < T else T
    return width * (width + 1) / 2 + (T - width) * width


def time_attention(shape, backend, rounds):
    """Returns the median seconds of forward and of backward, or None if the backend refuses the shape."""
    B, T, H, G, D = (shape[key] for key in "BTHGD")
    if shape["window"]:
        return None  # SDPA expresses a window only as a mask, which flash refuses
    if backend == "math" and B * H * T * T * 4 > MATH_BYTES:
        return None
    q, k, v = (
        torch.randn(B, heads, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (H, G, G)
    )
    dout = torch.randn_like(q)

    def forward():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)

    try:
        with sdpa_kernel(BACKENDS[backend]):
            with torch.no_grad():
                forward_seconds = median_seconds(forward, rounds)
            out = forward()

            def backward():
                torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

            return forward_seconds, median_seconds(backward, rounds)
    except RuntimeError as error:
        print(f"  {backend}: not for {shape['B']}x{shape['T']}x{H}/{G}x{D}: {str(error).splitlines()[0][:90]}")
        return None


def compare_attention(path, rounds):
    with open(path, encoding="utf-8") as file:
        ours = json.load(file)
    print("useful TFLOP/s, forward and backward together")
    print("   B      T    H    G    D  window      here" + "".join(f"{name:>10}" for name in BACKENDS) + "   here/flash")
    results = []
    for shape in ours["results"]:
        work = 4 * visible_pairs(shape["T"], shape["window"]) * shape["D"] * shape["H"] * shape["B"]
        row = {key: shape[key] for key in ("B", "T", "H", "G", "D", "window")}
        row["here"] = {key: shape[key] for key in ("forward_ms", "backward_ms", "tflops")}
        line = "".join(f"{shape[key]:>{width}}" for key, width in (("B", 4), ("T", 7), ("H", 5), ("G", 5), ("D", 5)))
        line += f"{shape['window']:>8}{shape['tflops']:>10.1f}"
        for name in BACKENDS:
            seconds = time_attention(shape, name, rounds)
            if seconds:
                row[name] = {
                    "forward_ms": 1e3 * seconds[0],
                    "backward_ms": 1e3 * seconds[1],
                    "tflops": 3.5 * work / sum(seconds) / 1e12,
                }
            line += f"{row[name]['tflops']:>10.1f}" if seconds else f"{'-':>10}"
            torch.cuda.empty_cache()
        if "flash" in row:
            row["of_flash"] = shape["tflops"] / row["flash"]["tflops"]
            line += f"{row['of_flash']:>13.2f}"
        print(line, flush=True)
        results.append(row)
    return results


# ----------------------------------------------------------------------------
# Block-sparse attention


def time_flash_moba(shape, rounds):
    """Returns the median seconds of forward (with its routing) and of backward, or None if it refuses the shape."""
    B, T, H, G, D = (shape[key] for key in "BTHGD")
    q, k, v = (torch.randn(B * T, heads, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (H, G, G))
    dout = torch.randn_like(q)
    begins = torch.arange(B + 1, device="cuda", dtype=torch.int32) * T

    def forward():
        return flash_moba_varlen_func(q, k, v, begins, begins, T, T, shape["S"], shape["K"], causal=True)

    try:
        with torch.no_grad():
            forward_seconds = median_seconds(forward, rounds)
        out = forward()

        def backward():
            torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

        return forward_seconds, median_seconds(backward, rounds)
    except RuntimeError as error:
        print(f"  flash_moba: not for T {T} S {shape['S']} K {shape['K']}: {str(error).splitlines()[0][:90]}")
        return None


def compare_moba(path, rounds, most_dense):
    with open(path, encoding="utf-8") as file:
        ours = json.load(file)
    peers = {}
    for name in ("flash", "cudnn"):
        peers[name] = lambda shape, name=name: (
            time_attention({**shape, "window": 0}, name, rounds) if shape["T"] <= most_dense else None
        )
    if flash_moba_varlen_func:
        peers["flash_moba"] = lambda shape: time_flash_moba(shape, rounds)
    else:
        print("flash_moba is not installed: FlashMoBA is not among the peers")
    print("milliseconds of forward + backward, and the peers' over those here; -: not run, or not possible")
    print("   B      T    H    D    S   K         here" + "".join(f"{name:>24}" for name in peers))
    results = []
    for shape in ours["results"]:
        if shape["input"] != "random":
            continue
        here = shape["flashmoba"]["forward_ms"] + shape["flashmoba"]["backward_ms"]
        row = {key: shape[key] for key in "BTHGDSK"}
        row["here"] = shape["flashmoba"]
        line = "".join(f"{shape[key]:>{width}}" for key, width in (("B", 4), ("T", 7), ("H", 5), ("D", 5), ("S", 5), ("K", 4)))
        line += f"{here:>13.3f}"
        for name, peer in peers.items():
            torch.cuda.reset_peak_memory_stats()
            seconds = peer(shape)
            if seconds:
                row[name] = {
                    "forward_ms": 1e3 * seconds[0],
                    "backward_ms": 1e3 * seconds[1],
                    "peak_bytes": torch.cuda.max_memory_allocated(),
                    "times_here": 1e3 * sum(seconds) / here,
                }
                line += f"{1e3 * sum(seconds):>14.3f} ({row[name]['times_here']:6.2f})"
            else:
                line += f"{'-':>24}"
            torch.cuda.empty_cache()
        print(line, flush=True)
        results.append(row)
    return results


# ----------------------------------------------------------------------------
# A training step


class Block(torch.nn.Module):
    def __init__(self, channels, heads, ffn):
        super().__init__()
        self.heads = heads
        self.input_norm, self.post_norm = (torch.nn.RMSNorm(channels, eps=1e-5) for _ in range(2))
        self.qkv = torch.nn.Linear(channels, 3 * channels, bias=False)
        self.out = torch.nn.Linear(channels, channels, bias=False)
        self.gate_up = torch.nn.Linear(channels, 2 * ffn, bias=False)
        self.down = torch.nn.Linear(ffn, channels, bias=False)

    def rotate(self, x, cosine, sine):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)

    def forward(self, x, cosine, sine):
        B, T, C = x.shape
        q, k, v = self.qkv(self.input_norm(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.rotate(q, cosine, sine), self.rotate(k, cosine, sine)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).reshape(B, T, C))
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(torch.nn.Module):
    def __init__(self, layers, channels, ffn, vocabulary, T):
        super().__init__()
        heads, half = channels // 64, 32
        self.embedding = torch.nn.Embedding(vocabulary, channels)
        self.blocks = torch.nn.ModuleList(Block(channels, heads, ffn) for _ in range(layers))
        self.norm = torch.nn.RMSNorm(channels, eps=1e-5)
        angles = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())
        torch.nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cosine, self.sine)
        logits = F.linear(self.norm(x), self.embedding.weight)  # tied, as in this trainer
        return F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.view(-1))


def time_step(shape, rounds):
    layers = int(shape["model"][1:])
    channels, B, T = 64 * layers, shape["batch"], shape["sequence_length"]
    ffn = (channels * 8 // 3 + 63) // 64 * 64
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    model = Llama(layers, channels, ffn, shape["vocab"], T).cuda()
    update = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled = torch.compile(model)
    tokens, targets = (torch.randint(shape["vocab"], (B, T), device="cuda") for _ in range(2))

    def step():
        update.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = compiled(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update.step()

    return median_seconds(step, rounds, warmup=5)


def compare_steps(paths, rounds):
    results = []
    for path in paths:
        with open(path, encoding="utf-8") as file:
            shape = json.load(file)
        name = f"{shape['model']}, B {shape['batch']}, T {shape['sequence_length']}"
        try:
            seconds = time_step(shape, rounds)
        except RuntimeError as error:  # out of memory, or no compiler
            print(f"{name}: torch.compile: {str(error).splitlines()[0][:100]}")
            continue
        finally:
            torch.cuda.empty_cache()
            torch._dynamo.reset()
        rate = shape["batch"] * shape["sequence_length"] / seconds
        ratio = shape["tokens_per_second"] / rate
        print(f"{name}: here {shape['tokens_per_second']:.0f} tokens/s, torch.compile {rate:.0f}: {ratio:.2f} times as many here")
        results.append(
            {
                "model": shape["model"],
                "batch": shape["batch"],
                "sequence_length": shape["sequence_length"],
                "here_tokens_per_second": shape["tokens_per_second"],
                "torch_tokens_per_second": rate,
                "ratio": ratio,
            }
        )
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", help="JSON of build/bench/attention_cuda_bf16")
    parser.add_argument("--step", action="append", default=[], help="JSON of build/bench/step_cuda_bf16; may be repeated")
    parser.add_argument("--moba", help="JSON of build/bench/moba_cuda_bf16")
    parser.add_argument("--most-dense", type=int, default=131072, help="tokens up to which dense peers of --moba run (131072)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", help="write the results there too")
    arguments = parser.parse_args()
    record = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version(), "gpu": torch.cuda.get_device_name()}
    print(f"torch {record['torch']}, cuDNN {record['cudnn']}, {record['gpu']}")
    if arguments.attention:
        record["attention"] = compare_attention(arguments.attention, arguments.rounds)
    if arguments.moba:
        record["moba"] = compare_moba(arguments.moba, arguments.rounds, arguments.most_dense)
    record["steps"] = compare_steps(arguments.step, arguments.rounds)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()

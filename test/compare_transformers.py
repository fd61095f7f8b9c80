#!/usr/bin/env python3
"""Compares a checkpoint with Hugging Face transformers.

    test/compare_transformers.py CHECKPOINT LOGITS [TOKEN...]
        loads CHECKPOINT with transformers.LlamaForCausalLM in fp32 and compares its logits with those of the file
        LOGITS, as the training program writes it: a safetensors file with one tensor "logits" (T, V), F32, and
        the metadata "tokens", T numbers with spaces between. Tokens given on the command line must be the same.
        Exit code 0: no logit differs by more than 1e-4; 1: one does, or the checkpoint does not load.
    test/compare_transformers.py --make-fixture DIR
        makes two tiny random Llamas with transformers, DIR/tied and DIR/untied, each with the logits that
        transformers computes (expected.safetensors, the same format), and DIR/versions.txt.

Without torch, transformers and safetensors it says that it skips, and exits with code 77.
"""

import argparse
import json
import pathlib
import struct
import sys

TOLERANCE = 1e-4
SKIPPED = 77

try:
    import safetensors
    import safetensors.torch
    import torch
    import transformers
except ImportError as error:
    print(f"SKIPPED: the comparison with transformers did not run: {error}", file=sys.stderr)
    sys.exit(SKIPPED)


def read_logits(path):
    """The tensor (T, V) and the list of T tokens."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(length)).get("__metadata__", {})
    tokens = [int(token) for token in metadata["tokens"].split()]
    return safetensors.torch.load_file(path)["logits"], tokens


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


def compare(directory, logits_path, tokens):
    ours, recorded = read_logits(logits_path)
    if tokens and tokens != recorded:
        sys.exit(f"{logits_path}: its tokens are {recorded}, not {tokens}")
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            sys.exit(f"{directory}: {problem}: {sorted(info[problem])}")
    theirs = logits_of(model.eval(), recorded)
    if theirs.shape != ours.shape:
        sys.exit(f"{logits_path}: logits {tuple(ours.shape)}, transformers computes {tuple(theirs.shape)}")
    worst = (theirs - ours).abs().max().item()
    good = worst <= TOLERANCE  # false for a NaN
    print(f"{directory}: {len(recorded)} tokens, largest difference of a logit {worst:.3g}, "
          f"largest logit {theirs.abs().max().item():.3g}: {'ok' if good else 'DIFFERENT'}")
    return 0 if good else 1


def make_fixture(directory, tied):
    torch.manual_seed(1 if tied else 2)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0 if tied else 500.0},
        attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gains away from 1, and matrices large enough for attention to be far from uniform.
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.2)
    model.save_pretrained(directory)
    tokens = torch.randint(0, 101, (24,)).tolist()
    safetensors.torch.save_file({"logits": logits_of(model, tokens).contiguous()},
                                directory / "expected.safetensors",
                                {"tokens": " ".join(str(token) for token in tokens)})
    (directory / "generation_config.json").unlink(missing_ok=True)


def make_fixtures(directory):
    for tied in (True, False):
        make_fixture(directory / ("tied" if tied else "untied"), tied)
    (directory / "versions.txt").write_text(
        "Made by test/compare_transformers.py --make-fixture with\n"
        f"transformers {transformers.__version__}\ntorch {torch.__version__}\n"
        f"safetensors {safetensors.__version__}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make-fixture", metavar="DIR", type=pathlib.Path)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("logits", nargs="?")
    parser.add_argument("tokens", nargs="*", type=int)
    arguments = parser.parse_args()
    if arguments.make_fixture:
        make_fixtures(arguments.make_fixture)
        return 0
    if not arguments.logits:
        parser.error("want a checkpoint and a file of logits")
    return compare(arguments.checkpoint, arguments.logits, arguments.tokens)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Compares build/tokenizer with Hugging Face's `tokenizers` (and `tiktoken`, where it is installed).

    compare_tokenizer.py [--tokenizer build/tokenizer] [--quick]
    compare_tokenizer.py --record DIRECTORY     write the fixtures that test_tokenizer.c reads

Checked: our trainer gives the merges of theirs; the same tokenizer.json gives the same ids in both, on texts in several
scripts, on random Unicode, on every code point there is, whoever trained it; the same for rank files. --quick takes
every 16th code point. Exits 77, saying so, where `tokenizers` is absent.
"""
import argparse
import array
import base64
import json
import os
import random
import subprocess
import sys
import tempfile

try:
    import tokenizers
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError:
    print("SKIPPED: compare_tokenizer.py: the Python package `tokenizers` is not installed", file=sys.stderr)
    sys.exit(77)

END = "<|endoftext|>"
CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CL100K_POSSESSIVE = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                     r"|\s*[\r\n]|\s+(?!\S)|\s+")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_SHORT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

SCRIPTS = {
    "English": "The quick brown fox doesn't jump; they've said we'll see I'm sure you'd like it. IT'S OK, WE'LL GO!",
    "German": "Der Fluß heißt Weiß; Übermäßig große Äpfel kosten 1.234,56 € — »sagte« er.",
    "Russian": "Съешь же ещё этих мягких французских булок, да выпей чаю. Ёлка, 2024 год.",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία· ΟΔΟΣ οδός.",
    "Chinese": "我能吞下玻璃而不伤身体。二〇二四年，第１２３４章，价格￥99.",
    "Japanese": "いろはにほへと ちりぬるを。カタカナとｶﾀｶﾅ、「漢字」々〆。",
    "Korean": "다람쥐 헌 쳇바퀴에 타고파. 가나다라",
    "Arabic": "أنا قادر على أكل الزجاج و هذا لا يؤلمني. ١٢٣٤٥ بِسْمِ ٱللَّٰهِ",
    "Hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה. שָׁלוֹם",
    "Hindi": "मैं काँच खा सकता हूँ और मुझे उससे कोई चोट नहीं पहुंचती। १२३४",
    "Thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ๑๒๓๔",
    "Amharic": "ሰማይ አይታረስ ንጉሥ አይከሰስ። ፩፪፫",
    "emoji": "👨‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ❤️‍🔥 1️⃣ ☺️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🫠🫨",
    "combining": "e\u0301a\u0308\u0323 Z\u0351\u036b\u0343a\u0300\u0301\u0302lgo \u0301x \u0301\u0301 n\u0303 \u20dd",
    "contractions": "'s 'S 'ſ 'ſt 'Ss it'ſ don'T 'LL 'lL 'VE 're 'RE 'm 'K 'd 'sx 'tx ''s '’s I’m x'lly 'ﬆ 'ﬁ 'ŉ ʼn",
    "spaces": "a  b   c \t d\t\te \u00a0f\u00a0\u00a0g \u2003h\u3000\u3000i\u180ej\u200bk\ufeffl \u0085m\u2028n\u2029o \u1680p ",
    "newlines": "a\r\nb\r\n\r\nc\n\n\nd\r\re \n f\n \n\n  g\t\n\th   \n   \n   i\x0b\x0cj\n",
    "digits": "1 12 123 1234 12345 1234567890 3.14159 1e10 ²³¹ ½⅓ Ⅷ 一二三 ٣٤٥ 𝟘𝟙𝟚𝟛 x1y22z333 १२३४५",
    "code": "int main(void) {\n    for (int i = 0; i < n; i++) {\n\t\tx[i] += y[i]; // sum\n    }\n\n    return 0;\n}\n",
    "punctuation": "!!! ... --- ??? «» “” ‘’ …—– \"'`~@#$%^&*()_+-=[]{}|;:,./<>? !\n?\r\n;\n\n",
    "controls": "a\x01b\x1fc\x7fd\x80e\x9ff\ufffdg\uffffh\U0010ffffi\ue000j",
    "special": "<|endoftext|> <|endoftext|>x <|endoftext|endoftext|> <|end <|im_start|>",
    "supplementary": "𝒜𝒷𝒸 𐍈𐍉 𠀀𠀁 \U0001e030 \U00031350 \U00010d40 \U00013460 \U0002ebf0",
}


class Report:
    def __init__(self):
        self.failures = 0

    def check(self, ok, what, details=""):
        print(("ok    " if ok else "FAIL  ") + what + ("" if ok else ": " + details), flush=True)
        self.failures += not ok


class Ours:
    """build/tokenizer, many texts at a time: `prepare` writes them as one shard, <|endoftext|> before each."""

    def __init__(self, program, directory):
        self.program, self.directory = program, directory

    def run(self, *arguments, data=None):
        done = subprocess.run([self.program, *arguments], input=data, capture_output=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{arguments}: exit code {done.returncode}: {done.stderr.decode()}")
        return done.stdout

    def encode(self, tokenizer, text, *options):
        data = text if isinstance(text, bytes) else text.encode()
        return [int(i) for i in self.run("encode", "-t", tokenizer, *options, data=data).split()]

    def encode_many(self, tokenizer, end, texts):
        path, prefix = os.path.join(self.directory, "texts.jsonl"), os.path.join(self.directory, "texts")
        with open(path, "w", encoding="utf-8") as out:
            for text in texts:
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        self.run("prepare", "-q", "-t", tokenizer, "--output-prefix", prefix, "--validation-fraction", "0",
                 "--shard-tokens", "2000M", path)
        with open(prefix + "_train_000000.bin", "rb") as shard:
            header = array.array("i", shard.read(1024))
            ids = array.array("H" if header[0] == 20240520 else "I", shard.read())
        assert len(ids) == header[2]
        starts = [i for i, token in enumerate(ids) if token == end] + [len(ids)]
        return [list(ids[a + 1:b]) for a, b in zip(starts, starts[1:])]


def split_of(pattern):
    if pattern == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_theirs(pattern, texts, vocab_size, min_frequency=2):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = split_of(pattern)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return t


def corpus(bytes_wanted):
    """Deterministic text: C headers where there are any, every script, and words that repeat."""
    rng = random.Random(1)
    texts, total = [], 0
    for root, directories, files in os.walk("/usr/include"):
        directories.sort()
        for name in sorted(files):
            path = os.path.join(root, name)
            if total < bytes_wanted and os.path.isfile(path):
                with open(path, "rb") as f:
                    text = f.read(200000).decode("utf-8", "ignore").replace("\0", "")
                if text:
                    texts.append(text)
                    total += len(text)
    scripts = list(SCRIPTS.values())
    for _ in range(400):
        words = " ".join(rng.choice(scripts) for _ in range(3)).split(" ")
        rng.shuffle(words)
        texts.append(" ".join(words))
    return texts


def random_texts(count):
    rng = random.Random(2)
    blocks = [(0, 0x7f), (0x80, 0x24f), (0x370, 0x5ff), (0x600, 0x6ff), (0x900, 0xdff), (0x1e00, 0x206f),
              (0x3000, 0x30ff), (0x4e00, 0x9fff), (0xac00, 0xd7a3), (0x10000, 0x1ffff), (0x1f300, 0x1faff), (9, 32)]
    texts = []
    for _ in range(count):
        chosen = [rng.choice(blocks) for _ in range(rng.randint(1, 4))]
        text = "".join(chr(rng.randint(*rng.choice(chosen))) for _ in range(rng.randint(1, 60)))
        texts.append(text.replace("\0", "\1"))
    return texts


def long_texts():
    rng = random.Random(3)
    return ["a" * 100000, "ab" * 50000, " " * 30000 + "x", "\n" * 20000, "é" * 30000, "1" * 10001, "!" * 20000,
            "漢" * 20000, "".join(rng.choice("abcde") for _ in range(100000)), "\u0301" * 10000,
            " \n" * 10000, "'s" * 10000]


def code_point_texts(step):
    """Every code point in a few surroundings, 512 to a text."""
    points = [c for c in range(1, 0x110000, step) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(points), 512):
        yield "".join("a{0}b {0}{0} 1{0}2'{0} \n{0}\n!{0}? {0} ".format(chr(c)) for c in points[start:start + 512])


def first_difference(texts, ours, theirs):
    if len(ours) != len(theirs):
        return f"{len(ours)} texts, not {len(theirs)}"
    for text, a, b in zip(texts, ours, theirs):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            return f"{text[:60]!r}: token {at}: {a[at:at + 6]}, not {b[at:at + 6]}"
    return ""


def compare_encodings(report, ours, what, path, step):
    theirs = Tokenizer.from_file(path)
    theirs.encode_special_tokens = True  # as `prepare` reads text
    end = theirs.token_to_id(END)
    groups = {"scripts": list(SCRIPTS.values()), "random Unicode": random_texts(4000), "long words": long_texts(),
              "code": corpus(1000000)}
    if step:
        groups[f"code points, step {step}"] = list(code_point_texts(step))
    for name, texts in groups.items():
        a = ours.encode_many(path, end, texts)
        b = [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]
        details = first_difference(texts, a, b)
        report.check(not details, f"{what}: {name} ({len(texts)} texts, {sum(map(len, b))} tokens)", details)
    theirs.encode_special_tokens = False
    texts = [SCRIPTS["special"], "\0a\0\0b", "x" + END + END + " y\n" + END, ""]
    a = [ours.encode(path, text, "--allow-special") for text in texts]
    b = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    report.check(a == b, f"{what}: special tokens", first_difference(texts, a, b))


def compare_training(report, ours, directory, pattern, name, texts):
    theirs = train_theirs(pattern, texts, 4096)
    path, our_path = os.path.join(directory, f"theirs-{name}.json"), os.path.join(directory, f"ours-{name}.json")
    theirs.save(path)
    data = os.path.join(directory, "corpus.jsonl")
    with open(data, "w", encoding="utf-8") as out:
        for text in texts:
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    ours.run("train", "-q", "--vocab-size", "4096", "--pattern", name, "-o", our_path, data)
    with open(path, encoding="utf-8") as a, open(our_path, encoding="utf-8") as b:
        wanted = [" ".join(m) if isinstance(m, list) else m for m in json.load(a)["model"]["merges"]]
        got = json.load(b)["model"]["merges"]
    at = next((i for i, (x, y) in enumerate(zip(wanted, got)) if x != y), min(len(wanted), len(got)))
    report.check(wanted == got, f"training, {name}: {len(wanted)} merges", f"merge {at}: {got[at:at+2]}, not {wanted[at:at+2]}")
    return path, our_path


def byte_alphabet():
    """The character of each byte."""
    characters, others = [], 0
    for b in range(256):
        printable = 33 <= b <= 126 or 161 <= b <= 172 or b >= 174
        characters.append(chr(b if printable else 256 + others))
        others += not printable
    return characters


def write_border_tokenizer(path, pattern):
    """A tokenizer whose ids show where words end: the last byte of any character merges with the first of the next,
    and nothing else merges. A trained one would not show it, having no merges for most characters."""
    characters = byte_alphabet()
    ascii_bytes, inner, leads = range(0, 0x80), range(0x80, 0xC0), range(0xC2, 0xF5)
    pairs = [(a, b) for a in inner for b in leads] + [(a, b) for a in ascii_bytes for b in leads]
    pairs += [(a, b) for a in inner for b in ascii_bytes] + [(a, b) for a in ascii_bytes for b in ascii_bytes]
    merges = [(characters[a], characters[b]) for a, b in pairs]
    vocab = {c: i for i, c in enumerate(sorted(characters))}
    for a, b in merges:
        vocab[a + b] = len(vocab)
    t = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    t.pre_tokenizer = split_of(pattern)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([END])
    t.save(path)


def write_ranks(path, our_json):
    """The ranks of a rank file, from a tokenizer.json whose ids are in the order of its merges."""
    alphabet = {c: b for b, c in enumerate(byte_alphabet())}
    with open(our_json, encoding="utf-8") as f:
        vocab = json.load(f)["model"]["vocab"]
    ranks = {bytes(alphabet[c] for c in key): i for key, i in vocab.items() if key != END}
    with open(path, "wb") as out:
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            out.write(base64.b64encode(token) + b" %d\n" % rank)
    return ranks


def compare_ranks(report, ours, directory, our_json):
    path = os.path.join(directory, "ranks.tiktoken")
    ranks = write_ranks(path, our_json)
    texts = list(SCRIPTS.values()) + random_texts(2000) + corpus(500000)
    exported = os.path.join(directory, "exported.json")
    ours.run("export", "-t", path, "-o", exported)
    mine = ours.encode_many(path, len(ranks), texts)
    theirs = Tokenizer.from_file(exported)
    theirs.encode_special_tokens = True
    b = [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]
    report.check(mine == b, "rank file against its export in tokenizers", first_difference(texts, mine, b))
    try:
        import tiktoken
    except ImportError:
        print("SKIPPED: rank file against tiktoken: the Python package `tiktoken` is not installed")
        return
    encoding = tiktoken.Encoding("ours", pat_str=CL100K, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
    b = [encoding.encode_ordinary(text) for text in texts]
    report.check(mine == b, "rank file against tiktoken", first_difference(texts, mine, b))


def compare_splitting(report, ours, directory, step):
    path = os.path.join(directory, "borders.json")
    for name, pattern, its_step in (("cl100k", CL100K, step), ("gpt2", "gpt2", step),
                                    ("cl100k possessive", CL100K_POSSESSIVE, 16 * step), ("gpt2 split", GPT2, 16 * step),
                                    ("gpt2 short", GPT2_SHORT, 16 * step)):
        write_border_tokenizer(path, pattern)
        compare_encodings(report, ours, f"borders of words, {name}", path, its_step)


def compare_added(report, ours, directory, theirs_json):
    t = Tokenizer.from_file(theirs_json)
    t.add_tokens(["hello", "hello world", " wor", "«sep»", AddedToken("int main", normalized=False)])
    t.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|im"])
    path = os.path.join(directory, "added.json")
    t.save(path)
    texts = ["hello world hello wor", "say hello worldly<|im_start|>x<|im_end|><|im <|im_star", "a«sep»b int main(int",
             "hello<|endoftext|> world", "xhello  wor  ", "int mainhello worint main"]
    for special in (False, True):
        t.encode_special_tokens = not special
        a = [ours.encode(path, text, *(["--allow-special"] if special else [])) for text in texts]
        b = [t.encode(text, add_special_tokens=False).ids for text in texts]
        report.check(a == b, f"added tokens, allow special {special}", first_difference(texts, a, b))


def record_classes(path):
    """The code points that `tokenizers` takes for letters, numbers and spaces, as lines "class first last"."""
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    with open(path, "w", encoding="ascii") as out:
        for name, regex in (("letter", r"\p{L}"), ("number", r"\p{N}"), ("space", r"\s")):
            others = pre_tokenizers.Split(Regex(regex), "removed").pre_tokenize_str(everything)
            members = sorted(set(everything) - set("".join(piece for piece, _ in others)))
            ranges = []
            for c in map(ord, members):
                if ranges and ranges[-1][1] == c - 1:
                    ranges[-1][1] = c
                else:
                    ranges.append([c, c])
            for first, last in ranges:
                out.write(f"{name} {first:x} {last:x}\n")


def record(directory):
    """What `tokenizers` takes for letters, numbers and spaces; a small tokenizer.json for each pattern, and texts with
    their ids."""
    record_classes(os.path.join(directory, "classes.txt"))
    texts = list(SCRIPTS.values()) + random_texts(60) + ["a" * 300, " " * 100 + "x", "", "\r\n\r\n \n x"]
    for pattern, name in ((CL100K, "cl100k"), ("gpt2", "gpt2")):
        t = train_theirs(pattern, list(SCRIPTS.values()) * 2 + [SCRIPTS["English"], SCRIPTS["code"]] * 5, 900)
        t.save(os.path.join(directory, f"{name}.json"), pretty=False)
        plain = Tokenizer.from_file(os.path.join(directory, f"{name}.json"))
        plain.encode_special_tokens = True
        with open(os.path.join(directory, f"{name}.encodings.jsonl"), "w", encoding="utf-8") as out:
            for text in texts:
                out.write(json.dumps({"text": text, "ids": plain.encode(text, add_special_tokens=False).ids,
                                      "ids_special": t.encode(text, add_special_tokens=False).ids}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="build/tokenizer")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--record", metavar="DIRECTORY")
    options = parser.parse_args()
    if options.record:
        record(options.record)
        return 0
    report = Report()
    step = 16 if options.quick else 1
    print(f"tokenizers {tokenizers.__version__}, {options.tokenizer}")
    with tempfile.TemporaryDirectory() as directory:
        ours = Ours(os.path.abspath(options.tokenizer), directory)
        texts = corpus(2000000)
        paths = {}
        for pattern, name in ((CL100K, "cl100k"), ("gpt2", "gpt2")):
            paths[name] = compare_training(report, ours, directory, pattern, name, texts)
            compare_encodings(report, ours, f"{name}, trained by theirs", paths[name][0], 16 * step)
            compare_encodings(report, ours, f"{name}, trained by ours", paths[name][1], 0)
        compare_ranks(report, ours, directory, paths["cl100k"][1])
        compare_splitting(report, ours, directory, step)
        compare_added(report, ours, directory, paths["gpt2"][0])
    print(f"{report.failures} failures")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())

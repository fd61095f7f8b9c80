#!/usr/bin/env python3
"""Breaks the kernels on purpose, one place at a time, and checks that the tests of kernels fail.

    dev/simt/mutate.py                          every barrier, wait and commit; 300 perturbed expressions
    dev/simt/mutate.py --expressions 0          barriers, waits and commits alone
    dev/simt/mutate.py --file gqa.cuh --list    lists the mutants of this file, and runs none
    dev/simt/mutate.py --sample 40 --seed 7     a sample of 40 mutants, without the limit of 95 %

A mutant is one change of gqa.cuh, moba.cuh or kernels/. It deletes a barrier or a cp.async wait, allows one more group in flight at a
wait, moves a bound, an offset or a stride by one, makes a grid or workspace too small, swaps / and % or min and max, or makes a
condition always or never true. One program contains all mutants: each is an expression that tests MUTANT(n), and MUTANT=n in
the environment selects one. So a mutant costs a run of its file's tests, and no build. The script writes the changed headers into
build/mutate and does not change the tree.

Each mutant runs in one mode after another until one catches it. A program that exceeds its time is not caught. Then the address
sanitizer decides, because a mutant that damages the heap can hang in the handler of its own fault.

A survivor must be in mutate_survivors.txt beside this file, with the reason why it is harmless. Exit code 1: a survivor is not in that
file, an entry there matches no mutant, or (without --sample) the tests catch fewer than 95 %.
"""

import argparse
import collections
import hashlib
import json
import os
import re
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SURVIVORS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "mutate_survivors.txt")
WANTED = 0.95
PRECISIONS = ("bf16", "fp32")

# The tests of each file: programs, each with its filters; None: the whole program. A kernel may have a test of its own.
FILES = {
    "gqa.cuh": [("test_gqa", [None])],
    "moba.cuh": [("test_moba_kernels", [None])],
    "kernels/moba_shape.cuh": [("test_moba_kernels", [None])],
    "kernels/flashmoba/router.cuh": [("test_moba_kernels", [None])],
    "kernels/flashmoba/lists.cuh": [("test_moba_kernels", [None])],
    "kernels/flashmoba/items.cuh": [("test_moba_kernels", [None])],
    "kernels/flashmoba/forward.cuh": [("test_moba_kernels", [None])],
    "kernels/flashmoba/sums.cuh": [("test_moba_kernels", [None])],
    "kernels/flashmoba/backward.cuh": [("test_moba_kernels", [None])],
    "kernels/flashmoba/merge.cuh": [("test_moba_kernels", [None])],
    "kernels/flashmoba/groups.cuh": [("test_moba_kernels", [None])],
    "kernels/tile.cuh": [("test_gqa", [None]), ("test_moba_kernels", [None])],
    "kernels/threads.cuh": [("test_kernels", ["rmsnorm_*", None]), ("test_gqa", [None])],
    "kernels/vector.cuh": [("test_kernels", ["rmsnorm_*", None])],
    "kernels/embedding.cuh": [("test_kernels", ["embedding_*"])],
    "kernels/rmsnorm.cuh": [("test_kernels", ["*rmsnorm_*"])],
    "kernels/rope.cuh": [("test_kernels", ["rope_*", "keys_*"])],
    "kernels/swiglu.cuh": [("test_kernels", ["swiglu_*"])],
    "kernels/matmul.cuh": [("test_kernels", ["matmul_*"])],
    "kernels/classifier.cuh": [("test_kernels", ["fused_classifier_*"])],
    "kernels/adamw.cuh": [("test_kernels", ["global_norm*", "adamw_*"])],
    "kernels/keynorm.cuh": [("test_kernels", ["key_*"])],
    "kernels/keyconv.cuh": [("test_kernels", ["keys_*"])],
    "kernels/keys.cuh": [("test_kernels", ["keys_*"])],
    "kernels/moba_plain.cuh": [("test_moba_kernels", ["test_moba_*"])],
    "kernels/noise.cuh": [("test_gqa", ["test_noise"])],
    "kernels/heads.cuh": [("test_heads", [None])],
}

# ----------------------------------------------------------------------------
# Mutants

Edit = collections.namedtuple("Edit", "begin end text")  # of a line; {n} in the text stands for the number of the mutant


class Mutant:
    """One change of one line."""

    def __init__(self, place, kind, change, edits):
        self.file, self.line, self.function, self.precisions, self.source = place
        self.kind, self.change, self.edits = kind, change, edits
        self.number, self.caught_by, self.verdict = 0, "", ""

    def key(self):
        return (self.file, " ".join(self.source.split()), self.change)

    def identity(self):
        """Identifies this mutant, even if its line occurs twice in a file or has two equal changes."""
        return "%s:%d:%d: %s" % (self.file, self.line, self.edits[0].begin, self.change)


COLLECTIVE = re.compile(r"(__syncthreads|__syncwarp|cp_async_commit)\(\)")
WAIT = re.compile(r"cp_async_wait<(.+?)>\(\)")
RELATION = re.compile(r" (<=?|>=?) (?=\S)")
OTHER_RELATION = {"<": ("<=", "1"), "<=": ("<", "-1"), ">": (">=", "-1"), ">=": (">", "1")}
SWAP = re.compile(r"(?<![\w.\])>*/%] )(?<![\w.)])((?:threadIdx\.|blockIdx\.)?[a-z]\w*) ([/%]) (\w+)\b(?![.(\[])")
LITERAL = re.compile(r"(?<= [-+*/%] )(\d+)\b(?!\.)|(?<![\w.])(\d+)(?= \* )")
OPERAND = re.compile(r"(?<= [-+*%^] )((?:gridDim|blockDim|threadIdx|blockIdx)\.[xyz]|[A-Za-z]\w*)(?![\w.(\[<:]|->)"
                     r"|(?<=\w\[)([a-z]\w*)(?=[\] ])")
EXTREME = re.compile(r"\b(min|max|fmaxf)\(")
CONDITION = re.compile(r"\b(?:if|while) \(")
CHOICE = re.compile(r"(?<=[=(,] )(\w+(?: [-+] \w+)? [<>]=? \w+)(?= \? )")
EXCHANGE = re.compile(r"\b1 - slot\b")
DISTANCE = re.compile(r"(?<=_xor_sync\(ALL_LANES, )(\w+), (\d)\)")

# Lines with a part that must be a compile-time constant, and names of numbers that are not indices.
CONSTANT = re.compile(r"constexpr|\benum\b|static_assert|\btemplate\b|typedef|__launch_bounds__|^\s*#|asm|\(&\w+\)\[|"
                      r"^\s*(?:const )?(?:__shared__ )?(?:float|unsigned|floatX|int|double|uint64_t|EmbeddingKey|"
                      r"Values<WIDTH>|__nv_bfloat162) \w+\[|if \(WIDTH|__shared__")
NUMBERS = set("scale scale_log2 sum sigmoid silu sine cosine first_ slope r square z mean uniform turn_ target_logit rate "
              "eps keep beta1 beta2 clip g_ maximum row_maximum dloss inverse correction offset factor added apart norm "
              "theta LN2 LOG2_E alpha direction FLT_MAX sizeof value values gradient".split())


def matching(text, opening):
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return -1


def words_before(code, at):
    """Returns about 16 characters of the code before a place, beginning with a whole word."""
    begin = max(0, at - 16)
    while begin > 0 and re.match(r"\w", code[begin]) and re.match(r"\w", code[begin - 1]):
        begin -= 1
    return code[begin:at].lstrip()


# A grid, a workspace or a block's range of tiles may be larger than necessary without harm. So mutants make their sizes smaller: in
# all host code, and in these lines.
ROOMY = re.compile(r"some_see|all_see|first_key = max|end_query = |const int tiles")
# The direction in which a moved bound of these functions does harm.
HARMFUL = {"some_see": -1, "all_see": 1}


def mutants_of_line(code, place, unrolled, host):
    """Returns the mutants of one line of code without comments; `unrolled`: the line is the head of a loop over registers."""
    made = []
    smaller = host or ROOMY.search(code) or place[2] in HARMFUL
    # After these operators, a larger number makes the result smaller. The first key is a lower bound, so its mutants are larger.
    growing = "+/%" if "first_key = max" in code else "-/%"

    def add(kind, change, *edits):
        made.append(Mutant(place, kind, change, [Edit(*edit) for edit in edits]))

    for found in COLLECTIVE.finditer(code):
        text = found.group(0)
        kind = "commit" if "commit" in text else "barrier"
        add(kind, "delete " + text, (found.start(), found.start(), "(MUTANT({n}) ? (void)0 : "),
            (found.end(), found.end(), ")"))
    for found in WAIT.finditer(code):
        text, groups = found.group(0), found.group(1)
        add("wait", "delete " + text, (found.start(), found.start(), "(MUTANT({n}) ? (void)0 : "),
            (found.end(), found.end(), ")"))
        add("wait", "%s: one more group" % text,
            (found.start(), found.start(), "(MUTANT({n}) ? cp_async_wait<%s + 1>() : " % groups),
            (found.end(), found.end(), ")"))
    if CONSTANT.search(code):
        return made
    templates = [m.span() for m in re.finditer(r"\w<[^<>;()]*>", code)]
    strings = [m.span() for m in re.finditer(r'"[^"]*"', code)]

    def outside(found):
        return not any(a <= found.start() < b for a, b in templates + strings)

    for found in RELATION.finditer(code):
        if unrolled or not outside(found):
            continue
        other, shift = OTHER_RELATION[found.group(1)]
        if place[2] in HARMFUL:
            shift = HARMFUL[place[2]]
            other = "%s %d +" % (found.group(1), shift)
        add("bound", "%s -> %s, %s" % (found.group(1), other, code[found.end():].split(";")[0][:24].strip()),
            (found.end(), found.end(), "%s * MUTANT({n}) + " % shift))
    for found in SWAP.finditer(code):
        if not outside(found) or found.group(1) in NUMBERS or found.group(3) == "D" and "(float)" in code:
            continue
        left, operator, right = found.groups()
        other = "%" if operator == "/" else "/"
        add("quotient", "%s %s %s -> %s" % (left, operator, right, other),
            (found.start(), found.end(),
             "(MUTANT({n}) ? %s %s %s : %s %s %s)" % (left, other, right, left, operator, right)))
    for found in LITERAL.finditer(code):
        literal = found.group(1) or found.group(2)
        if not outside(found) or (unrolled and "++" in code):
            continue
        operator = code[found.start() - 2]
        shifted = int(literal) - 1 if literal == "1" and operator in "+-" else int(literal) + 1
        if smaller:
            shifted = int(literal) + (1 if not found.group(2) and operator in growing else -1)
        add("literal", "%s%s -> %d" % (words_before(code, found.start()), literal, shifted),
            (found.start(), found.end(), "(MUTANT({n}) ? %d : %s)" % (shifted, literal)))
    for found in OPERAND.finditer(code):
        name = found.group(1) or found.group(2)
        if not outside(found) or name in NUMBERS or (unrolled and "++" in code):
            continue
        sign = "-" if smaller and not (found.group(1) and code[found.start() - 2] in growing) else "+"
        add("offset", "%s%s -> %s %s 1" % (words_before(code, found.start()), name, name, sign),
            (found.start(), found.end(), "(%s %s MUTANT({n}))" % (name, sign)))
    for found in EXTREME.finditer(code):
        name = found.group(1)
        add("extreme", "%s -> %s" % (code[found.start():found.end() + 12], "max" if name == "min" else "min"),
            (found.start(), found.end(), "mutant_%s(MUTANT({n}), " % name))
    for found in CONDITION.finditer(code):
        opening = found.end() - 1
        closing = matching(code, opening)
        if closing < 0 or "while" in found.group(0):
            continue
        condition = code[opening + 1:closing]
        add("condition", "(%s) always" % condition[:40], (opening + 1, opening + 1, "MUTANT({n}) || ("),
            (closing, closing, ")"))
        add("condition", "(%s) never" % condition[:40], (opening + 1, opening + 1, "!MUTANT({n}) && ("),
            (closing, closing, ")"))
    for found in CHOICE.finditer(code):
        add("condition", "(%s ?) always" % found.group(1), (found.start(), found.start(), "(MUTANT({n}) || "),
            (found.end(), found.end(), ")"))
    for found in EXCHANGE.finditer(code):
        add("slot", "1 - slot -> slot", (found.start(), found.end(), "(MUTANT({n}) ? slot : 1 - slot)"))
    for found in DISTANCE.finditer(code):
        begin = found.start(2)
        add("literal", "shuffle distance %s -> + 1" % found.group(2),
            (begin, begin + 1, "(%s + MUTANT({n}))" % found.group(2)))
    return made


def mutants_of_file(name):
    """Returns the mutants of the code that the emulator compiles. Code of one precision has mutants of only that precision."""
    made, function, host, unrolled, in_comment = [], "", False, False, False
    conditions = []  # of the preprocessor: each condition, and whether its branch is the true one
    with open(os.path.join(ROOT, name), encoding="utf-8") as source:
        for number, line in enumerate(source, 1):
            code = line.rstrip("\n")
            if in_comment or code.startswith("/*"):
                in_comment = "*/" not in code
                continue
            code = re.sub(r"//.*", "", code)
            directive = code.strip()
            if directive.startswith("#if"):
                conditions.append([directive, True])
            elif directive.startswith("#el"):
                conditions[-1][1] = False
            elif directive.startswith("#endif"):
                conditions.pop()
            named = re.search(r"(?:^|__device__.*?|static inline .*?|__global__ .*?|^    (?=(?:attention|flashmoba|moba)_\w+_kernel))\b(\w+)\(", code)
            if named and not code.startswith("     ") and named.group(1) not in ("__launch_bounds__", "launch"):
                function = named.group(1)
                host = "__device__" not in code and "__global__" not in code and not function.endswith("_kernel")
            precisions, elsewhere = PRECISIONS, False
            for condition, holds in conditions:
                if "DEVICE_SIMT" in condition:
                    elsewhere = elsewhere or not holds
                if "PRECISION_BF16" in condition:
                    precisions = PRECISIONS[:1] if holds else PRECISIONS[1:]
            if not elsewhere:
                made += mutants_of_line(code, (name, number, function, precisions, directive), unrolled, host)
            unrolled = directive == "#pragma unroll"
    return made


SYNCHRONISATION = ("barrier", "wait", "commit")


def chosen_mutants(options):
    """Returns all mutants, and the mutants to run. The choice covers all functions, in an order that depends on the seed and the
    mutants' own text. So a change of one line changes little of a sample."""

    def shuffled(items, name):
        return sorted(items, key=lambda item: hashlib.sha256(repr((options.seed, name(item))).encode()).digest())

    everything = [m for name in FILES for m in mutants_of_file(name)]
    by_function = collections.OrderedDict()
    for mutant in everything:
        if options.file and mutant.file not in options.file:
            continue
        if mutant.kind not in SYNCHRONISATION:
            by_function.setdefault((mutant.file, mutant.function), []).append(mutant)
    chosen = [m for m in everything if m.kind in SYNCHRONISATION and (not options.file or m.file in options.file)]
    # Draws one mutant of each function first, and then from all of them.
    queues = [shuffled(by_function[function], Mutant.key) for function in shuffled(by_function, lambda function: function)]
    rest = shuffled([mutant for queue in queues for mutant in queue[1:]], Mutant.key)
    drawn = []
    for mutant in [queue[0] for queue in queues] + rest:
        if len(drawn) < options.expressions and not any(overlap(mutant, other) for other in drawn):
            drawn.append(mutant)
    # Half of zero is zero: such loops would not end, and a test cannot distinguish them from slow ones.
    chosen += [m for m in drawn if not (m.kind == "bound" and re.search("> -> >=.*(/= 2|while)", m.change + m.source))]
    if options.sample:  # a sample of the mutants of a whole run
        chosen = shuffled(chosen, Mutant.key)
        synchronising = [m for m in chosen if m.kind in SYNCHRONISATION][:options.sample // 4]
        chosen = synchronising + [m for m in chosen if m.kind not in SYNCHRONISATION][:options.sample - len(synchronising)]
    order = list(FILES)
    chosen.sort(key=lambda m: (m.kind not in SYNCHRONISATION, order.index(m.file), m.line))
    for number, mutant in enumerate(chosen, 1):
        mutant.number = number
    return everything, chosen


def overlap(one, other):
    """Returns whether both replace the same text, so that one program cannot contain both."""
    if (one.file, one.line) != (other.file, other.line):
        return False
    return any(a.begin < b.end and b.begin < a.end for a in one.edits for b in other.edits if a.end > a.begin or b.end > b.begin)


# ----------------------------------------------------------------------------
# Programs

MUTANT_HEADER = """// What every mutant asks: is it the one?
#include <stdlib.h>
#ifdef __cplusplus
inline const int chosen_mutant = getenv("MUTANT") ? atoi(getenv("MUTANT")) : 0;
#define MUTANT(n) (chosen_mutant == (n))
#define mutant_min(other, a, b) ((other) ? max(a, b) : min(a, b))
#define mutant_max(other, a, b) ((other) ? min(a, b) : max(a, b))
#define mutant_fmaxf(other, a, b) ((other) ? fminf(a, b) : fmaxf(a, b))
#endif
"""


def write_headers(directory, mutants):
    shutil.copytree(os.path.join(ROOT, "kernels"), os.path.join(directory, "kernels"), dirs_exist_ok=True)
    for name in ("gqa.cuh", "moba.cuh"):
        shutil.copy(os.path.join(ROOT, name), directory)
    with open(os.path.join(directory, "mutant.h"), "w", encoding="utf-8") as header:
        header.write(MUTANT_HEADER)
    by_file = collections.defaultdict(lambda: collections.defaultdict(list))
    for mutant in mutants:
        by_file[mutant.file][mutant.line] += [(edit, mutant) for edit in mutant.edits]
    for name, lines in by_file.items():
        path = os.path.join(directory, name)
        with open(path, encoding="utf-8") as source:
            text = source.read().split("\n")
        for line, edits in lines.items():
            text[line - 1] = edited(text[line - 1], edits)
        with open(path, "w", encoding="utf-8") as target:
            target.write("\n".join(text))


def edited(line, edits):
    """Applies the edits to a line. At one place, an edit that encloses a condition begins before the edits inside it."""
    pieces, at = [], 0
    def order(item):
        edit, mutant = item
        encloses = mutant.kind == "condition" or mutant.kind in SYNCHRONISATION
        closes = edit.text == ")"
        return (edit.begin, edit.end > edit.begin, 0 if closes else 1 if encloses else 2)
    for edit, mutant in sorted(edits, key=order):
        pieces += [line[at:edit.begin], edit.text.replace("{n}", str(mutant.number))]
        at = edit.end
    return "".join(pieces) + line[at:]


SANITIZERS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


class Programs:
    """The tests of kernels, with all mutants inside. Each program is built when it is first needed."""

    def __init__(self, directory, compiler, mutants):
        self.directory, self.compiler, self.mutants = directory, compiler, mutants
        self.seconds, self.allowed = {}, {}
        write_headers(directory, mutants)

    def time_allowed(self, path, pattern, mode):
        """Returns the CPU seconds for a mutant, from the time of the tests without one, which must pass in this mode."""
        if (path, pattern, mode) not in self.allowed:
            ended, where, seconds = run(path, pattern, 0, mode, MOST_SECONDS)
            if ended != "passed":
                sys.exit("%s %s in mode %s %s without a mutant, in %s" % (path, pattern or "", mode, ended, where))
            self.allowed[path, pattern, mode] = int(SLOWER * seconds) + 5
        return self.allowed[path, pattern, mode]

    def leave_out(self, errors):
        """Removes the mutants that the compiler refuses. Its messages show their lines."""
        refused = [m for m in self.mutants if "MUTANT(%d)" % m.number in errors and m.verdict != "no build"]
        if not refused:
            sys.exit(errors)
        for mutant in refused:
            mutant.verdict = "no build"
            print("does not compile: %s:%d: %s" % (mutant.file, mutant.line, mutant.change))
        write_headers(self.directory, [m for m in self.mutants if m.verdict != "no build"])

    def path(self, test, precision, build):
        path = os.path.join(self.directory, "%s_%s_%s" % (test, precision, build))
        if path in self.seconds:
            return path
        command = [self.compiler, "-std=gnu++17", "-O1", "-march=native", "-g0" if build == "plain" else "-g1", "-w",
                   "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", "-fopenmp", "-pthread",
                   "-DDEVICE_SIMT", "-DPRECISION_" + precision.upper(), "-include", os.path.join(self.directory, "mutant.h"),
                   "-I" + self.directory, "-I."] + SANITIZERS[build] + \
                  ["-x", "c++", "test/%s.cu" % test, "-x", "none", os.path.join(self.directory, "test", "reference.o"),
                   "-o", path, "-lcmocka", "-lm"]
        started = time.time()
        while True:
            built = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
            if built.returncode == 0:
                break
            self.leave_out(built.stderr)
        self.seconds[path] = time.time() - started
        print("built %s in %.0f s" % (os.path.basename(path), self.seconds[path]), flush=True)
        return path


# ----------------------------------------------------------------------------
# Runs

MODES = {  # build, and settings of the emulator
    "forward": ("plain", {}),
    "reverse": ("plain", {"SIMT_ORDER": "reverse", "SIMT_ASYNC": "eager"}),
    "random": ("plain", {"SIMT_ORDER": "random", "SIMT_ASYNC": "mixed", "SIMT_SEED": "2"}),
    "address": ("address", {}),
    "thread": ("thread", {}),
}
SLOWER = 3  # upper bound on a mutant's CPU time, relative to the unchanged tests
MOST_SECONDS = 1500  # upper bound on the CPU time of the unchanged tests
WALL_SECONDS = 2000  # ends a process that waits forever; high, because other programs may use the machine
TROUBLE = re.compile(r"^\[  ERROR   \]|^\[  FAILED  \]|ERROR: AddressSanitizer|runtime error:|WARNING: ThreadSanitizer", re.M)


def limit_time(seconds):
    def limit():
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return limit


def run(path, pattern, mutant, mode, cpu_seconds):
    """Returns the result ("passed", "failed" or "timeout"), the test that was running at the end, and the CPU seconds."""
    settings = dict(os.environ, MUTANT=str(mutant), OMP_NUM_THREADS="1", MALLOC_PERTURB_="165", **MODES[mode][1])
    settings["ASAN_OPTIONS"] = "allocator_may_return_null=1:detect_leaks=0"
    process = subprocess.Popen([path] + ([pattern] if pattern else []), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=settings, cwd=ROOT, preexec_fn=limit_time(cpu_seconds), start_new_session=True)
    output, begun, stopped = b"", time.time(), None
    used_before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while stopped is None:
            if not selector.select(timeout=max(0, begun + WALL_SECONDS - time.time())):
                stopped = "timeout"
                break
            some = os.read(process.stdout.fileno(), 65536)
            output += some
            if not some:
                break
            if TROUBLE.search(output[-70000:].decode("utf-8", "replace")):
                stopped = "failed"
    if stopped:
        os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    text = output.decode("utf-8", "replace")
    trouble = TROUBLE.search(text)
    if trouble: # the next test may already have begun
        text = text[:trouble.start()]
    tests = re.findall(r"^\[ RUN      \] (\S+)", text, re.M)
    test = tests[-1] if tests else "start"
    seconds = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - used_before
    if stopped:
        return stopped, test, seconds
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timeout", test, seconds
    return ("passed" if status == 0 else "failed"), test, seconds


def judge(mutant, programs, options, is_known):
    """Sets verdict (caught, survived or timeout) and caught_by. A known survivor runs in only one mode."""
    tests = [(test, pattern) for test, filters in FILES[mutant.file] for pattern in filters]
    first = mutant.precisions[0]
    plan = [("forward", precision) for precision in mutant.precisions]
    if not is_known:
        plan += [("reverse", first), ("random", first)]
    if not is_known and not options.plain:
        plan += [("address", first), ("thread", first)]
    mutant.verdict = "survived"
    for mode, precision in plan:
        if mutant.verdict == "timeout" and mode != "address":
            continue
        for test, pattern in tests:
            path = programs.path(test, precision, MODES[mode][0])
            ended, where, _ = run(path, pattern, mutant.number, mode, programs.time_allowed(path, pattern, mode))
            if ended == "failed":
                mutant.verdict, mutant.caught_by = "caught", "%s %s: %s" % (mode, precision, where)
                return
            if ended == "timeout":
                mutant.verdict, mutant.caught_by = "timeout", "%s %s: %s" % (mode, precision, where)
                break


# ----------------------------------------------------------------------------
# Known survivors

def known_survivors():
    """Returns {(file, source line, change): reason}. An entry has three lines, and its reason is on indented lines."""
    known, key = collections.OrderedDict(), None
    if not os.path.exists(SURVIVORS):
        return known
    with open(SURVIVORS, encoding="utf-8") as entries:
        lines = [line.rstrip("\n") for line in entries if not line.startswith("#")]
    heads = []
    for line in lines:
        if line.startswith("    "):
            known[key] = (known[key] + " " + line.strip()).strip()
        elif line.strip():
            heads.append(" ".join(line.split()))
            if len(heads) == 3:
                key = tuple(heads)
                known[key], heads = "", []
    return known


# ----------------------------------------------------------------------------
# Report

def table(rows):
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def totals(mutants):
    rows = [("kind", "mutants", "caught", "survived", "time exceeded")]
    rows.append(("---",) * 5)
    kinds = sorted({m.kind for m in mutants}, key=lambda k: (k not in SYNCHRONISATION, k))
    for kind in kinds + ["all"]:
        of_kind = [m for m in mutants if kind in (m.kind, "all")]
        rows.append((kind, len(of_kind)) + tuple(sum(m.verdict == v for m in of_kind) for v in ("caught", "survived", "timeout")))
    return table(rows)


RESUMED = """
which takes over what an earlier run, with the same tests or fewer, had caught.
"""


def report(mutants, known, path, command, resumed):
    caught = sum(m.verdict == "caught" for m in mutants)
    modes = collections.Counter(m.caught_by.split(":")[0] for m in mutants if m.verdict == "caught")
    survivors = [("file", "function", "line", "mutation", "why it is harmless"), ("---",) * 5]
    survivors += [(m.file, m.function, "`%s`" % m.source, "`%s`" % m.change, known.get(m.key(), "**unknown**"))
                  for m in mutants if m.verdict != "caught"]
    with open(path, "w", encoding="utf-8") as page:
        page.write("""# Mutants of the kernels

Every barrier, wait and commit of the kernels deleted, and expressions perturbed, one at a time; the tests of kernels on the
emulator then have to fail (dev/simt/mutate.py says how). What sizes grids, workspaces and the tiles that a block looks at is made
smaller, not larger, as nobody minds a block without work; loops that would never end are left alone. Written by

    %s
%s
%s: %d of %d mutants are caught, %.1f %%.

%s

Caught by, the first mode that does: %s.

## Survivors

%s
""" % (command, RESUMED if resumed else "", time.strftime("%Y-%m-%d", time.gmtime()), caught, len(mutants), 100 * caught / len(mutants), totals(mutants),
            ", ".join("%s %d" % item for item in modes.most_common()), table(survivors)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", action="append", help="mutate this file alone; may be given more than once")
    parser.add_argument("--expressions", type=int, default=300, help="how many expressions to perturb (default 300)")
    parser.add_argument("--sample", type=int, default=0, help="so many mutants in all, a quarter of them barriers and waits")
    parser.add_argument("--seed", type=int, default=1, help="which expressions (default 1)")
    parser.add_argument("--plain", action="store_true", help="no sanitizers: quick, and some survive that they would catch")
    parser.add_argument("--list", action="store_true", help="name the mutants and stop")
    parser.add_argument("--report", help="write the results to this Markdown file")
    parser.add_argument("--seconds", type=float, default=0, help="begin no mutant after so many seconds")
    parser.add_argument("--resume", action="store_true",
                        help="take as caught what the last run caught, as when it was interrupted or tests have been added since")
    parser.add_argument("--build", default=os.path.join("build", "mutate"), help="folder for programs (default build/mutate)")
    parser.add_argument("--compiler", default=os.environ.get("CXX", "g++"))
    options = parser.parse_args()
    for name in options.file or []:
        if name not in FILES:
            parser.error("--file %s: must be one of %s" % (name, ", ".join(FILES)))

    everything, mutants = chosen_mutants(options)
    if options.list:
        for m in mutants:
            print("%4d %-24s %-34s %4d  %-10s %s" % (m.number, m.file, m.function, m.line, m.kind, m.change))
        print("%d mutants, of %d" % (len(mutants), len(everything)))
        return 0

    known = known_survivors()
    keys = {m.key() for m in everything}
    obsolete = [key for key in known if key not in keys]

    directory = os.path.join(ROOT, options.build)
    os.makedirs(directory, exist_ok=True)
    reference = os.path.join(options.build, "test", "reference.o")
    subprocess.run([os.environ.get("MAKE", "make"), "--no-print-directory", "BUILD=" + options.build, reference],
                   cwd=ROOT, check=True)
    programs = Programs(directory, options.compiler, mutants)

    # Builds the plain programs first, to find the mutants that do not compile. A sample builds fp32 programs only when it needs them.
    for test in sorted({test for m in mutants for test, _ in FILES[m.file]}):
        for precision in PRECISIONS[:1] if options.sample else PRECISIONS:
            programs.path(test, precision, "plain")
    mutants = [m for m in mutants if m.verdict != "no build"]
    caught_before = os.path.join(directory, "caught.json")
    results = {}
    if options.resume and os.path.exists(caught_before):
        with open(caught_before, encoding="utf-8") as stored:
            results = json.load(stored)
    begun = time.time()
    for m in mutants:
        if m.identity() in results:
            m.verdict, m.caught_by = "caught", results[m.identity()]
            continue
        if options.seconds and time.time() - begun > options.seconds:
            break
        judge(m, programs, options, m.key() in known)
        if m.verdict == "caught" and not options.sample:
            results[m.identity()] = m.caught_by
            with open(caught_before, "w", encoding="utf-8") as stored:
                json.dump(results, stored, indent=1)
        note = "" if m.verdict == "caught" else "known" if m.key() in known else "NOT KNOWN"
        print("%4d %-24s %-32s %4d  %-44s %-8s %s %s" % (m.number, m.file, m.function[:32], m.line, m.change[:44],
                                                        m.verdict, m.caught_by, note), flush=True)
    run_mutants = [m for m in mutants if m.verdict not in ("", "no build")]
    print()
    print(totals(run_mutants))
    if len(run_mutants) < len(mutants):
        print("%d of %d mutants were not begun in %.0f s" % (len(mutants) - len(run_mutants), len(mutants), options.seconds))

    if options.report:
        command = "dev/simt/mutate.py" + "".join(" " + argument for argument in sys.argv[1:])
        report(run_mutants, known, options.report, command, options.resume)

    good = True
    for m in run_mutants:
        if m.verdict != "caught" and m.key() not in known:
            print("not caught, and not known to be harmless (%s):\n%s\n%s\n%s" % ((m.verdict,) + m.key()))
            good = False
    for key in obsolete:
        print("a known survivor matches nothing any more:\n%s\n%s\n%s" % key)
        good = False
    caught = sum(m.verdict == "caught" for m in run_mutants)
    print("%d of %d caught, %.1f %%" % (caught, len(run_mutants), 100 * caught / max(1, len(run_mutants))))
    if not options.sample and caught < WANTED * len(run_mutants):
        print("fewer than %.0f %%" % (100 * WANTED))
        good = False
    print("[%s] mutants_of_kernels" % ("       OK " if good else "  FAILED  "))  # scripts/run_tests.sh counts this line
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Break one operator of the program at a time, and count how many breaks the tests notice.

A map of which test runs which line comes first (pytest-cov, of the extra ``dev``), then the
mutants, each tried with the tests that run its line:

    python -m pytest -q -n auto --dist loadfile --cov=medgemma_clinical --cov=medgemma_trainer \
        --cov=dte_encoder --cov=dataset_format --cov=srtr_dataset --cov-context=test --cov-report=
    python tests/benchmarks/mutants.py draw --number 100 --seed 0 > mutants.jsonl
    python tests/benchmarks/mutants.py run mutants.jsonl --coverage .coverage

A mutant names its line by its text, so mutants drawn from one version can be run on another:
those whose line is gone are counted apart.
"""

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOP = ("medgemma_trainer.py", "dte_encoder.py", "dataset_format.py", "srtr_dataset.py")
MAX_TESTS = 100
TEST_SECONDS, ALL_SECONDS = 200, 900
"""A hanging test has noticed a mutant; a mutant that takes longer in all counts as survived."""

SWAPS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
}  # fmt: skip


def sources(root):
    return [root / name for name in TOP] + sorted((root / "medgemma_clinical").rglob("*.py"))


def operators(node):
    """Return the operators of an expression with their operands on both sides."""
    if isinstance(node, ast.Compare):
        return list(zip([node.left, *node.comparators], node.ops, node.comparators, strict=False))
    if isinstance(node, ast.BinOp):
        return [(node.left, node.op, node.right)]
    if isinstance(node, ast.BoolOp):
        pairs = zip(node.values, node.values[1:], strict=False)
        return [(left, node.op, right) for left, right in pairs]
    return []


def mutants(path):
    """Return each operator of a file that stands on one line, with what replaces it."""
    text = path.read_text(encoding="utf-8")
    lines, tree, found = text.encode().split(b"\n"), ast.parse(text), []
    parts = [getattr(x, name, None) for x in ast.walk(tree) for name in ("annotation", "returns")]
    types = {id(y) for part in parts if part is not None for y in ast.walk(part)}
    for node in (x for x in ast.walk(tree) if id(x) not in types):
        for left, operator, right in operators(node):
            old, new = SWAPS.get(type(operator), ("", ""))
            if not old or left.end_lineno != right.lineno:
                continue
            line, start, end = lines[right.lineno - 1], left.end_col_offset, right.col_offset
            between = line[start:end].decode()
            if between.count(old) == 1:
                broken = line[:start] + between.replace(old, new).encode() + line[end:]
                place = {"file": path.relative_to(ROOT).as_posix(), "line": right.lineno}
                found.append({**place, "old": line.decode(), "new": broken.decode()})
    return found


def write(content):
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def find_line(lines, mutant):
    """Return the index of a mutant's line, the nearest of equal ones; None where it is gone."""
    same = [k for k, line in enumerate(lines) if line == mutant["old"]]
    return min(same, key=lambda k: abs(k + 1 - mutant["line"]), default=None)


def tests_of(data, path, line):
    """Return up to MAX_TESTS tests that run a line: those named like its module, then of each file.

    Where imports alone run the line, the tests that run its file stand for them. Where a fixture
    alone does, the files that share the fixture of trained runs are added.
    """
    contexts = data.contexts_by_lineno(str(path))
    covering = {c for c in contexts.get(line, []) if c} or {c for k in contexts.values() for c in k}
    tests = [c.rpartition("|") for c in sorted(covering) if c]
    order, seen = {}, Counter()
    for name in {name.partition("[")[0]: None for name, _, _ in tests}:  # with all parameters
        file = name.partition("::")[0]
        order[name] = (path.stem.strip("_") not in file, seen[file])
        seen[file] += 1
    ids = sorted(order, key=order.get)[:MAX_TESTS]
    if ids and "run" not in {phase for _, _, phase in tests}:
        files = (ROOT / "tests").rglob("test_*.py")
        shared = [p for p in files if re.search(r"def .*[(, ]runs[,)]", p.read_text())]
        ids += [p.relative_to(ROOT).as_posix() for p in shared]
    return ids


def run_tests(tree, ids, log):
    """Run tests within a fork, which has the libraries loaded; return whether one failed."""
    process = os.fork()
    if process == 0:
        import pytest

        os.setsid()
        os.chdir(tree)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.path[0] = str(tree)
        flags = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", f"--timeout={TEST_SECONDS}"]
        os._exit(int(pytest.main([*flags, *ids])))
    end = time.monotonic() + ALL_SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) != 0  # 4 where a test's file cannot be read
        time.sleep(0.2)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return False


def run(file, coverage):
    """Try each mutant; print a JSON line for each and the counts at the end."""
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from coverage import CoverageData

    torch.set_num_threads(1)
    data, counts = CoverageData(basename=coverage), Counter()
    data.read()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        tree, log = Path(folder) / "tree", Path(folder) / "log"
        others = shutil.ignore_patterns(".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__")
        shutil.copytree(ROOT, tree, ignore=others)
        for mutant in map(json.loads, Path(file).read_text().splitlines()):
            path, began = tree / mutant["file"], time.monotonic()
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            lines, result = text.split("\n"), "gone"
            if (index := find_line(lines, mutant)) is not None:
                ids = tests_of(data, ROOT / mutant["file"], index + 1)
                lines[index] = mutant["new"]
                path.write_text("\n".join(lines), encoding="utf-8")
                killed = bool(ids) and run_tests(tree, ids, log)
                path.write_text(text, encoding="utf-8")
                result = "killed" if killed else "survived" if ids else "not covered"
            counts[result] += 1
            last = log.read_text().strip().splitlines()[-1:] if log.exists() else []
            seconds = round(time.monotonic() - began)
            write({"result": result, **mutant, "seconds": seconds, "by": last})
    write(counts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("draw")
    draw.add_argument("--number", type=int, default=100)
    draw.add_argument("--seed", type=int, default=0)
    tried = commands.add_parser("run")
    tried.add_argument("file")
    tried.add_argument("--coverage", required=True, help="pytest-cov's file of this version")
    args = parser.parse_args()
    if args.command == "run":
        run(args.file, args.coverage)
        return
    every = [mutant for path in sources(ROOT) for mutant in mutants(path)]
    for mutant in random.Random(args.seed).sample(every, args.number):
        write(mutant)


if __name__ == "__main__":
    main()

"""Code whose results are promised on every machine keeps to the rules of portable bits."""

from __future__ import annotations

from pathlib import Path

import pytest

import crdtmerge
from tests.numerics.lint import offences

PACKAGE = Path(crdtmerge.__file__).parent
SINGLE = ("resolve/blocks.py", "resolve/cutting.py", "resolve/engine.py", "resolve/view.py")
FILES = sorted(
    str(path.relative_to(PACKAGE)) for folder in ("numerics", "strategies") for path in (PACKAGE / folder).glob("*.py")
) + [name for name in SINGLE if (PACKAGE / name).exists()]

INTEGERS = "counts of elements: integer additions are exact in any order"
FRACTIONS = "exact fractions of the weights"
TOGETHER = "the names of objects of this process, never of what comes out"
MAGNITUDES = "of magnitudes, which have no signed zeros: the order of bit patterns"
DIFFERENCES = "signed zeros are one where only differences of it and sums of exponentials of these count"
FIRST = "the first of equal ones, as numpy promises; signed zeros are equal"
LIBRARY = "class P, asked for by dense=lapack"

ALLOWED = {
    ("numerics/decompositions.py", "_brought_near_one", "max"): MAGNITUDES,
    ("numerics/decompositions.py", "eigh", "max"): MAGNITUDES,
    ("numerics/decompositions.py", "_moderate", "max"): MAGNITUDES,
    ("numerics/decompositions.py", "signs_of", "argmax"): "of magnitudes: the first of equal ones, as numpy promises",
    ("numerics/elementary.py", "sqrt", "sqrt"): "numpy's is the processor's own: correctly rounded for float64",
    ("numerics/finite.py", "nonfinite", "max"): "the largest of integers",
    ("numerics/guard.py", "require_ieee", "**"): "powers of two in Python, to test the processor with",
    ("numerics/assignment.py", "best_assignment", "max"): "whole numbers of which differences are taken",
    ("numerics/assignment.py", "best_assignment", "sum"): "whole numbers below 2^52: exact in any order",
    ("numerics/assignment.py", "integers", "max"): MAGNITUDES,
    ("numerics/sinkhorn.py", "_Problem.__init__", "max"): DIFFERENCES,
    ("numerics/sinkhorn.py", "_Problem.__init__", "min"): DIFFERENCES,
    ("numerics/sinkhorn.py", "_Problem.stepped", "max"): MAGNITUDES,
    ("numerics/sinkhorn.py", "_rows_of", "max"): INTEGERS,
    ("numerics/sinkhorn.py", "_log_row_sums", "max"): DIFFERENCES,
    ("strategies/zipit.py", "_Greedy.__init__", "argmax"): FIRST,
    ("strategies/zipit.py", "_Greedy.merge", "argmax"): FIRST,
    ("strategies/zipit.py", "gathered", "max"): INTEGERS,
    **{
        ("numerics/scalars.py", name, name): "this is where they are defined"
        for name in ["acos", "sin", "cos", "exp", "log"]
    },
    ("numerics/products.py", "_exact", "matmul"): "integers below 2^53 at every step: exact in any order",
    ("numerics/products.py", "_slices", "max"): MAGNITUDES,
    ("numerics/selection.py", "Search.narrow", "sum"): INTEGERS,
    ("numerics/selection.py", "Search._step", "cumsum"): INTEGERS,
    ("numerics/selection.py", "Search.found", "sum"): INTEGERS,
    ("numerics/selection.py", "Search.found", "cumsum"): INTEGERS,
    ("numerics/selection.py", "guess", "partition"): "two order statistics of integers; only speed depends on them",
    ("resolve/cutting.py", "Group.sample", "cumsum"): INTEGERS,
    ("resolve/cutting.py", "Group.sample", "clip"): INTEGERS,
    ("resolve/cutting.py", "Cutter._conclude", "sum"): INTEGERS,
    ("strategies/consensus.py", "Ties.plan", "a set walked through"): "whether all are equal, and a set again",
    ("strategies/dense.py", "largest", "max"): MAGNITUDES,
    ("strategies/dense.py", "Lapack.product", "matmul"): LIBRARY,
    ("strategies/dense.py", "Lapack.triplets", "svd"): LIBRARY,
    ("strategies/linear.py", "divisor_of", "sum"): FRACTIONS,
    ("resolve/engine.py", "_entry", "id"): TOGETHER,
    ("resolve/engine.py", "_Engine.copy", "id"): TOGETHER,
    ("resolve/engine.py", "_hashed", "id"): TOGETHER,
    ("resolve/engine.py", "check_inputs", "id"): TOGETHER,
}
"""(file, function, what): why it cannot change a bit of any result."""


def found(name: str) -> set[tuple[str, str, str]]:
    return {(name, one.function, one.what) for one in offences((PACKAGE / name).read_text())}


def test_the_files_of_both_rooms_are_read() -> None:
    assert {"numerics/kernels.py", "strategies/stages.py", "resolve/engine.py", "resolve/view.py"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_keeps_the_rules(name: str) -> None:
    wrong = [
        f"{name}:{one.line}: rule {one.rule}: {one.what} in {one.function or 'the module'}"
        for one in offences((PACKAGE / name).read_text())
        if (name, one.function, one.what) not in ALLOWED
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_allowed_that_does_not_occur() -> None:
    assert set(ALLOWED) <= set().union(*map(found, FILES))


PLANTED = [
    (1, "y = torch.add(x, y, alpha=w)"),
    (1, "y.add_(x, alpha=2)"),
    (1, "y = torch.addcdiv(x, a, b, value=0.5)"),
    (1, "y = x.addcmul(a, b)"),
    (1, "y = torch.lerp(a, b, t)"),
    (1, "y = a.lerp_(b, t)"),
    (1, "y = torch.hypot(a, b)"),
    (1, "y = np.hypot(a, b)"),
    (1, "y = torch.baddbmm(a, b, c)"),
    (1, "y = x.pow(2)"),
    (1, "y = pow(x, 2)"),
    (1, "y = x**2"),
    (1, "x **= 2"),
    (1, "f = torch.compile(f)"),
    (1, "compiled = njit(nogil=True, fastmath=True)"),
    (2, "y = torch.sqrt(x)"),
    (2, "y = x.sqrt()"),
    (2, "y = np.sqrt(x)"),
    (2, "y = math.sin(x)"),
    (2, "y = math.acos(x)"),
    (2, "from math import exp"),
    (2, "y = torch.exp(x)"),
    (2, "y = np.log(x)"),
    (3, "y = x.sum()"),
    (3, "y = torch.mean(x, dim=0)"),
    (3, "y = x.norm()"),
    (3, "y = torch.linalg.vector_norm(x)"),
    (3, "y = x.dot(z)"),
    (3, "y = a @ b"),
    (3, "a @= b"),
    (3, "y = torch.einsum('ij,jk', a, b)"),
    (3, "y = torch.matmul(a, b)"),
    (3, "y = x.cumsum(0)"),
    (3, "y = sum(w * x for w, x in zip(ws, xs))"),
    (3, "y = math.fsum(xs)"),
    (3, "y = torch.bincount(i, weights=x)"),
    (3, "y.index_add_(0, i, x)"),
    (4, "y = torch.topk(x, 5)"),
    (4, "y = torch.argsort(x)"),
    (4, "y = x.sort(descending=True)"),
    (4, "y = np.argsort(x, kind='quicksort')"),
    (4, "y = torch.quantile(x, 0.5)"),
    (4, "y = torch.maximum(a, b)"),
    (4, "y = x.clamp(min=0)"),
    (5, "y = torch.rand(5)"),
    (5, "y = torch.randn_like(x)"),
    (5, "y = torch.bernoulli(p)"),
    (5, "y = p.multinomial(3)"),
    (5, "torch.manual_seed(0)"),
    (5, "y = np.random.standard_normal(5)"),
    (5, "import random"),
    (5, "from random import choice"),
    (6, "y = hash(name)"),
    (6, "import time"),
    (6, "from datetime import datetime"),
    (6, "for name in {'a', 'b'}:\n    work(name)"),
    (6, "for name in set(names):\n    work(name)"),
    (6, "y = [work(name) for name in set(a) | set(b)]"),
    (6, "y = list(set(names))"),
    (6, "def f(names):\n    found = {n.lower() for n in names}\n    return [work(n) for n in found]"),
    (7, "y = x.half() * 2"),
    (7, "torch.set_flush_denormal(True)"),
]

CLEAN = """
import math
import numpy as np
from math import sqrt
y = a * b + c
y = x / torch.full((1,), w)
y = math.sqrt(x)
y = torch.where(a > b, a, b)
y = torch.argsort(x, stable=True)
y = np.argsort(x, kind="stable")
y = torch.bincount(i, minlength=5)
y = 2.0**112
y = sorted(set(names))
y = len(set(names))
seen = name in {"a", "b"}
for name in names:
    work(name)
for name in sorted({"b", "a"}):
    work(name)
y = left_sum(xs)
y = max(1, n // 2)
"""


@pytest.mark.parametrize(("rule", "source"), PLANTED, ids=[source.partition("\n")[0] for _, source in PLANTED])
def test_the_lint_sees_what_is_planted(rule: int, source: str) -> None:
    assert rule in {one.rule for one in offences(source)}
    inside = "def f(x):\n" + "\n".join(f"    {line}" for line in source.splitlines())
    assert ("f", rule) in {(one.function.partition(".")[0], one.rule) for one in offences(inside)}


def test_the_lint_has_nothing_against_clean_code() -> None:
    assert offences(CLEAN) == []

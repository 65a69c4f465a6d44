"""A lint for arithmetic with portable bits: what must not stand in code whose results are promised on every machine.

It reads the syntax of a file and knows no types, so it forbids by name, everywhere, and lists what is allowed by file,
function and name, each with its reason.

RULES
 1. One IEEE operation a call: no alpha= or value=, no addcmul, addcdiv, lerp, hypot, baddbmm, pow, no compiler, no
    fast-math.
 2. Square roots are ``math.sqrt`` of scalars; other functions come from ``numerics.scalars``.
 3. No sums, means, norms or products of matrices by a library: their order of additions is not ours. No built-in
    ``sum``, which compensates since Python 3.12.
 4. No selection with unspecified ties (topk, sorting that is not stable, quantiles), no max and min of signed zeros.
 5. No random numbers but those of ``numerics.philox``.
 6. Nothing that depends on the process: hash(), sets walked through, clocks.
 7. No arithmetic in 16 bits, no setting of modes of the floating-point unit.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass


def _rule(number: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), number)


CALLED = {
    **_rule(1, "addcmul addcmul_ addcdiv addcdiv_ lerp lerp_ hypot baddbmm addmm addmv addr addbmm pow pow_ power fma"),
    **_rule(1, "float_power square compile _foreach_add _foreach_mul vectorize"),
    **_rule(2, "sqrt sqrt_ rsqrt exp expm1 exp2 log log1p log2 log10 sin cos tan acos asin atan atan2 arccos arcsin"),
    **_rule(2, "arctan2 sinh cosh tanh sigmoid softmax erf cbrt logaddexp"),
    **_rule(
        3, "sum nansum mean nanmean average norm vector_norm matrix_norm dot vdot inner outer einsum matmul mm bmm"
    ),
    **_rule(3, "mv tensordot cumsum cumprod prod var std median fsum sumprod trace logsumexp cdist cov corrcoef"),
    **_rule(3, "scatter_add scatter_add_ index_add index_add_ svd eigh qr inv solve cholesky cosine_similarity"),
    **_rule(4, "topk quantile nanquantile percentile argpartition partition kthvalue maximum minimum fmax fmin clamp"),
    **_rule(4, "clamp_ clip relu max min amax amin argmax argmin"),
    **_rule(5, "rand randn randint randperm rand_like randn_like randint_like bernoulli bernoulli_ multinomial normal"),
    **_rule(5, "normal_ uniform uniform_ dropout manual_seed Generator default_rng urandom token_bytes"),
    **_rule(6, "now time perf_counter monotonic time_ns"),
    **_rule(7, "half bfloat16 set_flush_denormal set_default_dtype use_deterministic_algorithms autocast"),
}
"""Names that must not be called as a method or as a function of a module, and the rule that they break."""

SORTED = {"sort", "argsort", "msort"}
IMPORTED = {"random": 5, "secrets": 5, "uuid": 5, "time": 6, "datetime": 6}
BARE = {"sum": 3, "hash": 6, "id": 6, "pow": 1}
KEYWORDS = {"alpha": 1, "value": 1, "fastmath": 1}
SCALARS_OF_MATH = {"sqrt"}


@dataclass(frozen=True)
class Offence:
    """What stands where, and the rule that it breaks."""

    rule: int
    line: int
    function: str
    what: str


def offences(source: str) -> list[Offence]:
    """All offences in the text of a module, in the order of its lines."""
    visitor = _Visitor()
    visitor.visit(ast.parse(source))
    return sorted(visitor.found, key=lambda one: (one.line, one.what))


class _Visitor(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[Offence] = []
        self._within: list[str] = []
        self._sets: list[set[str]] = [set()]

    def _report(self, rule: int, node: ast.expr | ast.stmt, what: str) -> None:
        self.found.append(Offence(rule, node.lineno, ".".join(self._within), what))

    # ---- where we are

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._enter(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._enter(node)

    def _enter(self, node: ast.ClassDef | ast.FunctionDef) -> None:
        for outside in node.decorator_list:
            self.visit(outside)
        self._within.append(node.name)
        self._sets.append(set(_names_of_sets(node)))
        for statement in node.body:
            self.visit(statement)
        self._sets.pop()
        self._within.pop()

    # ---- imports

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self._import(node, name.name.partition(".")[0])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self._import(node, (node.module or "").partition(".")[0])
        for name in node.names:
            if node.module == "math" and name.name not in SCALARS_OF_MATH and name.name in CALLED:
                self._report(CALLED[name.name], node, f"math.{name.name}")

    def _import(self, node: ast.stmt, module: str) -> None:
        if module in IMPORTED:
            self._report(IMPORTED[module], node, f"import {module}")

    # ---- calls

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute):
            self._method(node, node.func)
        elif isinstance(node.func, ast.Name) and node.func.id in BARE:
            self._report(BARE[node.func.id], node, node.func.id)
        for keyword in node.keywords:
            if keyword.arg in KEYWORDS:
                self._report(KEYWORDS[keyword.arg], node, f"{keyword.arg}=")
        if _order_matters(node) and node.args and self._is_set(node.args[0]):
            self._report(6, node, "a set walked through")
        self.generic_visit(node)

    def _method(self, node: ast.Call, function: ast.Attribute) -> None:
        name = function.attr
        owner = function.value.id if isinstance(function.value, ast.Name) else ""
        if name in SORTED and not _stable(node):
            self._report(4, node, name)
        elif name in CALLED and not (owner == "math" and name in SCALARS_OF_MATH):
            self._report(CALLED[name], node, name)
        elif name == "bincount" and any(keyword.arg == "weights" for keyword in node.keywords):
            self._report(3, node, "bincount(weights=)")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr == "random" and isinstance(node.value, ast.Name):
            self._report(5, node, f"{node.value.id}.random")
        self.generic_visit(node)

    # ---- operators and loops

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.MatMult):
            self._report(3, node, "@")
        if isinstance(node.op, ast.Pow) and not (
            isinstance(node.left, ast.Constant) and isinstance(node.right, ast.Constant)
        ):
            self._report(1, node, "**")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.op, ast.MatMult | ast.Pow):
            self._report(
                3 if isinstance(node.op, ast.MatMult) else 1, node, "@=" if isinstance(node.op, ast.MatMult) else "**="
            )
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._walk(node, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._walk(node.iter, node.iter)
        self.generic_visit(node)

    def _walk(self, node: ast.expr | ast.stmt, through: ast.expr) -> None:
        if self._is_set(through):
            self._report(6, node, "a set walked through")

    def _is_set(self, node: ast.expr) -> bool:
        return _makes_a_set(node) or (isinstance(node, ast.Name) and node.id in self._sets[-1])


def _order_matters(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id in {"list", "tuple", "enumerate", "iter", "zip", "map"}


def _stable(node: ast.Call) -> bool:
    said = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    return said.get("stable") is True or said.get("kind") == "stable"


def _makes_a_set(node: ast.expr) -> bool:
    if isinstance(node, ast.Set | ast.SetComp):
        return True
    if isinstance(node, ast.Call):
        called = node.func
        return (isinstance(called, ast.Name) and called.id in {"set", "frozenset"}) or (
            isinstance(called, ast.Attribute) and called.attr in {"union", "intersection", "difference"}
        )
    return isinstance(node, ast.BinOp) and (_makes_a_set(node.left) or _makes_a_set(node.right))


def _names_of_sets(node: ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    """Names to which a set is given anywhere in a function."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assign) and _makes_a_set(inner.value):
            yield from (target.id for target in inner.targets if isinstance(target, ast.Name))
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            yield from [inner.target.id] if inner.value and _makes_a_set(inner.value) else []

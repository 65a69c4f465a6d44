"""What is demanded of every strategy: one function a law, its docstring the law. ``DEMANDS`` has them in order.

Each takes a ``Case`` and raises AssertionError with a sentence where the law is broken. Arithmetic is compared by its
bytes, never within a tolerance.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from crdtmerge.errors import CrdtMergeError, MismatchError, NeedsError, NonFiniteError, ParameterError, UsageError
from crdtmerge.numerics.lazy import torch
from crdtmerge.replica.contribution import ROLES
from crdtmerge.resolve.plan_file import decode, encode
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled, Parameters
from crdtmerge.testing.case import Case, Material
from crdtmerge.testing.models import SHAPES, STORED, Model, Shapes, constant, family, raw

if TYPE_CHECKING:
    from torch import Tensor

Demand = Callable[[Case], None]

FEW: Shapes = {"scalar": (), "empty": (0, 3), "bias": (5,), "weight": (4, 7), "conv": (2, 3, 1, 2)}
ROWS: Shapes = {"a": (50, 100), "b": (3,)}
THREADED: Shapes = {"a": (40_001,), "b": (40, 30)}
"""Enough for torch to take a second thread."""

LARGE: Shapes = {"a": (131_101,), "b": (300, 7), "empty": (0, 2), "scalar": ()}
"""Over two stretches of 65,536 elements, and within one."""


# ---------------------------------------------------------------- what a law is put with


def require(holds: object, what: str) -> None:
    """Raise AssertionError with a sentence unless something holds; not an ``assert``, which -O leaves out."""
    if not holds:
        raise AssertionError(what)


def same(found: Mapping[str, Tensor], other: Mapping[str, Tensor], how: str, otherwise: str) -> None:
    """Two models have the same names, dtypes, shapes and bytes."""
    require(set(found) == set(other), f"tensors {sorted(found)} {how}; {sorted(other)} {otherwise}")
    for name in sorted(found):
        x, y = found[name], other[name]
        kinds = (x.dtype, tuple(x.shape)), (y.dtype, tuple(y.shape))
        require(kinds[0] == kinds[1], f"tensor {name!r}: {kinds[0]} {how}; {kinds[1]} {otherwise}")
        differ = np.flatnonzero(raw(x) != raw(y))
        if differ.size:
            at = int(differ[0])
            raise AssertionError(
                f"tensor {name!r}, element {at}: {_value(x, at)} {how}; {_value(y, at)} {otherwise} "
                f"({differ.size} of {x.numel()} elements differ)"
            )


def finite(found: Mapping[str, Tensor], how: str) -> None:
    """A model holds numbers only."""
    for name in sorted(found):
        wrong = np.flatnonzero(~torch.isfinite(found[name]).reshape(-1).numpy())
        if wrong.size:
            at = int(wrong[0])
            raise AssertionError(f"tensor {name!r}, element {at}: {_value(found[name], at)} {how}; a number is needed")


def _value(x: Tensor, at: int) -> str:
    return repr(float(x.reshape(-1)[at]))


def refused(call: Callable[[], object], wanted: type[Exception], what: str) -> None:
    """A call raises an error of a kind, with a message."""
    try:
        call()
    except wanted as error:
        require(str(error).strip(), f"{what} is refused without a word")
    else:
        raise AssertionError(f"{what} is taken; it must raise {wanted.__name__}")


def _cloned(one: Model) -> Model:
    return {name: x.clone() for name, x in one.items()}


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _two(case: Case) -> int:
    """Two models, or the nearest number that the strategy takes."""
    return min(max(2, case.needs.min_k), case.needs.max_k or 2)


# ---------------------------------------------------------------- what it says of itself


def it_says_what_it_is(case: Case) -> None:
    """It has a name of its own, a version, a family, a reference, a docstring and described parameters."""
    one = case.strategy
    require(re.fullmatch(r"[a-z][a-z0-9_+]*", one.name), f"its name is {one.name!r}: small letters, digits and _")
    home = f"crdtmerge.strategies.{registry.BUILT_IN.get(one.name)}"
    own = one.name not in registry.BUILT_IN or type(one).__module__ == home
    require(own, f"the name {one.name} is taken by a built-in strategy")
    require(type(one.version) is int and one.version >= 1, f"its version is {one.version!r}: a number from 1 on")
    require(one.family.strip(), "its family is empty")
    require(one.reference.strip(), "its reference is empty: where the method was published, or that it was not")
    require((inspect.getdoc(type(one)) or "").strip(), "it has no docstring; `crdtmerge strategies` prints it")
    require(issubclass(one.Params, Parameters), "its Params are no Parameters")
    bare = [name for name, field in one.Params.model_fields.items() if not field.description]
    require(not bare, f"parameters without a description: {', '.join(bare)}")


def its_parameters_are_canonical(case: Case) -> None:
    """Its parameters have defaults, and are the same again when read from their canonical form."""
    name, kind = case.strategy.name, case.strategy.Params
    for asked in ({}, case.params):
        filled: Filled[Any] = Filled(name, kind, asked)
        again: Filled[Any] = Filled(name, kind, filled.canonical)
        require(filled.canonical == again.canonical, f"{filled.canonical} becomes {again.canonical} when read again")
        require(
            case.strategy.needs(filled.general) == case.strategy.needs(again.general),
            "it needs other things when its parameters are read again from their canonical form",
        )


def its_needs_make_sense(case: Case) -> None:
    """Its needs name known roles and a number of models from 1 on, and the given weights and roles are taken."""
    needs = case.needs
    require(needs.roles, "it takes models of no role")
    require(set(needs.roles) <= set(ROLES), f"its roles are {needs.roles}; there are {', '.join(ROLES)}")
    require(needs.min_k >= 1, f"min_k is {needs.min_k}: a number from 1 on")
    require(needs.max_k is None or needs.max_k >= needs.min_k, f"it takes {needs.min_k} to {needs.max_k} models")
    require(
        len({*needs.stats, *needs.models, *needs.inputs}) == len([*needs.stats, *needs.models, *needs.inputs]),
        "two things that it needs have one name",
    )


# ---------------------------------------------------------------- purity


def apply_is_pure(case: Case) -> None:
    """Apply twice gives the same bytes, and plan and apply write to nothing that they are given."""
    given = case.material()
    before = [_cloned(one) for one in given.models]
    ready = case.prepared(given)
    for tensor in ready.tensors:
        unit = ready.unit(tensor, 0, tensor.elements)
        first = ready.apply(tensor, unit).clone()
        untouched = ready.unit(tensor, 0, tensor.elements)
        pairs = [*zip(unit.xs, untouched.xs, strict=True)]
        pairs += [(unit.base, untouched.base)] if unit.base is not None and untouched.base is not None else []
        pairs += [pair for name in unit.stats for pair in zip(unit.stats[name], untouched.stats[name], strict=True)]
        pairs += [(unit.models[name], untouched.models[name]) for name in unit.models]
        for x, y in pairs:
            same({tensor.name: x}, {tensor.name: y}, "in an input after apply", "before")
        second = ready.apply(tensor, unit)
        same({tensor.name: second}, {tensor.name: first}, "when applied again", "the first time")
    digest = ready.plan.digest
    require(ready.planned().digest == digest, "the plan made again has another digest")
    for i, (one, copy) in enumerate(zip(given.models, before, strict=True)):
        same(one, copy, f"in model {i} afterwards", "before")


def a_plan_may_be_kept_in_a_file(case: Case) -> None:
    """A plan that was written and read again has the same digest and gives the same bytes."""
    ready = case.prepared(case.material("F32"))
    found = ready.applied()
    again, _, _ = decode(encode(ready.plan, bytes(32)), "the plan")
    require(again.digest == ready.plan.digest, "the plan read again has another digest")
    ready.plan = again
    same(ready.applied(), found, "by the plan read again", "by the plan as it was made")


def units_may_end_anywhere(case: Case) -> None:
    """Any partition of a tensor into units gives the same bytes."""
    if case.needs.unit != "element":
        return
    rng = np.random.default_rng(case.number)
    ready = case.prepared(case.material("BF16", shapes=FEW))
    same(ready.applied(range(1, 28)), ready.applied(), "in units of one element (BF16)", "as a whole")
    ready = case.prepared(case.material("F32", shapes=ROWS))
    same(ready.applied(range(777, 5000, 777)), ready.applied(), "in units of 777 elements (F32)", "as a whole")
    for dtype in ("F64", "F16"):
        ready = case.prepared(case.material(dtype))
        ends = [int(end) for end in rng.integers(0, 150, 8)]
        same(ready.applied(ends), ready.applied(), f"in units that end at {sorted(set(ends))} ({dtype})", "as a whole")


def stretches_and_threads_change_nothing(case: Case) -> None:
    """Whatever stretches and threads the engine has, and by a kernel where it has one, plan and bytes are the same."""
    given = case.material("F32", k=_two(case), shapes=LARGE)
    whole = case.prepared(given)
    applied = whole.applied()
    for stretch, threads, kernels in ((65_536, 2, False), (131_072, 1, True)):
        ready = case.prepared(given, stretch=stretch, threads=threads, use_kernels=kernels)
        how = f"in stretches of {stretch} elements by {threads} threads{' and a kernel' if kernels else ''}"
        require(ready.plan.digest == whole.plan.digest, f"another plan {how}")
        same(ready.run(), applied, how, "as a whole")


def threads_of_torch_change_nothing(case: Case) -> None:
    """With one thread inside torch or two, a strategy of class E gives the same bytes."""
    if not case.needs.exact:
        return
    ready = case.prepared(case.material("F64", k=_two(case), shapes=THREADED))
    with _torch_threads(1):
        one = ready.applied()
    with _torch_threads(2):
        same(ready.applied(), one, "with two threads of torch", "with one")


# ---------------------------------------------------------------- the set


def the_order_of_arrival_changes_nothing(case: Case) -> None:
    """Models that arrive in another order give the same bytes and the same receipt."""
    given = case.material("BF16")
    k = len(given.models)
    one = case.merge(given)
    for order in {tuple(reversed(range(k))), (*range(1, k), 0)} - {tuple(range(k))}:
        other = case.merge(given, order)
        same(other, one, f"when they arrive as {list(order)}", "in order")
        require(
            one.receipt.to_bytes() == other.receipt.to_bytes(), f"another receipt when they arrive as {list(order)}"
        )


def the_seed_matters_where_it_draws(case: Case) -> None:
    """The same seed gives the same bytes; another seed other bytes if it is said to draw, and else the same."""
    given = case.material("F32")
    one, again, other = (case.prepared(given, seed=bytes([seed]) * 32).applied() for seed in (1, 1, 2))
    same(again, one, "with the same seed again", "the first time")
    if not case.random:
        same(other, one, "with another seed (it is not said to be random)", "with the first")
        return
    differ = any((raw(one[name]) != raw(other[name])).any() for name in one)
    require(differ, "it is said to be random, and another seed gives the same bytes")


# ---------------------------------------------------------------- storage


def every_dtype_comes_back(case: Case) -> None:
    """Models of every storage dtype give finite numbers of that dtype, or of the one that is asked for."""
    for dtype, out in (*zip(STORED, STORED, strict=True), ("BF16", "F32"), ("F32", "BF16"), ("F64", "F16")):
        found = case.prepared(case.material(dtype), out=out).run()
        wanted = case.material(out).models[0]
        for name, x in found.items():
            require(
                x.dtype == wanted[name].dtype and x.shape == wanted[name].shape,
                f"tensor {name!r}: {x.dtype} {list(x.shape)} comes out; {wanted[name].dtype} "
                f"{list(wanted[name].shape)} is asked for",
            )
        finite(found, f"from {dtype} to {out}")


def dtypes_may_differ(case: Case) -> None:
    """Models of different dtypes merge into one that is asked for."""
    given = case.material("F32")
    mixed = [case.material(STORED[i % len(STORED)]).models[i] for i in range(len(given.models))]
    ready = case.prepared(given.of(mixed), out="F32")
    same(ready.run(), ready.applied(), "by the engine, of different dtypes", "by apply")


# ---------------------------------------------------------------- small and degenerate inputs


def any_number_of_models_will_do(case: Case) -> None:
    """The fewest models that it takes, one more, and the most give finite numbers."""
    needs = case.needs
    counts = {needs.min_k, needs.min_k + 1, case.some, needs.max_k or 5}
    for k in sorted(k for k in counts if needs.min_k <= k <= (needs.max_k or k)):
        finite(case.prepared(case.material("BF16", k)).run(), f"with {k} models")


def tensors_of_any_shape_will_do(case: Case) -> None:
    """A model of one tensor only gives finite numbers: of no dimension, no element, one element, each kind alone."""
    for name, shape in [*SHAPES.items(), ("row", (1, 7)), ("column", (7, 1))]:
        given = case.material("F32", shapes={name: shape})
        found = case.prepared(given).applied()
        require(found[name].shape == torch.Size(shape), f"tensor {name!r}: shape {list(found[name].shape)} comes out")
        finite(found, f"where it is the whole model, of shape {list(shape)}")


def degenerate_models_will_do(case: Case) -> None:
    """Zero task vectors, frozen tensors, constant models and equal ones give finite numbers; so do opposite ones.

    Where a method is not defined for opposite task vectors, it may refuse them with one of our errors.
    """
    given = case.material("F32")
    like = given.models[0]
    base = given.base or family(1, number=1000 * (case.number + 1))[1]
    zeros = constant(like)
    k = len(given.models)
    frozen = [{name: base[name] if name == "weight" else x for name, x in one.items()} for one in given.models]
    opposite = [{name: base[name] + (-1) ** i * (x - base[name]) for name, x in like.items()} for i in range(k)]
    kinds: dict[str, tuple[Sequence[Model], Model | None]] = {
        "where all models equal the base": ([base] * k, base),
        "where all models are equal": ([like] * k, base),
        "where one model equals the base": ([base, *given.models[1:]], base),
        "where a tensor is frozen": (frozen, base),
        "where everything is zero": ([zeros] * k, zeros),
        "where the base is zero": (given.models, zeros),
        "where the models are zero": ([zeros] * k, base),
        "where each model is one number": ([constant(like, i + 1.0) for i in range(k)], zeros),
        "where task vectors are opposite": (opposite, base),
    }
    for how, (models, origin) in kinds.items():
        try:
            found = case.prepared(given.of(models, origin if given.base else None)).applied()
        except (MismatchError, UsageError):
            if models is not opposite:
                raise
        else:
            finite(found, how)


def a_tensor_may_be_missing(case: Case) -> None:
    """A tensor that one model lacks is merged from the others, or refused with one of our errors."""
    given = case.material("F32")
    if len(given.models) <= max(1, case.needs.min_k):
        return
    *rest, last = given.models
    models = [*rest, {name: x for name, x in last.items() if name not in ("bias", "weight")}]
    for missing in ("skip", "base") if given.base is not None else ("skip",):
        try:
            found = case.merge(given.of(models), missing=missing)
        except CrdtMergeError as error:
            require(not isinstance(error, NonFiniteError), f"missing={missing}: {error}")
        else:
            finite(found, f"where a model lacks it, missing={missing}")


def an_optional_base_may_be_left_out(case: Case) -> None:
    """Where a base is optional, models without one give finite numbers."""
    if case.needs.base == "optional":
        given = replace(case.material("F32"), base=None)
        finite(case.prepared(given).applied(), "without a base")


# ---------------------------------------------------------------- what it refuses


def what_is_no_number_is_refused(case: Case) -> None:
    """NaN in a model or a statistic and infinity in the base are refused."""
    given = case.material("F32")
    spoilt = {**given.models[0], "bias": torch.full_like(given.models[0]["bias"], float("nan"))}
    refused(lambda: case.merge(given.of([spoilt, *given.models[1:]])), NonFiniteError, "NaN in a model")
    if given.base is not None:
        base = {**given.base, "bias": torch.full_like(given.base["bias"], float("inf"))}
        refused(lambda: case.merge(given.of(given.models, base)), NonFiniteError, "infinity in the base")
    for name in case.needs.stats:
        one = given.stats[0][name]
        wrong = {tensor: torch.full_like(x, float("nan")) for tensor, x in one.items()}
        stats = ({**given.stats[0], name: wrong}, *given.stats[1:])
        spoilt_stats = replace(given, stats=stats)
        refused(lambda spoilt=spoilt_stats: case.merge(spoilt), CrdtMergeError, f"NaN in '{name}'")  # type: ignore[misc]


def wrong_weights_are_refused(case: Case) -> None:
    """Weights below zero are refused where it takes none, and weights of zero give numbers or one of our errors."""
    given = case.material("F32")
    k = len(given.models)

    def weighted(*weights: str) -> Material:
        return replace(given, weights=weights)

    if case.needs.weights == "nonnegative":
        refused(lambda: case.merge(weighted(*["1"] * (k - 1), "-1")), ParameterError, "a weight below zero")
    try:
        found = case.prepared(weighted(*["0"] * k)).applied()
    except UsageError as error:
        require(str(error).strip(), "weights of zero are refused without a word")
    else:
        finite(found, "where all weights are zero")


def what_it_lacks_is_said(case: Case) -> None:
    """A missing base, statistic or further model, an unknown parameter, role or number of models is refused."""
    given, needs = case.material("F32"), case.needs
    name, kind = case.strategy.name, case.strategy.Params
    refused(lambda: Filled(name, kind, {**case.params, "no_such_parameter": 1}), ParameterError, "an unknown parameter")
    if needs.base == "required":
        refused(lambda: case.merge(replace(given, base=None)), NeedsError, "a merge without a base")
    if needs.stats:
        refused(lambda: case.merge(replace(given, stats=())), NeedsError, "a merge without statistics")
    if needs.models:
        refused(lambda: case.merge(replace(given, beside={})), NeedsError, "a merge without its further models")
    other = [role for role in ROLES if role not in needs.roles]
    if other:
        roles = (*given.roles[:-1], other[0])
        refused(lambda: case.merge(replace(given, roles=roles)), UsageError, f"a model of role {other[0]}")
    for k in {needs.min_k - 1, (needs.max_k or 0) + 1} - {0, 1 if needs.max_k is None else 0}:
        refused(lambda k=k: case.merge(case.material("F32", k)), UsageError, f"a merge of {k} models")  # type: ignore[misc]


DEMANDS: tuple[Demand, ...] = (
    it_says_what_it_is,
    its_parameters_are_canonical,
    its_needs_make_sense,
    apply_is_pure,
    a_plan_may_be_kept_in_a_file,
    units_may_end_anywhere,
    stretches_and_threads_change_nothing,
    threads_of_torch_change_nothing,
    the_order_of_arrival_changes_nothing,
    the_seed_matters_where_it_draws,
    every_dtype_comes_back,
    dtypes_may_differ,
    any_number_of_models_will_do,
    tensors_of_any_shape_will_do,
    degenerate_models_will_do,
    a_tensor_may_be_missing,
    an_optional_base_may_be_left_out,
    what_is_no_number_is_refused,
    wrong_weights_are_refused,
    what_it_lacks_is_said,
)

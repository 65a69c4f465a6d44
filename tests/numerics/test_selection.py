"""The k largest magnitudes are those of a stable sort, ties by lowest position, whatever the search goes through."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from crdtmerge.numerics import selection
from crdtmerge.numerics.dtypes import DTYPES
from crdtmerge.numerics.fused import Kernels
from crdtmerge.numerics.selection import TOP, Search
from crdtmerge.strategies import stages
from tests.numerics.examples import STORED, examples, raw, stored
from tests.strategies.models import Model, metas, tensors, viewed

BLOCK = 65_536
LARGE = 20 * BLOCK + 77
Kind = Callable[[np.random.Generator, int], NDArray[np.float64]]
Cuts = dict[str, list[tuple[int, int]]]
Masks = dict[str, list[NDArray[np.bool_]]]


# ---------------------------------------------------------------- the oracle: a stable sort


def computed(x: torch.Tensor) -> NDArray[Any]:
    """Values in the compute dtype: float32 for 16-bit numbers, else float64."""
    flat = x.reshape(-1)
    return flat.float().numpy() if x.element_size() == 2 else flat.double().numpy()


def sorted_masks(models: Sequence[Model], base: Model, density: Callable[[str], Decimal], whole_model: bool) -> Masks:
    """Which elements of each task vector are kept, by sorting all of them."""
    masks: Masks = {name: [] for name in sorted(base)}
    groups = [sorted(base)] if whole_model else [[name] for name in sorted(base)]
    for names in groups:
        for model in models:
            own = [name for name in names if name in model]
            sizes = [abs(computed(model[name]) - computed(base[name])).astype(np.float64) for name in own]
            magnitudes = np.concatenate(sizes) if sizes else np.empty(0)
            count = max(1, math.floor(Fraction(density(names[0])) * len(magnitudes))) if len(magnitudes) else 0
            kept = np.zeros(len(magnitudes), bool)
            kept[np.argsort(-magnitudes, kind="stable")[:count]] = True
            ends = np.cumsum([len(s) for s in sizes])
            for name, mask in zip(own, np.split(kept, ends)[: len(own)], strict=True):
                masks[name].append(mask)
    return masks


def kept_by(cut: tuple[int, int], x: torch.Tensor, base: torch.Tensor) -> NDArray[np.bool_]:
    """What a cut means, in numpy."""
    tau = abs(computed(x) - computed(base))
    own = tau.view({4: np.int32, 8: np.int64}[tau.itemsize]).astype(np.int64)
    kept: NDArray[np.bool_] = (own > cut[0]) | ((own == cut[0]) & (np.arange(len(own)) <= cut[1]))
    return kept


def require_sorted(
    models: Sequence[Model],
    base: Model,
    density: str | Callable[[str], Decimal],
    *,
    whole_model: bool,
    stretch: int = BLOCK,
    use_kernels: bool = False,
    threads: int = 1,
) -> Cuts:
    wanted_of = density if callable(density) else (lambda name: Decimal(density))
    merging = tensors(models, base, metas([1] * len(models)))
    with viewed(merging, stretch=stretch, use_kernels=use_kernels, threads=threads) as seen:
        cuts = dict(seen.cuts(wanted_of, whole_model=whole_model))
    wanted = sorted_masks(models, base, wanted_of, whole_model)
    for name in base:
        holders = [model for model in models if name in model]
        assert len(cuts[name]) == len(holders)
        for cut, model, mask in zip(cuts[name], holders, wanted[name], strict=True):
            assert (kept_by(cut, model[name], base[name]) == mask).all()
            tau = torch.from_numpy(computed(model[name]) - computed(base[name]))
            assert (selection.largest(tau, *cut, 0).numpy() == mask).all()
    return cuts


# ---------------------------------------------------------------- small tensors, any values

numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 3.0, 1e-40, -1e-40]),
    st.floats(width=16, allow_nan=False, allow_infinity=False),
)
densities = st.one_of(
    st.sampled_from(["0.2", "1", "0.5", "0.0001", "0.9999", "0.3333333333333333333333333333333333333333"]),
    st.decimals(min_value="0.01", max_value=1, places=2).map(str),
)


@st.composite
def small_models(draw: st.DrawFn) -> tuple[list[Model], Model]:
    """Models of three tensors, whose elements are drawn from a few numbers."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    few = np.array(draw(st.lists(numbers, min_size=1, max_size=8)), np.float64)
    dtypes = {name: draw(st.sampled_from(list(STORED))) for name in "abc"}
    sizes = {name: draw(st.integers(0, 12)) for name in "abc"}

    def one() -> Model:
        return {name: stored(rng.choice(few, n), dtypes[name]) for name, n in sizes.items()}

    return [one() for _ in range(draw(st.integers(1, 3)))], one()


@pytest.mark.parametrize("whole_model", [False, True])
@examples(150)
@given(given_models=small_models(), density=densities)
def test_small_tensors_of_any_dtypes_are_cut_like_a_stable_sort(
    whole_model: bool, given_models: tuple[list[Model], Model], density: str
) -> None:
    require_sorted(*given_models, density, whole_model=whole_model)


def test_at_least_one_element_is_kept_of_what_is_not_empty() -> None:
    base = {"a": torch.zeros(3), "e": torch.zeros(0)}
    models: list[Model] = [{"a": torch.tensor([1.0, -1.0, 1.0]), "e": torch.zeros(0)}]
    for whole_model in (False, True):
        cuts = require_sorted(models, base, "0.0000001", whole_model=whole_model)
        assert kept_by(cuts["a"][0], models[0]["a"], base["a"]).tolist() == [True, False, False]


def test_each_tensor_may_have_a_density_of_its_own() -> None:
    base = {"a": torch.zeros(10), "b": torch.zeros(10)}
    models: list[Model] = [{"a": torch.arange(10.0), "b": torch.arange(10.0)}]
    cuts = require_sorted(models, base, lambda name: Decimal("0.1" if name == "a" else "0.7"), whole_model=False)
    assert [int(kept_by(cuts[n][0], models[0][n], base[n]).sum()) for n in "ab"] == [1, 7]


def test_a_model_that_lacks_a_tensor_has_its_share_of_what_it_holds() -> None:
    rng = np.random.default_rng(8)
    shapes = {"a": 40, "b": 50, "c": 7}
    base = {name: stored(rng.standard_normal(n), "F32") for name, n in shapes.items()}
    full = [{name: stored(rng.standard_normal(n), "F32") for name, n in shapes.items()} for _ in range(3)]
    models: list[Model] = [full[0], {"c": full[1]["c"]}, {"a": full[2]["a"], "b": full[2]["b"]}]
    for whole_model in (False, True):
        require_sorted(models, base, "0.3", whole_model=whole_model)


# ---------------------------------------------------------------- large ones: samples, counts, last passes


def random(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return rng.standard_normal(n)


def heavy_ties(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return rng.choice([0.0, 1.0, -1.0, 2.0, -0.5], n)


def all_equal(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return np.where(rng.random(n) < 0.5, 0.25, -0.25)


def all_zero(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return np.zeros(n)


def sorted_up(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return np.linspace(0, 1, n)


def many_binades(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return np.exp2(rng.uniform(-120, 120, n))


def sparse(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return np.where(rng.random(n) < 0.001, rng.standard_normal(n), 0.0)


KINDS: tuple[Kind, ...] = (random, heavy_ties, all_equal, all_zero, sorted_up, many_binades, sparse)


LARGE_CASES = [
    (kind, dtypes)
    for dtypes in ("BF16 BF16", "F32 F32", "F64 F16", "BF16 F32")
    for kind in KINDS
    if not (kind is many_binades and "F64 F16" in dtypes)  # float16 has no such binades
]


def large(kind: Kind, dtypes: dict[str, str], k: int = 1) -> tuple[list[Model], Model]:
    """Task vectors of a kind over a base of zeros, in two tensors and an empty one."""
    rng = np.random.default_rng(5)
    split = {"a": 7 * BLOCK + 5, "b": LARGE - (7 * BLOCK + 5), "empty": 0}
    dtypes = {"a": dtypes["a"], "b": dtypes["b"], "empty": dtypes["a"]}
    models: list[Model] = [{n: stored(kind(rng, size), dtypes[n]) for n, size in split.items()} for _ in range(k)]
    return models, {n: stored(np.zeros(size), dtypes[n]) for n, size in split.items()}


@pytest.mark.parametrize(("kind", "dtypes"), LARGE_CASES)
@pytest.mark.parametrize("use_kernels", [False, True])
def test_large_models_are_cut_like_a_stable_sort(kind: Kind, dtypes: str, use_kernels: bool) -> None:
    a, b = dtypes.split()
    models, base = large(kind, {"a": a, "b": b})
    require_sorted(models, base, "0.2", whole_model=True, stretch=4 * BLOCK, use_kernels=use_kernels)


@pytest.mark.parametrize("stretch", [BLOCK, 3 * BLOCK, 64 * BLOCK])
@pytest.mark.parametrize("use_kernels", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_cut_does_not_depend_on_blocks_kernels_or_threads(stretch: int, use_kernels: bool, threads: int) -> None:
    models, base = large(heavy_ties, {"a": "BF16", "b": "BF16"}, k=2)
    for whole_model in (False, True):
        require_sorted(
            models,
            base,
            "0.55",
            whole_model=whole_model,
            stretch=stretch,
            use_kernels=use_kernels,
            threads=threads,
        )


@pytest.mark.parametrize("density", ["0.0000001", "0.001", "0.5", "0.999999", "1"])
def test_small_and_large_shares_are_exact(density: str) -> None:
    models, base = large(random, {"a": "F32", "b": "BF16"})
    require_sorted(models, base, density, whole_model=True, stretch=4 * BLOCK, use_kernels=True)


def spied(patch: pytest.MonkeyPatch) -> list[str]:
    """The steps that a search goes through, by name; counting and collecting as torch does them."""
    seen: list[str] = []

    def spy(owner: Any, name: str, counts: Callable[..., bool] = lambda *arguments: True) -> None:
        real = getattr(owner, name)

        def called(*arguments: Any, **named: Any) -> Any:
            if counts(*arguments) and seen[-1:] != [name]:
                seen.append(name)
            return real(*arguments, **named)

        patch.setattr(owner, name, called)

    spy(selection, "guess")
    spy(selection, "count")
    spy(selection, "collect", lambda x, search: search.collects)
    spy(Search, "found")
    return seen


def test_samples_counts_collections_and_last_passes_are_all_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {}
    for kind in (random, all_equal, heavy_ties):
        with monkeypatch.context() as patch:
            seen = spied(patch)
            models, base = large(kind, {"a": "F32", "b": "F32"})
            require_sorted(models, base, "0.2", whole_model=True, stretch=4 * BLOCK)
        steps[kind.__name__] = seen
    assert steps["random"] == ["guess", "count", "collect"]
    assert steps["all_equal"][:2] == steps["heavy_ties"][:2] == ["guess", "count"]
    assert steps["all_equal"][-1] == steps["heavy_ties"][-1] == "found"


def test_a_tensor_small_enough_is_collected_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spied(monkeypatch)
    base = {"a": torch.zeros(selection.COLLECT_MAX)}
    models: list[Model] = [{"a": stored(np.random.default_rng(1).standard_normal(selection.COLLECT_MAX), "F32")}]
    require_sorted(models, base, "0.2", whole_model=True)
    assert seen == ["collect"]


def pattern(x: float, dtype: str) -> int:
    return int(np.array([x], {"F32": np.float32, "F64": np.float64}[dtype]).view({"F32": "i4", "F64": "i8"}[dtype])[0])


WRONG: dict[str, Callable[[str], tuple[int, int]]] = {
    "nothing below it": lambda dtype: (0, 1),
    "too low": lambda dtype: (pattern(1e-30, dtype), pattern(1e-20, dtype)),
    "just too low": lambda dtype: (0, pattern(0.5, dtype)),
    "too high": lambda dtype: (pattern(3e30, dtype), pattern(1e31, dtype)),
    "above everything": lambda dtype: (TOP[dtype] - 1, 1 << 63),
    "everything": lambda dtype: (0, 1 << 63),
    "few patterns": lambda dtype: (pattern(1.0, dtype), pattern(1.0, dtype) + 3),
    "a last pass elsewhere": lambda dtype: (pattern(2.0, dtype) - 100, pattern(2.0, dtype) + 100),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    ("kind", "dtype", "compute", "use_kernels"),
    [
        (random, "BF16", "F32", False),
        (heavy_ties, "BF16", "F32", True),
        (random, "F32", "F64", True),
    ],
)
def test_a_wrong_guess_costs_passes_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, wrong: str, kind: Any, dtype: str, compute: str, use_kernels: bool
) -> None:
    asked: list[float] = []

    def guess(sample: NDArray[np.int64], fraction: float) -> tuple[int, int]:
        asked.append(fraction)
        return WRONG[wrong](compute)

    monkeypatch.setattr(selection, "guess", guess)
    models, base = large(kind, {"a": dtype, "b": dtype})
    require_sorted(models, base, "0.2", whole_model=True, stretch=4 * BLOCK, use_kernels=use_kernels)
    assert asked == [pytest.approx(0.2, abs=1e-6)]


@examples(200)
@given(st.lists(st.integers(0, TOP["F32"] - 1), min_size=1, max_size=400), st.floats(0, 1, exclude_min=True))
def test_a_guess_is_a_range_that_is_not_empty(sample: list[int], fraction: float) -> None:
    low, high = selection.guess(np.array(sample, np.int64), fraction)
    assert 0 <= low < high


# ---------------------------------------------------------------- cuts between types, counts


positive = st.floats(0, allow_nan=False, allow_infinity=False)


@examples(400)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@given(st.one_of(positive, st.floats(0, 4, width=32)), st.integers(-1, 3), st.lists(st.floats(0, width=32), max_size=4))
def test_a_cut_among_float64_keeps_the_same_float32_values(value: float, last: int, others: list[float]) -> None:
    bits = pattern(value, "F64")
    with np.errstate(over="ignore"):
        near = np.float32(value)
        neighbours = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(0))]
    own, own_last = selection.in_float32(bits, last)
    for x in [*neighbours, *map(np.float32, others)]:
        for index in range(4):
            wide = pattern(float(x), "F64")
            wanted = wide > bits or (wide == bits and index <= last)
            single = pattern(float(x), "F32")
            assert (single > own or (single == own and index <= own_last)) == wanted


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("wide", [False, True])
@examples(60)
@given(data=st.data())
def test_counts_and_collections_of_torch_numba_and_numpy_are_equal(dtype: str, wide: bool, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    n = data.draw(st.sampled_from([1, 5, 1023, 1024, 1025, 3000]))
    x, base = stored(rng.standard_normal(n), dtype), stored(rng.choice([0.0, 0.5], n), dtype)
    compute = "F32" if dtype in ("BF16", "F16") and not wide else "F64"
    if wide is False and compute == "F64":
        wide = data.draw(st.booleans())  # float64 patterns are those of the compute dtype itself
    kind = data.draw(st.sampled_from(["all", "some", "narrow"]))
    centre = pattern(data.draw(st.sampled_from([1e-3, 0.5, 1.0, 1.5])), compute)
    half = {"all": 1 << 62, "some": 1 << (20 if compute == "F32" else 50), "narrow": 100}[kind]
    search = Search(1, TOP[compute], max(0, centre - half), min(TOP[compute], centre + half), 0)

    tau = torch.from_numpy(computed(x) - computed(base))
    tau = tau.double() if wide else tau
    patterns = abs(tau.numpy()).view({4: np.int32, 8: np.int64}[tau.element_size()]).astype(np.int64)
    inside = (patterns >= search.lo) & (patterns < search.hi)
    assert search.steps <= selection.STEPS
    wanted = np.bincount((patterns[inside] - search.lo) // 2**search.shift, minlength=search.steps).tolist()
    wanted += [int((patterns >= search.hi).sum())]

    assert selection.count(tau, search).tolist() == wanted
    counts = np.arange(search.steps + 1)
    assert Kernels().count(raw(x), raw(base), search, DTYPES[dtype], wide, counts), (
        "the kernel is proven on this machine"
    )
    assert (counts - np.arange(search.steps + 1)).tolist() == wanted
    kernel = Kernels().collect(raw(x), raw(base), search, DTYPES[dtype], wide)
    assert kernel is not None
    for bits, at in (selection.collect(tau, search), kernel):
        assert bits.tolist() == patterns[inside].tolist()
        assert at.tolist() == np.flatnonzero(inside).tolist()


@examples(200)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.lists(st.integers(0, 30), max_size=3),
    st.integers(1, 30),
)
def test_the_counts_of_a_last_pass_name_the_stretch_and_the_tie(values: list[int], cuts: list[int], k: int) -> None:
    """Of the patterns of several stretches: which one the k-th largest is, in which stretch, and which of its ties."""
    k = min(k, len(values))
    lo, hi = 1, 3
    search = Search(k, TOP["F32"], lo, hi, 0)
    edges = [0, *sorted(min(c, len(values)) for c in cuts), len(values)]
    stretches = [values[start:stop] for start, stop in itertools.pairwise(edges)]
    rows = [np.array([s.count(1), s.count(2), s.count(3)], np.int64) for s in stretches]
    order = sorted(range(len(values)), key=lambda i: -values[i])
    at = order[k - 1]
    found = search.found(rows)
    if not lo <= values[at] < hi:
        assert found is None
        return
    assert found is not None
    bits, stretch, rank = found
    ties = [i for i in range(edges[stretch], edges[stretch + 1]) if values[i] == bits]
    assert (bits, ties[rank - 1]) == (values[at], at)


def counted(patterns: list[int], search: Search) -> NDArray[np.int64]:
    """A pass over patterns, in Python."""
    counts = np.zeros(search.steps + 1, np.int64)
    for one in patterns:
        if one >= search.hi:
            counts[-1] += 1
        elif one >= search.lo:
            counts[(one - search.lo) >> search.shift] += 1
    return counts


close_by = st.integers(0, 5).map(lambda step: 0x3F800000 + step)


@examples(400)
@given(
    patterns=st.lists(st.one_of(close_by, st.integers(0, TOP["F32"] - 1)), min_size=1, max_size=12),
    k=st.integers(1, 12),
    low=st.one_of(close_by, st.integers(0, TOP["F32"] - 1)),
    width=st.one_of(st.integers(1, 8), st.integers(1, TOP["F32"])),
)
def test_a_search_from_any_guess_ends_at_the_kth_largest_pattern(
    patterns: list[int], k: int, low: int, width: int
) -> None:
    """The edges of a range and of its steps are where it could go wrong: some patterns lie on them."""
    k = min(k, len(patterns))
    wanted = sorted(patterns, reverse=True)[k - 1]
    search = Search.over(k, TOP["F32"]).guess(low, low + width)
    for _ in range(8):
        if search.collects:
            assert search.above is not None
            inside = sorted((one for one in patterns if search.lo <= one < search.hi), reverse=True)
            assert inside[k - search.above - 1] == wanted
            return
        found = search.found([counted(patterns, search)]) if search.last else None
        if found:
            assert found[0] == wanted
            return
        search = search.narrow(counted(patterns, search))
    raise AssertionError("a search takes few passes")


@examples(200)
@given(
    patterns=st.lists(st.integers(0, TOP["F32"] - 1), min_size=2, max_size=10, unique=True),
    k=st.integers(1, 10),
    end=st.integers(0, 9),
    edge=st.integers(0, 1),
)
def test_a_guess_that_ends_at_an_element_or_just_below_it_is_no_trap(
    patterns: list[int], k: int, end: int, edge: int
) -> None:
    k, high = min(k, len(patterns)), patterns[end % len(patterns)] + edge
    if high == 0:
        return
    wanted = sorted(patterns, reverse=True)[k - 1]
    search = Search.over(k, TOP["F32"]).guess(0, high)
    search = search.narrow(counted(patterns, search))
    assert search.lo <= wanted < search.hi
    assert search.above == sum(one >= search.hi for one in patterns)


def test_the_largest_elements_are_told_by_their_flat_index_in_any_block() -> None:
    tau = torch.tensor([1.0, -2.0, 1.0, 0.5, 1.0])
    cut = (pattern(1.0, "F32"), 102)
    assert stages.trim(tau, cut, 100).tolist() == [1.0, -2.0, 1.0, 0.0, 0.0]
    assert stages.trim(tau[2:], cut, 102).tolist() == [1.0, 0.0, 0.0]
    assert stages.trim(tau, cut, 200).tolist() == [0.0, -2.0, 0.0, 0.0, 0.0]

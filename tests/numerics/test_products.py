"""Products by exact slices: compared with exact fractions, symmetric where they must be, the same bits on any BLAS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from crdtmerge.numerics import products
from crdtmerge.numerics.products import column_sums, gram, matmul, row_sums
from tests.numerics.examples import examples
from tests.numerics.product_digests import digests

Matrix = NDArray[np.float64]


def exact(a: Matrix, b: Matrix) -> list[list[Fraction]]:
    left = [[Fraction(v) for v in row] for row in a.tolist()]
    right = [[Fraction(v) for v in column] for column in b.T.tolist()]
    return [[sum((x * y for x, y in zip(row, column, strict=True)), Fraction(0)) for column in right] for row in left]


def require_exact(a: Matrix, b: Matrix) -> None:
    """Every element within the bound that ``matmul`` states."""
    found = matmul(a, b)
    inner = a.shape[1]
    for i, row in enumerate(exact(a, b)):
        for j, wanted in enumerate(row):
            largest = Fraction(float(abs(a[i]).max(initial=0.0))) * Fraction(float(abs(b[:, j]).max(initial=0.0)))
            bound = abs(wanted) / 2**52 + inner * largest / 2**57
            assert abs(Fraction(float(found[i, j])) - wanted) <= bound


@examples(60)
@given(
    m=st.integers(1, 5),
    inner=st.integers(1, 40),
    n=st.integers(1, 5),
    number=st.integers(0, 10**6),
    spread=st.sampled_from([0, 8, 60, 400]),
)
def test_products_are_within_their_bound_of_the_exact_ones(
    m: int, inner: int, n: int, number: int, spread: int
) -> None:
    rng = np.random.default_rng(number)
    a = rng.standard_normal((m, inner)) * 2.0 ** rng.integers(-spread, spread + 1, (m, inner))
    b = rng.standard_normal((inner, n)) * 2.0 ** rng.integers(-spread, spread + 1, (inner, n))
    a[rng.random(a.shape) < 0.1] = 0.0
    require_exact(a, b)


@pytest.mark.parametrize("inner", [4095, 4096, 4097, 9001])
def test_long_inner_dimensions_are_cut_and_still_within_the_bound(inner: int) -> None:
    rng = np.random.default_rng(inner)
    require_exact(rng.standard_normal((2, inner)), rng.standard_normal((inner, 2)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_of_short_mantissas_over_few_binades_are_correctly_rounded(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    a, b = (
        torch.from_numpy(rng.uniform(0.5, 2.0, shape)).to(getattr(torch, dtype)).double().numpy()
        for shape in ((6, 200), (200, 5))
    )
    assert matmul(a, b).tolist() == [[float(v) for v in row] for row in exact(a, b)]


def test_every_product_of_slices_stays_below_two_to_the_53(monkeypatch: pytest.MonkeyPatch) -> None:
    """The promise rests on this: sums of magnitudes, in whatever order, are integers that float64 holds."""
    seen = []

    def watched(s: Matrix, t: Matrix) -> Matrix:
        assert (s == np.rint(s)).all()
        assert (t == np.rint(t)).all()
        most = abs(s).astype(np.int64).astype(object) @ abs(t).astype(np.int64).astype(object)
        seen.append(max(most.reshape(-1).tolist()))
        product: Matrix = s @ t
        return product

    monkeypatch.setattr(products, "_exact", watched)
    for inner in (1, 2, 3, 64, 65, 1000, 4096):
        ones = np.full((2, inner), np.nextafter(1.0, 0.0))
        matmul(ones, ones.T)
        rng = np.random.default_rng(inner)
        matmul(rng.uniform(-1, 1, (2, inner)), rng.uniform(-1, 1, (inner, 2)))
    assert 2**50 < max(seen) <= 2**53


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (300, 40), (4100, 6)])
def test_gram_matrices_are_symmetric_to_the_bit(shape: tuple[int, int]) -> None:
    g = gram(np.random.default_rng(1).standard_normal(shape) * 1e3)
    assert np.array_equal(g, g.T)


def test_a_transposed_product_is_the_product_of_the_transposed_to_the_bit() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((7, 90)), rng.standard_normal((90, 4))
    assert np.array_equal(matmul(a, b).T, matmul(b.T, a.T))


def test_powers_of_two_come_out_of_a_product_to_the_bit() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((5, 30)), rng.standard_normal((30, 5))
    for e in (-900, -300, 5, 600, 900):
        assert np.array_equal(matmul(a * 2.0**e, b), matmul(a, b) * 2.0**e)
    assert np.array_equal(matmul(a * 2.0**900, b * 2.0**-900), matmul(a, b))


def test_empty_and_zero_products() -> None:
    assert matmul(np.zeros((3, 0)), np.zeros((0, 2))).tolist() == [[0.0, 0.0]] * 3
    assert matmul(np.zeros((0, 4)), np.zeros((4, 2))).shape == (0, 2)
    assert matmul(np.zeros((2, 4)), np.ones((4, 2))).tolist() == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 31, 32, 33, 1000])
def test_column_sums_fold_halves_of_a_power_of_two(rows: int) -> None:
    x = np.random.default_rng(rows).standard_normal((rows, 3))
    size = 1
    while size < rows:
        size *= 2
    level = np.concatenate([x, np.zeros((size - rows, 3))])
    while size > 1:
        size //= 2
        level = level[:size] + level[size:]
    assert np.array_equal(column_sums(x), level[0] if rows else np.zeros(3))
    assert np.array_equal(row_sums(x.T), column_sums(x))


# ---------------------------------------------------------------- other machines

MACHINES: dict[str, dict[str, str]] = {
    "one thread": {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
    "Haswell": {"OPENBLAS_CORETYPE": "Haswell"},
    "SkylakeX": {"OPENBLAS_CORETYPE": "SkylakeX"},
    "Prescott": {"OPENBLAS_CORETYPE": "Prescott"},
    "numpy without AVX2": {"NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX2 FMA3 X86_V3 X86_V4"},
}


def test_the_same_bits_come_out_with_any_blas_kernel_and_any_number_of_threads() -> None:
    """The library's own product does differ among these, so that they are different machines."""
    here = digests()
    command = [sys.executable, "-m", "tests.numerics.product_digests"]
    running = {
        name: subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE)
        for name, settings in MACHINES.items()
    }
    found = {name: json.loads(one.communicate(timeout=120)[0]) for name, one in running.items()}
    library = here.pop("library")
    libraries = {one.pop("library") for one in found.values()}
    assert all(one == here for one in found.values()), found
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        assert len(libraries | {library}) > 1

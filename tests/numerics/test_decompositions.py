"""Decompositions: what defines them holds to rounding, LAPACK finds the same values, and signs and orders are fixed."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from crdtmerge.numerics import decompositions, elementary, fused
from crdtmerge.numerics.decompositions import cholesky, cholesky_solve, eigh, pivoted_qr, right_vectors, svd
from crdtmerge.numerics.products import gram
from tests.numerics.examples import examples

Matrix = NDArray[np.float64]

SHAPES = [(1, 1), (1, 5), (5, 1), (2, 2), (3, 2), (2, 7), (8, 8), (33, 20), (20, 33), (40, 40), (130, 65)]


def kinds(shape: tuple[int, int], number: int) -> dict[str, Matrix]:
    """Matrices that are hard in different ways."""
    rng = np.random.default_rng(number)
    m, n = shape
    r = min(m, n)
    q, p = np.linalg.qr(rng.standard_normal((m, r)))[0], np.linalg.qr(rng.standard_normal((n, r)))[0]
    return {
        "normal": rng.standard_normal(shape),
        "graded": rng.standard_normal(shape) * np.logspace(0, -12, n),
        "ill-conditioned": q * np.logspace(0, -13, r) @ p.T,
        "of equal values": q * np.repeat([3.0, 1.0], r)[:r] @ p.T,
        "of low rank": rng.standard_normal((m, max(1, r // 4))) @ rng.standard_normal((max(1, r // 4), n)),
        "small": rng.standard_normal(shape) * 1e-200,
        "large": rng.standard_normal(shape) * 1e200,
        "ones": np.ones(shape),
        "integers": rng.integers(-2, 3, shape).astype(np.float64),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_and_vectors_are_what_they_must_be(shape: tuple[int, int]) -> None:
    for kind, a in kinds(shape, 5).items():
        u, s, vt = svd(a)
        wanted = np.linalg.svd(a, compute_uv=False)
        scale, r = max(float(wanted[0]), 1e-300), len(s)
        assert u.shape == (shape[0], r), kind
        assert vt.shape == (r, shape[1]), kind
        assert abs(u * s @ vt - a).max() < 1e-14 * scale * len(wanted), kind
        assert abs(u.T @ u - np.eye(r)).max(initial=0) < 3e-14, kind
        assert abs(vt @ vt.T - np.eye(r)).max(initial=0) < 3e-14, kind
        assert abs(s - wanted[:r]).max(initial=0) < 1e-14 * scale, kind
        assert wanted[r:].max(initial=0) < 1e-13 * scale, kind
        assert (np.diff(s) <= 0).all(), kind
        assert (s > 0).all(), kind
        largest = abs(u).argmax(axis=0)
        assert (u[largest, np.arange(r)] > 0).all(), kind


@pytest.mark.parametrize("shape", SHAPES)
def test_right_vectors_alone_span_what_those_of_the_whole_do(shape: tuple[int, int]) -> None:
    for kind, a in kinds(shape, 6).items():
        s, vt = right_vectors(a)
        _, wanted, wanted_vt = svd(a)
        scale = float(wanted[0])
        assert len(s) == len(wanted), kind
        assert abs(s - wanted).max() < 1e-14 * scale, kind
        assert abs(vt @ vt.T - np.eye(len(s))).max() < 3e-14, kind
        found, same = (vt.T * (s / scale) ** 2) @ vt, (wanted_vt.T * (wanted / scale) ** 2) @ wanted_vt
        assert abs(found - same).max() < 1e-13, kind
        largest = abs(vt).argmax(axis=1)
        assert (vt[np.arange(len(s)), largest] > 0).all(), kind


def test_the_rank_is_that_of_the_matrix() -> None:
    for shape in SHAPES:
        low = kinds(shape, 5)["of low rank"]
        assert len(svd(low)[1]) == max(1, min(shape) // 4)
    assert len(svd(np.zeros((4, 3)))[1]) == 0
    assert len(svd(np.zeros((0, 3)))[1]) == 0
    assert len(svd(np.diag([1e-30, 1.0, 0.5]))[1]) == 2


def test_small_singular_values_of_graded_matrices_are_right_to_their_own_size() -> None:
    """By the squares alone (a Gram matrix), half of the digits of the small ones would be gone."""
    rng = np.random.default_rng(8)
    q, p = (np.linalg.qr(rng.standard_normal((24, 24)))[0] for _ in range(2))
    wanted = np.logspace(0, -9, 24)
    _, s, _ = svd(q * wanted @ p)
    assert (abs(s - wanted) / wanted).max() < 1e-6
    assert (abs(s - wanted)).max() < 1e-14


@examples(25)
@given(n=st.integers(1, 12), number=st.integers(0, 10**6), equal=st.booleans())
def test_eigenvalues_and_eigenvectors_are_what_they_must_be(n: int, number: int, equal: bool) -> None:
    rng = np.random.default_rng(number)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    values = rng.integers(-2, 3, n).astype(np.float64) if equal else rng.standard_normal(n)
    a = q * values @ q.T
    a = (a + a.T) / 2
    found, vectors = eigh(a)
    assert abs(found - np.sort(values)).max() < 1e-13
    assert abs(vectors.T @ vectors - np.eye(n)).max() < 1e-13
    assert abs(a @ vectors - vectors * found).max() < 1e-13
    assert (vectors[abs(vectors).argmax(axis=0), np.arange(n)] > 0).all()


def test_eigenvalues_of_a_larger_matrix() -> None:
    a = np.random.default_rng(1).standard_normal((90, 90))
    a = a + a.T
    found, vectors = eigh(a)
    assert abs(found - np.linalg.eigvalsh(a)).max() < 1e-13 * 30
    assert abs(a @ vectors - vectors * found).max() < 1e-12 * 30
    assert eigh(np.zeros((3, 3)))[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", SHAPES)
def test_pivoted_qr_is_a_factorisation_with_falling_diagonal(shape: tuple[int, int]) -> None:
    for kind, a in kinds(shape, 6).items():
        q, r, order = pivoted_qr(a / abs(a).max())
        scaled = a / abs(a).max()
        assert sorted(order) == list(range(shape[1])), kind
        assert abs(q @ r - scaled[:, order]).max() < 1e-13, kind
        assert abs(q.T @ q - np.eye(len(r))).max() < 3e-14, kind
        assert np.array_equal(r, np.triu(r)), kind
        diagonal = abs(np.diag(r))
        assert (diagonal[1:] <= diagonal[:-1] * (1 + 1e-10)).all(), kind


@pytest.mark.parametrize("n", [1, 2, 5, 63, 64, 65, 150])
def test_cholesky_solves_what_it_factors(n: int) -> None:
    rng = np.random.default_rng(n)
    g = gram(rng.standard_normal((2 * n + 3, n)))
    b = rng.standard_normal((n, 4))
    factor = cholesky(g)
    assert factor is not None
    assert np.array_equal(factor, np.tril(factor))
    assert abs(factor @ factor.T - g).max() < 1e-13 * abs(g).max()
    x = cholesky_solve(g, b)
    assert x is not None
    wanted = np.linalg.solve(g, b)
    assert abs(x - wanted).max() < 1e-12 * np.linalg.cond(g) * abs(wanted).max()


def test_only_the_lower_triangle_is_read() -> None:
    g = gram(np.random.default_rng(0).standard_normal((200, 100)))
    one, other = cholesky(g), cholesky(np.tril(g) + np.triu(np.full_like(g, 7.0), 1))
    assert one is not None
    assert other is not None
    assert np.array_equal(one, other)


@pytest.mark.parametrize(
    "g", [-np.eye(3), np.zeros((2, 2)), np.array([[1.0, 2.0], [2.0, 1.0]]), np.full((2, 2), np.nan), np.ones((70, 70))]
)
def test_what_is_not_positive_definite_is_not_solved(g: Matrix) -> None:
    assert cholesky_solve(g, np.ones((len(g), 1))) is None


# ---------------------------------------------------------------- kernels


def hard(shape: tuple[int, int], number: int) -> dict[str, Matrix]:
    """Matrices of many kinds, and such as have zeros of both signs, equal columns and subnormal numbers."""
    found = kinds(shape, number)
    normal = found["normal"]
    zeros, equal, both = normal.copy(), normal.copy(), normal.copy()
    zeros[:, ::3] = 0.0
    equal[:, 1::2] = equal[:, : shape[1] // 2]
    both[abs(both) < 0.7] = -0.0
    found |= {"zero columns": zeros, "equal columns": equal, "zeros of both signs": both}
    return found | {
        "signed zeros on a diagonal": np.where(np.eye(*shape) > 0, -np.abs(normal), -0.0),
        "subnormal": normal * 2.0**-1060,
        "underflowing": normal * 2.0 ** -np.arange(0, 30 * shape[1], 30.0)[: shape[1]],
    }


def both_ways(a: Matrix, patch: pytest.MonkeyPatch) -> list[list[bytes]]:
    """The bytes of every result by the definition, and by the kernels."""
    square = a[: min(a.shape), : min(a.shape)]
    found = []
    for how in ("torch", "numba"):
        patch.setenv(fused.VARIABLE, how)
        assert (fused.rotations(min(a.shape)) is None) == (how == "torch")
        q, r, order = pivoted_qr(a)
        results = [q, r, np.array(order), *svd(a), *eigh(square + square.T)]
        found.append([x.tobytes() for x in results])
    return found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("shape", [*SHAPES, (7, 1), (1, 2), (64, 64), (17, 90)])
def test_kernels_give_the_bytes_of_the_definition(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, a in hard(shape, 11).items():
        definition, kernels = both_ways(a, monkeypatch)
        assert definition == kernels, kind


@examples(25)
@given(m=st.integers(1, 9), n=st.integers(1, 9), number=st.integers(0, 10**6), wide=st.integers(0, 300))
def test_kernels_give_the_bytes_of_the_definition_for_small_matrices(m: int, n: int, number: int, wide: int) -> None:
    rng = np.random.default_rng(number)
    a = rng.integers(-2, 3, (m, n)) * 2.0 ** rng.integers(-wide, wide + 1, (m, n))
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        definition, kernels = both_ways(a, patch)
    assert definition == kernels


def test_sweeps_that_end_too_early_give_the_bytes_of_the_definition() -> None:
    module = fused.rotations(fused.COMPILED_SIDE)
    assert module is not None
    for rows in (2, 4, 6, 22):
        x = np.random.default_rng(rows).standard_normal((rows, 30))
        for sweeps in (1, 2):
            turned = x.copy()
            order, squares = module.orthogonalised(turned, 25, sweeps, decompositions.ORTHOGONAL)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(decompositions, "SWEEPS_MAX", sweeps)
                wanted, wanted_squares = decompositions.defined_rotations(x.copy(), 25)
            assert turned[order].tobytes() == wanted.tobytes()
            assert squares[order].tobytes() == wanted_squares.tobytes()


def test_matrices_whose_squares_overflow_are_left_to_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fused.VARIABLE, "numba")
    a = np.random.default_rng(4).standard_normal((9, 6)) * 2.0**450
    assert abs(svd(a)[1] / 2.0**450 - np.linalg.svd(a / 2.0**450, compute_uv=False)).max() < 1e-13
    with np.errstate(all="ignore"):
        q, r, order = pivoted_qr(a * 2.0**400)
        wanted = decompositions.defined_qr(a * 2.0**400)
    assert [q.tobytes(), r.tobytes(), order] == [wanted[0].tobytes(), wanted[1].tobytes(), wanted[2]]


# ---------------------------------------------------------------- elementwise functions


def worst(found: Matrix, exact: list[object]) -> float:
    """The largest error in units of the last place."""
    errors = []
    for got, wanted in zip(found.tolist(), exact, strict=True):
        unit = np.spacing(abs(float(wanted)))  # type: ignore[arg-type]
        errors.append(abs(float((mpmath.mpf(got) - wanted) / mpmath.mpf(float(unit)))))
    return max(errors)


def test_exp_is_within_one_unit_in_the_last_place() -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.uniform(-745, 709.7, 3000), rng.uniform(-1, 1, 3000), rng.uniform(-745, -700, 500)])
    with mpmath.workprec(200):
        assert worst(elementary.exp(x), [mpmath.exp(v) for v in x.tolist()]) < 1.0


def test_log_is_within_one_unit_in_the_last_place() -> None:
    rng = np.random.default_rng(2)
    x = np.concatenate(
        [10.0 ** rng.uniform(-320, 308, 3000), rng.uniform(0.5, 2, 3000), 1 + rng.uniform(-1e-6, 1e-6, 500)]
    )
    with mpmath.workprec(200):
        assert worst(elementary.log(x), [mpmath.log(v) for v in x.tolist()]) < 1.0


def test_sqrt_is_correctly_rounded() -> None:
    rng = np.random.default_rng(3)
    x = 10.0 ** rng.uniform(-320, 308, 4000)
    with mpmath.workprec(200):
        assert elementary.sqrt(x).tolist() == [float(mpmath.sqrt(v)) for v in x.tolist()]


def test_elementwise_functions_at_their_ends() -> None:
    inf, nan = np.inf, np.nan
    assert elementary.exp(np.array([0.0, -0.0, inf, -inf, 710.0, -746.0])).tolist() == [1.0, 1.0, inf, 0.0, inf, 0.0]
    assert elementary.log(np.array([1.0, inf, 0.0])).tolist() == [0.0, inf, -inf]
    assert np.isnan(elementary.exp(np.array([nan]))).all()
    assert np.isnan(elementary.log(np.array([nan, -1.0, -inf]))).all()
    assert elementary.exp(np.zeros((2, 0))).shape == (2, 0)

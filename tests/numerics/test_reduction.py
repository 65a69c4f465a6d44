"""Sums, dot products and norms follow the documented order of additions, to the bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crdtmerge.numerics import reduction
from crdtmerge.numerics.dtypes import DTYPES
from crdtmerge.numerics.fused import Kernels
from tests.numerics.examples import STORED, examples, numbers, raw, stored

SIZES = (0, 1, 2, 15, 4095, 4096, 4097, 65535, 65536, 65537, 131_072, 200_000)
ROUNDING = 2.0**-53


def blocks_in_documented_order(values: list[float]) -> list[float]:
    """Blocks of 65,536, each as 16 rows of 4,096 lanes: rows from first to last, then lanes by halves."""
    sums = []
    for start in range(0, len(values), 65_536):
        block = values[start : start + 65_536]
        block += [0.0] * (65_536 - len(block))
        lanes = block[:4096]
        for row in range(1, 16):
            lanes = [x + y for x, y in zip(lanes, block[row * 4096 : (row + 1) * 4096], strict=True)]
        sums.append(by_halves(lanes))
    return sums


def by_halves(level: list[float]) -> float:
    while len(level) > 1:
        half = len(level) // 2
        level = [level[i] + level[i + half] for i in range(half)]
    return level[0]


def in_documented_order(values: list[float]) -> float:
    sums = blocks_in_documented_order(values)
    if not sums:
        return 0.0
    return by_halves(sums + [0.0] * ((1 << (len(sums) - 1).bit_length()) - len(sums)))


def products(x: torch.Tensor, y: torch.Tensor) -> list[float]:
    return [a * b for a, b in zip(x.double().tolist(), y.double().tolist(), strict=True)]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("size", SIZES)
def test_sums_dots_and_norms_have_the_bits_of_the_documented_order(dtype: str, size: int) -> None:
    x, y = stored(numbers(size, size), dtype), stored(numbers(size, size + 1), dtype)
    assert reduction.tree_sum(x).hex() == in_documented_order(x.double().tolist()).hex()
    assert reduction.dot(x, y).hex() == in_documented_order(products(x, y)).hex()
    assert reduction.norm(x).hex() == math.sqrt(in_documented_order(products(x, x))).hex()


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("size", SIZES)
def test_sums_dots_and_norms_are_close_to_the_exact_ones(dtype: str, size: int) -> None:
    """Each number passes at most 15 + 12 + log2(blocks) additions, and of float64 products one rounding more."""
    x, y = stored(numbers(size, size), dtype), stored(numbers(size, size + 1), dtype)
    depth = 15 + 12 + 2
    values, multiplied = x.double().tolist(), products(x, y)
    assert abs(reduction.tree_sum(x) - math.fsum(values)) <= depth * ROUNDING * math.fsum(map(abs, values))
    exact, mass = math.fsum(multiplied), math.fsum(map(abs, multiplied))
    assert abs(reduction.dot(x, y) - exact) <= (depth + 1) * ROUNDING * mass
    length = math.sqrt(math.fsum(products(x, x)))
    assert abs(reduction.norm(x) - length) <= (depth + 2) * ROUNDING * length


def test_the_order_can_be_told_from_others_on_these_numbers() -> None:
    values = numbers(200_000, 3).tolist()
    left_to_right = 0.0
    for value in values:
        left_to_right += value
    found = reduction.tree_sum(torch.tensor(values, dtype=torch.float64))
    assert len({found, left_to_right, by_halves(values + [0.0] * (262_144 - 200_000)), math.fsum(values)}) >= 3
    assert found != left_to_right


@examples(20)
@given(pieces=st.lists(st.integers(1, 3), min_size=1, max_size=4), tail=st.integers(0, 70_000))
def test_block_sums_are_those_of_any_cut_at_multiples_of_65536(pieces: list[int], tail: int) -> None:
    ends = (np.cumsum(pieces) * reduction.BLOCK).tolist()
    x = torch.from_numpy(numbers(ends[-1] + tail, tail))
    cut = [
        reduction.block_sums(x[start:stop]) for start, stop in zip([0, *ends], [*ends, len(x)], strict=True)
    ]  # the last piece may be empty
    assert torch.equal(torch.cat(cut), reduction.block_sums(x))


def test_a_sum_does_not_depend_on_shape_strides_or_threads() -> None:
    x = torch.from_numpy(numbers(96_000, 9))
    whole = reduction.tree_sum(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert reduction.tree_sum(x.reshape(300, 320)) == whole
            assert reduction.tree_sum(torch.stack([x, -x], dim=1)[:, 0]) == whole
    finally:
        torch.set_num_threads(before)


def test_padding_turns_a_sum_of_minus_zeros_into_zero() -> None:
    assert math.copysign(1.0, reduction.tree_sum(torch.tensor([-0.0] * 10))) == 1.0


def test_pairs_are_listed_row_by_row() -> None:
    assert reduction.pairs(3) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    assert reduction.pairs(0) == []


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("size", [1, 4097, 65_536, 65_537])
def test_gram_block_sums_are_the_block_sums_of_all_products(dtype: str, size: int) -> None:
    rows = [stored(numbers(size, i), dtype) for i in range(3)]
    found = reduction.gram_block_sums(rows)
    wanted = [blocks_in_documented_order(products(rows[i], rows[j])) for i in range(3) for j in range(i, 3)]
    assert found.tolist() == wanted


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("task_vectors", [False, True])
def test_the_gram_kernel_gives_the_bits_of_the_definition(dtype: str, k: int, task_vectors: bool) -> None:
    for size in (1, 513, 4097, 65_535, 65_536, 140_001):
        rows = [stored(numbers(size, 10 * k + i), dtype) for i in range(k)]
        base = stored(numbers(size, 99), dtype)
        definition = reduction.gram_block_sums([r.double() - base.double() for r in rows] if task_vectors else rows)
        kernel = Kernels().gram(np.stack([raw(r) for r in rows]), raw(base) if task_vectors else None, DTYPES[dtype])
        assert kernel is not None, "the kernel is proven on this machine"
        assert kernel.tobytes() == definition.numpy().tobytes()


@examples(200)
@given(st.lists(st.floats(-1e9, 1e9), max_size=70))
def test_blocks_are_folded_by_halves_after_padding_to_a_power_of_two(sums: list[float]) -> None:
    wanted = by_halves(sums + [0.0] * ((1 << max(len(sums) - 1, 0).bit_length()) - len(sums)))
    assert reduction.fold(np.array(sums)).hex() == wanted.hex()

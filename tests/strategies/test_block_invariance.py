"""However a tensor is cut, and whatever runs: torch on any stretch or a kernel in one pass, the bytes are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crdtmerge.numerics.dtypes import DTYPES
from crdtmerge.numerics.fused import Kernels
from tests.numerics.examples import STORED, examples
from tests.strategies.models import EACH, Model, Prepared, Row, equal, family

DTYPE = pytest.mark.parametrize("dtype", STORED)
LARGE = {"a": (150_001,), "b": (300, 7), "empty": (0, 2), "scalar": ()}


def prepared(row: Row, dtype: str, k: int = 3, **how: Any) -> Prepared:
    shapes = how.pop("shapes", None)
    models, base = family(k, dtype, **({"shapes": shapes} if shapes else {}))
    return Prepared(row.strategy, models, base, weights=row.weights[:k], **how, **row.params)


@EACH
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_one_element_at_a_time_gives_the_same_bytes(row: Row, dtype: str) -> None:
    ready = prepared(row, dtype)
    assert equal(ready.applied(range(1, 200)), ready.applied())


@EACH
@DTYPE
def test_stretches_of_777_elements_give_the_same_bytes(row: Row, dtype: str) -> None:
    ready = prepared(row, dtype, shapes={"a": (5000,), "b": (3,)})
    assert equal(ready.applied(range(777, 5000, 777)), ready.applied())


@EACH
@examples(15)
@given(ends=st.lists(st.integers(0, 150), max_size=12))
def test_any_partition_gives_the_same_bytes(row: Row, ends: list[int]) -> None:
    ready = prepared(row, "F16")
    assert equal(ready.applied(ends), ready.applied())


@EACH
@DTYPE
def test_kernels_torch_and_blocks_of_any_size_give_the_same_bytes_and_the_same_plan(row: Row, dtype: str) -> None:
    definition = prepared(row, dtype, shapes=LARGE)
    whole = definition.applied()
    assert equal(definition.run(), whole)
    for stretch, threads in ((65_536, 2), (131_072, 1), (1 << 20, 2)):
        fast = prepared(row, dtype, shapes=LARGE, stretch=stretch, threads=threads, use_kernels=True)
        assert fast.plan.digest == definition.plan.digest
        assert equal(fast.run(), whole)
    slow = prepared(row, dtype, shapes=LARGE, stretch=131_072)
    assert slow.plan.digest == definition.plan.digest
    assert equal(slow.run(), whole)


@EACH
@DTYPE
@pytest.mark.parametrize("out", STORED)
def test_kernels_round_to_every_output_dtype_as_torch_does(row: Row, dtype: str, out: str) -> None:
    ready = prepared(row, dtype, out=out, shapes={"a": (3000,), "b": ()})
    found = ready.run(use_kernels=True)
    assert equal(found, ready.applied())
    assert {x.dtype for x in found.values()} == {STORED[out]}


@EACH
@pytest.mark.parametrize("k", [1, 2, 4])
def test_kernels_merge_any_number_of_models_as_torch_does(row: Row, k: int) -> None:
    for dtype in ("BF16", "F32"):
        ready = prepared(row, dtype, k)
        assert equal(ready.run(use_kernels=True), ready.applied())


@EACH
def test_every_strategy_is_a_program_whose_kernel_is_proven(row: Row) -> None:
    ready = prepared(row, "BF16")
    for tensor in ready.tensors:
        p = ready.params.at(tensor.name)
        program = ready.strategy.program(tensor.name, tensor.meta, ready.plan, p, ready.rng)
        assert program is not None
        assert Kernels().program(program, DTYPES["BF16"], DTYPES["BF16"]) is not None


@EACH
def test_inputs_of_different_dtypes_are_merged_the_same_in_any_cut(row: Row) -> None:
    """There is no kernel for them: with kernels asked for, torch does it."""
    models, base = family(3, "F32")
    mixed: list[Model] = [
        {name: x.to(d) for name, x in m.items()} for m, d in zip(models, STORED.values(), strict=False)
    ]
    ready = Prepared(row.strategy, mixed, base, weights=row.weights[:3], out="F32", use_kernels=True, **row.params)
    assert equal(ready.run(), ready.applied([1, 30, 31, 77]))


EDGE = torch.tensor([0.0, -0.0, 1.0, -1.0, 5e-324, -5e-324, 1e-45, 1e-40, 6e-8, 6e-5, 65504.0, -65504.0, 1e-30, 0.1])


@EACH
@DTYPE
def test_kernels_treat_zeros_subnormals_and_ties_as_torch_does(row: Row, dtype: str) -> None:
    few = EDGE.double().to(STORED[dtype])
    n = len(few)
    index = torch.arange(n**3)
    models: list[Model] = [{"w": few[index % n]}, {"w": few[index // n % n]}]
    base: Model = {"w": few[index // n**2]}
    out = "F64" if dtype in ("F16", "F64") else "F32"  # so that nothing is too large
    ready = Prepared(row.strategy, models, base, weights=row.weights[:2], out=out, **row.params)
    assert equal(ready.run(use_kernels=True), ready.applied())


@pytest.mark.parametrize("strategy", ["dare", "dare_ties"])
def test_a_density_below_2_to_the_minus_32_drops_everything_in_kernels_too(strategy: str) -> None:
    models, base = family(2, "BF16")
    ready = Prepared(strategy, models, base, density="1e-10", rescale=False)
    assert equal(ready.applied(), base)
    assert equal(ready.run(use_kernels=True), base)

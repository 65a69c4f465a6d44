"""Merges that are aligned by what units give out on a probe, and mended by it: bytes, plans, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Linear, ReLU, Sequential

from crdtmerge.errors import MismatchError, NeedsError, ParameterError
from crdtmerge.resolve.merge import merge
from crdtmerge.symmetry.groups import Axis, Group, Symmetry
from crdtmerge.testing.programs import export, write
from crdtmerge.testing.small_program import one_process
from tests.strategies.models import Model, Prepared, copied, equal

AXES = (
    (Axis("0.weight", 0), Axis("0.bias", 0), Axis("2.weight", 1, True)),
    (Axis("2.weight", 0), Axis("2.bias", 0), Axis("4.weight", 1, True)),
)
TENSORS = {
    "0.weight": ((9,), (6,)),
    "0.bias": ((9,),),
    "2.weight": ((7,), (9,)),
    "2.bias": ((7,),),
    "4.weight": ((3,), (7,)),
}
SYMMETRY = Symmetry((Group(9, AXES[0]), Group(7, AXES[1])), TENSORS)
"""Of the network below, written by hand."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("aligned")
    found = {name: folder / name for name in ("program", "data", "symmetry")}
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    export(Sequential(Linear(6, 9), ReLU(), Linear(9, 7), ReLU(), Linear(7, 3)), [x], found["program"])
    write({"inputs": x}, found["data"])
    found["symmetry"].write_bytes(SYMMETRY.encode())
    with one_process():
        yield found


def network(number: int) -> Model:
    rng = np.random.default_rng(number)
    shapes = {name: tuple(int(np.prod(d)) for d in dims) for name, dims in TENSORS.items()} | {"4.bias": (3,)}
    return {name: torch.from_numpy(rng.standard_normal(shape)).float() for name, shape in shapes.items()}


def reordered(one: Model, number: int) -> Model:
    rng = np.random.default_rng([5, number])
    p, q = rng.permutation(9), rng.permutation(7)
    moved = {"0.weight": one["0.weight"][p], "0.bias": one["0.bias"][p], "2.weight": one["2.weight"][q][:, p]}
    moved |= {"2.bias": one["2.bias"][q], "4.weight": one["4.weight"][:, q], "4.bias": one["4.bias"]}
    return {name: x.contiguous() for name, x in moved.items()}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"probe": "noise"},
        {"probe": "noise", "examples": 30, "onto": "mean"},
        {"probe": "noise", "onto": "base"},
        {"strategy": "aligned", "method": "activations", "inner": "median"},
    ],
    ids=str,
)
def test_copies_merge_into_the_network(how: dict[str, Any], files: dict[str, Path]) -> None:
    one = network(1)
    models = [one, *(reordered(one, i) for i in range(3))]
    given = {name: path for name, path in files.items() if name != "data" or how.get("probe") != "noise"}
    base = one if how.get("onto") == "base" else None
    found = merge(models, base=base, inputs=given, **({"strategy": "dimat"} | how))
    assert sum(equal(copied(found), model) for model in models) == 1
    assert equal(copied(found), one) or base is None
    assert not found.receipt.exact


def test_repair_brings_back_what_units_give_out(files: dict[str, Path]) -> None:
    """A spread of units, as numpy finds it, is the mean of the endpoints' after repair, and less before."""
    x = np.random.default_rng(2).standard_normal((400, 6)).astype(np.float32)
    data = files["data"].parent / "probe"
    write({"inputs": torch.from_numpy(x)}, data)
    given = {**files, "data": data}
    models = [network(i) for i in (1, 2)]
    ready = Prepared("rebasin", models, files=given, repair="rescale")
    assert set(ready.plan["repair"]) == {"scales", "values"}
    mended = ready.run()
    plain = Prepared("rebasin", models, files=given).run()

    def spread(one: Model) -> float:
        return float((x @ one["0.weight"].numpy().T + one["0.bias"].numpy()).std(axis=0).mean())

    ends = np.mean([spread(one) for one in models])
    assert spread(plain) < 0.95 * ends
    assert spread(mended) == pytest.approx(ends, rel=1e-4)
    made = merge(models, strategy="rebasin", inputs=given, repair="rescale")
    assert equal(copied(made), mended)


def test_a_symmetry_of_another_program_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_bytes(Symmetry((Group(9, AXES[0][:2]),), {n: TENSORS[n] for n in ("0.weight", "0.bias")}).encode())
    with pytest.raises(MismatchError, match="another program"):
        merge([network(1), network(2)], strategy="dimat", inputs={**files, "symmetry": other})


def test_no_data_and_no_batchnorm_and_no_votes_below_zero(files: dict[str, Path]) -> None:
    models = [network(1), network(2)]
    without = {name: path for name, path in files.items() if name != "data"}
    with pytest.raises(NeedsError, match="data"):
        merge(models, strategy="dimat", inputs=without)
    with pytest.raises(NeedsError, match="BatchNorm"):
        merge(models, strategy="dimat", inputs=files, repair="reset")
    with pytest.raises(ParameterError, match="below 0"):
        merge(models, strategy="dimat", inputs=files, repair="rescale", weights=[2, -1])

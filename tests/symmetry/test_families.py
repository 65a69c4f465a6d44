"""Groups of known families: as many as there are, and reordering them changes nothing, in any precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crdtmerge.symmetry.check import largest_change, lifted
from crdtmerge.symmetry.derive import Carrier, Derived, derived
from crdtmerge.symmetry.groups import decode
from tests.symmetry.families import FAMILIES

torch.set_num_threads(1)

SEEDS = 3
DECOMPOSED = ("resnet", "gqa repeat", "experts one_hot")
"""Families that are looked at in core operators too."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_its_groups_and_reordering_them_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    family = FAMILIES[name]
    module = family.make().eval()
    inputs = family.inputs()
    exported = torch.export.export(module, inputs)
    found = derived(exported)
    assert sorted(group.size for group in found.symmetry.groups) == family.sizes
    assert found.frozen == ()
    run = lifted(exported)
    for seed in range(SEEDS):
        assert largest_change(run, exported.state_dict, found.symmetry, inputs, seed) < 1e-5
    assert decode(found.symmetry.encode(), "x") == found.symmetry
    assert derived(exported) == found
    _carriers_hold(exported, found, inputs)
    _the_module_agrees(module, found, inputs)


def _the_module_agrees(module: torch.nn.Module, found: Derived, inputs: tuple[torch.Tensor, ...]) -> None:
    """In float64, by the module itself and not the graph."""
    module = module.double()
    doubles = [x.double() if x.is_floating_point() else x for x in inputs]

    def run(tensors: object, given: object) -> list[torch.Tensor]:
        with torch.no_grad():
            return [torch.func.functional_call(module, tensors, tuple(doubles), tie_weights=False)]  # type: ignore[arg-type]

    assert largest_change(run, module.state_dict(), found.symmetry, doubles, 7) < 1e-10


def _carriers_hold(exported: torch.export.ExportedProgram, found: Derived, inputs: tuple[torch.Tensor, ...]) -> None:
    """Reordering a group reorders each of its carriers along the dimension that it says."""
    values: dict[str, torch.Tensor] = {}

    class Watcher(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            out = super().run_node(n)
            if isinstance(out, torch.Tensor):
                values[n.name] = out.clone()
            return out

    def watched(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        held = {**exported.constants, **exported.state_dict, **tensors}
        rest = iter(inputs)
        specs = exported.graph_signature.input_specs
        values.clear()
        with torch.no_grad():
            Watcher(exported.graph_module).run(*(held[s.target] if s.target else next(rest) for s in specs))
        return dict(values)

    before = watched({})
    for index, group in enumerate(found.symmetry.groups):
        p = np.roll(np.arange(group.size), 1)
        turned = found.symmetry.identities()
        turned[index] = p
        after = watched(
            {name: found.symmetry.turned(name, exported.state_dict[name], turned) for name in found.symmetry.tensors}
        )
        assert found.carriers[index]
        held: dict[str, list[Carrier]] = {}
        for carrier in found.carriers[index]:
            held.setdefault(carrier.node, []).append(carrier)
        for node, along in held.items():
            x = before[node]
            for carrier in along:
                d = carrier.dimension
                split = x.reshape(*x.shape[:d], *carrier.factors, *x.shape[d + 1 :])
                x = split.index_select(d + carrier.at, torch.from_numpy(p)).reshape(x.shape)
            assert torch.allclose(x, after[node], atol=1e-4, equal_nan=True), (index, node)
        marks = [carrier.consumed for carrier in found.carriers[index]]
        assert marks == sorted(marks, reverse=True)


@pytest.mark.parametrize("name", DECOMPOSED)
def test_core_operators_have_the_same_groups(name: str) -> None:
    torch.manual_seed(0)
    family = FAMILIES[name]
    inputs = family.inputs()
    exported = torch.export.export(family.make().eval(), inputs)
    core = exported.run_decompositions()
    found = derived(core)
    assert sorted(group.size for group in found.symmetry.groups) == family.sizes
    assert found.frozen == ()
    assert largest_change(lifted(core), core.state_dict, found.symmetry, inputs, 0) < 1e-5
    assert found.symmetry.encode() == derived(exported).symmetry.encode()

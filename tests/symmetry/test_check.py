"""The check catches symmetries that are wrong, and random networks have none that are."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import crdtmerge
from crdtmerge.errors import InputError, MismatchError, NeedsError
from crdtmerge.symmetry import check, products, programs
from crdtmerge.symmetry.check import failing, largest_change, lifted, verify
from crdtmerge.symmetry.derive import derived
from crdtmerge.symmetry.groups import Axis, Group, Symmetry
from crdtmerge.symmetry.table import RULES
from crdtmerge.symmetry.values import Call, Value
from tests.symmetry.families import Attention, Block, Experts, Fused, Mlp, RmsNorm, SwiGlu

torch.set_num_threads(1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def exported() -> torch.export.ExportedProgram:
    return torch.export.export(net().eval(), (torch.randn(5, 6),))


def without(symmetry: Symmetry, tensor: str) -> Symmetry:
    groups = tuple(Group(g.size, tuple(a for a in g.axes if a.tensor != tensor)) for g in symmetry.groups)
    return Symmetry(groups, symmetry.tensors)


@pytest.mark.parametrize(
    "tensor", ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "3.weight"]
)
def test_a_group_that_forgets_a_tensor_is_found_also_where_the_tensor_is_constant(
    exported: torch.export.ExportedProgram, tensor: str
) -> None:
    symmetry = without(derived(exported).symmetry, tensor)
    inputs = (torch.randn(5, 6),)
    change, wrong = failing(lifted(exported), exported.state_dict, symmetry, inputs, 0)
    assert change > 1e-3
    assert wrong == ([0, 1] if tensor == "3.weight" else [0])
    with pytest.raises(MismatchError, match=r"group 0 of 8.*Do not align"):
        verify(lifted(exported), exported.state_dict, symmetry, inputs)


def test_an_axis_that_no_group_has_is_found(exported: torch.export.ExportedProgram) -> None:
    symmetry = derived(exported).symmetry
    outputs = Group(3, (Axis("5.weight", 0), Axis("5.bias", 0)))
    more = Symmetry((*symmetry.groups, outputs), {**symmetry.tensors, "5.bias": ((3,),)})
    change, wrong = failing(lifted(exported), exported.state_dict, more, (torch.randn(5, 6),), 1)
    assert change > 1e-3
    assert wrong == [2]


def _careless(c: Call) -> Value:
    """A sum over two dimensions of which one may be reordered without the other."""
    x, w = c.value("input"), c.value("weight")
    return Value([*x.dims[:-1], w.dims[0]], c.shape)


def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "linear", _careless)
    with pytest.raises(MismatchError, match="reordering changes what the program computes"):
        crdtmerge.permutation_groups(net(), (torch.randn(5, 6),))
    assert crdtmerge.permutation_groups(net(), (torch.randn(5, 6),), verify=False).groups
    assert RULES["linear"] is not products.linear


def test_results_that_are_not_finite_pass_for_nothing() -> None:
    symmetry = Symmetry((Group(4, (Axis("w", 0),)),), {"w": ((4,),)})
    tensors = {"w": torch.arange(4.0)}
    assert largest_change(lambda t, x: [t["w"] * torch.nan], tensors, symmetry, (), 0) == float("inf")
    assert largest_change(lambda t, x: [t["w"].sum()], tensors, symmetry, (), 0) < 1e-6
    assert largest_change(lambda t, x: [torch.log(t["w"] - t["w"][0])], tensors, symmetry, (), 0) > 1e-3
    assert largest_change(lambda t, x: [], tensors, symmetry, (), 0) == float("inf")


def test_the_least_precise_tensor_says_what_rounding_may_come_to() -> None:
    symmetry = Symmetry((), {"a": ((4,),), "b": ((4,),)})
    half, single, double = (torch.ones(4, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64))
    assert check.tolerance({"a": double, "b": double}, symmetry) == 1e-10
    assert check.tolerance({"a": double, "b": single}, symmetry) == 1e-5
    assert check.tolerance({"a": half, "b": single}, symmetry) == 1e-1


def test_a_module_is_left_in_its_mode_and_a_program_needs_no_inputs() -> None:
    module = net().train()
    module[1].eval()
    found = crdtmerge.permutation_groups(module, (torch.randn(5, 6),))
    assert [group.size for group in found.groups] == [8, 8]
    assert [part.training for part in module] == [True, False, True, True, True, True]
    exported = torch.export.export(net().eval(), (torch.randn(5, 6),))
    assert crdtmerge.permutation_groups(exported) == found


def test_what_cannot_be_exported_or_tried_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(NeedsError, match="example_inputs"):
        crdtmerge.permutation_groups(net())
    with pytest.raises(InputError, match=r"torch\.export"):
        crdtmerge.permutation_groups(Branching(), (torch.randn(3),))
    exported = torch.export.export(net().eval(), (torch.randn(5, 6),))
    exported.example_inputs = None
    with pytest.raises(NeedsError, match="verify=False"):
        programs.permutation_groups(exported)
    assert programs.permutation_groups(exported, verify=False).groups


class Stack(nn.Module):
    """Blocks one after the other, some with a shortcut."""

    def __init__(self, blocks: list[nn.Module], shortcuts: list[bool]) -> None:
        super().__init__()
        self.blocks, self.shortcuts = nn.ModuleList(blocks), shortcuts

    def forward(self, x: Tensor) -> Tensor:
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = x + block(x) if shortcut else block(x)
        return x


class Mixing(nn.Module):
    """Something odd with a dimension: parts, orders, views, constants."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


ODD: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.flip(-1),
    lambda x: torch.cat((x[..., 6:], x[..., :6]), -1),
    lambda x: torch.cat((x[..., :4], x[..., 4:].neg()), -1),
    lambda x: x.unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2),
    lambda x: x.unflatten(-1, (2, 6)).softmax(-1).flatten(-2),
    lambda x: x.unflatten(-1, (2, 3, 2)).sum(-2, keepdim=True).expand(-1, -1, 2, 3, 2).flatten(-3),
    lambda x: x * torch.arange(1.0, 13.0).view(4, 3).sum(-1).repeat_interleave(3),
    lambda x: x.view(x.shape[0], 4, -1).mT.reshape(x.shape),
    lambda x: x[..., 0::2].repeat_interleave(2, -1) + x[..., 1::2].repeat(1, 1, 2),
    lambda x: x.roll(4, -1),
    lambda x: torch.where(x > 0, x, x.mean(-1, keepdim=True)),
    lambda x: x.gather(-1, x.sort(-1)[1]),
    lambda x: x.cumsum(1),
    lambda x: nn.functional.pixel_shuffle(x.unflatten(-1, (3, 4)), 1).flatten(-2),
    lambda x: (x @ x.mT) @ x,
    lambda x: torch.einsum("bti,btj->btj", x, x) / 12,
    lambda x: x + x.amax(-1, keepdim=True) * x.argmax(-1, keepdim=True),
]


def random_network(draw: random.Random) -> nn.Module:
    d = 12
    making: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(d, d),
        lambda: nn.Sequential(nn.Linear(d, draw.choice([6, 8, 12])), nn.ReLU(), nn.LazyLinear(d)),
        lambda: nn.LayerNorm(d),
        lambda: RmsNorm(d),
        lambda: SwiGlu(d, draw.choice([4, 6, 12]), draw.random() < 0.5),
        lambda: Attention(d, 4, draw.choice([2, 4]), 3, "repeat", ""),
        lambda: Attention(d, 3, 3, 4, "by hand", draw.choice(["", "halves", "neighbours"])),
        lambda: Fused(d, draw.choice([2, 3]), draw.choice(["chunk", "view"])),
        lambda: Experts(d, draw.choice([3, 4]), 6, draw.choice(["dense", "mask", "one_hot", "gather"])),
        lambda: nn.Sequential(nn.Conv1d(5, 5, 3, padding=1), nn.GELU()),
        lambda: nn.Sequential(nn.GroupNorm(5, 5), nn.Tanh()),
        lambda: Mixing(draw.choice(ODD)),
        lambda: Mixing(draw.choice(ODD)),
    ]
    blocks = [draw.choice(making)() for _ in range(draw.randint(2, 5))]
    shared = draw.choice(blocks)
    blocks = [nn.Linear(7, d), *blocks, *([shared] if draw.random() < 0.3 else []), nn.Linear(d, 4)]
    return Stack(blocks, [0 < i < len(blocks) - 1 and draw.random() < 0.5 for i in range(len(blocks))])


@pytest.mark.parametrize("seed", range(12))
def test_no_group_of_a_random_network_changes_what_it_computes(seed: int) -> None:
    torch.manual_seed(seed)
    module = random_network(random.Random(seed)).double().eval()
    inputs = (torch.randn(2, 5, 7, dtype=torch.float64),)
    module(*inputs)
    exported = torch.export.export(module, inputs)
    symmetry = derived(exported).symmetry
    if symmetry.groups:
        assert largest_change(lifted(exported), exported.state_dict, symmetry, inputs, seed) < 1e-10


def test_the_blocks_of_the_random_networks_are_not_all_frozen() -> None:
    exported = torch.export.export(Stack([Mlp(), nn.Linear(3, 3)], [False, False]).eval(), (torch.randn(5, 6),))
    assert len(derived(exported).symmetry.groups) == 3
    images = torch.export.export(Block(2, 4).eval(), (torch.randn(1, 2, 5, 5),))
    assert [group.size for group in derived(images).symmetry.groups] == [4]

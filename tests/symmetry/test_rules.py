"""Rules one by one: what is understood keeps its groups, what is not is frozen, and nothing unsound is left free."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from crdtmerge.symmetry.atoms import Atoms, IrregularError
from crdtmerge.symmetry.check import largest_change, lifted
from crdtmerge.symmetry.derive import Derived, derived
from crdtmerge.symmetry.rules import POINTING, RULES

torch.set_num_threads(1)

WIDE = 12


class Between(nn.Module):
    """Something between two layers: x [5, 6] -> [5, 12] -> f -> [..., n] -> [..., 3]."""

    def __init__(self, f: Callable[..., Tensor], n: int = WIDE) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, WIDE), nn.Linear(n, 3)
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.f(self.a(x)))
        return out


def found(module: nn.Module, *inputs: Tensor) -> Derived:
    """The groups, tried with two seeds, in core operators too."""
    exported = torch.export.export(module.eval(), inputs)
    first = derived(exported)
    run = lifted(exported)
    for seed in range(2 if first.symmetry.groups else 0):
        assert largest_change(run, exported.state_dict, first.symmetry, inputs, seed) < 1e-5
    return first


def sizes(module: nn.Module, *inputs: Tensor) -> list[int]:
    return sorted(group.size for group in found(module, *inputs).symmetry.groups)


ORDINARY: dict[str, tuple[Callable[..., Tensor], int, list[int]]] = {
    "in place": (lambda x: x.relu_().add_(1), 12, [12]),
    "into a part of itself": (lambda x: _put(x), 12, [6]),
    "a gate of halves": (lambda x: F.glu(x, -1), 6, [6]),
    "halves put together": (lambda x: torch.cat((x[:, 6:], x[:, :6]), -1), 12, [6]),
    "uneven parts": (lambda x: torch.cat((x[:, 8:], x[:, :8]), -1), 12, [4]),
    "one and the rest": (lambda x: torch.cat((x[:, 11:], x[:, :11]), -1), 12, []),
    "every third": (lambda x: x[:, 1::3], 4, [4]),
    "the first": (lambda x: x[:, :1] + x[:, 1:2] * 0, 1, []),
    "turned around": (lambda x: x.flip(-1), 12, []),
    "rolled": (lambda x: x.roll(1, -1), 12, []),
    "summed up": (lambda x: x.cumsum(-1), 12, []),
    "sorted": (lambda x: x.sort(-1)[0], 12, [12]),
    "the best four": (lambda x: x.topk(4, -1)[0], 4, [12]),
    "where the best is": (lambda x: F.one_hot(x.argmax(-1), 12).to(x.dtype), 12, [12]),
    "the best as a number": (lambda x: x * x.argmax(-1, keepdim=True), 12, []),
    "the best and one": (lambda x: F.one_hot(x.argmax(-1) * 0 + 1, 12) * x, 12, []),
    "gathered": (lambda x: x.gather(-1, x.neg().topk(4, -1)[1]), 4, [12]),
    "scattered": (lambda x: torch.zeros_like(x).scatter(-1, *reversed(x.topk(4, -1))), 12, [12]),
    "gathered by number": (lambda x: x.gather(-1, torch.tensor([[3, 1, 2, 0]] * 5)), 4, []),
    "picked": (lambda x: x[:, torch.tensor([3, 1, 2, 0])], 4, []),
    "normalised": (lambda x: F.normalize(x, dim=-1), 12, [12]),
    "grouped norm": (lambda x: F.group_norm(x, 3), 12, [3, 4]),
    "softmax": (lambda x: x.softmax(-1), 12, [12]),
    "with constants": (lambda x: x * torch.arange(12.0), 12, []),
    "with one number": (lambda x: x * torch.full((12,), 2.0) + torch.ones(1), 12, [12]),
    "with itself by position": (lambda x: x @ (torch.arange(12) == torch.arange(12)[:, None]).to(x.dtype), 12, [12]),
    "padded": (lambda x: F.pad(x, (1, 1)), 14, []),
    "a triangle": (lambda x: (x.T @ x).tril(), 12, []),
    "products of all pairs": (lambda x: (x.T @ x).sum(0, keepdim=True), 12, [12]),
    "pairs read in a row": (lambda x: (x[:, :, None] * x[:, None]).flatten(1), 144, [12]),
    "a matrix read in another shape": (
        lambda x: x.view(5, 3, 4).transpose(1, 2).reshape(5, 2, 6).flatten(1),
        12,
        [2, 2, 3],
    ),
    "repeated": (lambda x: x.repeat(1, 2), 24, [2, 12]),
    "interleaved": (lambda x: x.repeat_interleave(2, -1), 24, [2, 12]),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x.view(5, 6, 2)) ** 2).flatten(1), 12, [6]),
    "without gradients": (lambda x: _quiet(x), 12, [12]),
    "an outer sum": (lambda x: torch.einsum("bi,bj->bj", x, x * 2), 12, [12]),
    "a diagonal": (lambda x: torch.einsum("ii->i", x.T @ x), 12, [12]),
    "an ellipsis": (lambda x: torch.einsum("...i,...j->...j", x.sum(-1, keepdim=True), x), 12, [12]),
    "clamped to the mean": (lambda x: torch.where(x > x.mean(-1, keepdim=True), x, x.std(-1, keepdim=True)), 12, [12]),
    "kernel": (lambda x: torch.fft.rfft(x).real, 7, []),
    "in order of size": (lambda x: x.gather(-1, x.neg().argsort(-1)), 12, [12]),
    "sums of products": (lambda x: torch.addbmm(x[:3, :4], x.view(5, 3, 4)[..., :1], x.view(5, 3, 4)[:, :1]), 4, []),
    "an unknown operator": (lambda x: torch.cdist(x, x), 5, []),
}


def _put(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :6] = 2 * x[:, 6:]
    return x


def _quiet(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 2
    return x + y


@pytest.mark.parametrize("name", ORDINARY)
def test_an_operation_between_two_layers(name: str) -> None:
    f, n, wanted = ORDINARY[name]
    torch.manual_seed(0)
    assert sizes(Between(f, n), torch.randn(5, 6)) == wanted


def test_places_by_truth_values_are_frozen() -> None:
    def chosen(x: Tensor) -> Tensor:
        left, _ = (x > 0).split(6, -1)
        return x[:, :6][left].sum().expand(5, 1)

    exported = torch.export.export(Between(chosen, 1).eval(), (torch.randn(5, 6),))
    assert derived(exported).symmetry.groups == ()


def test_an_unknown_operator_is_named() -> None:
    got = found(Between(lambda x: torch.cdist(x, x), 5), torch.randn(5, 6))
    assert [name.split()[0] for name in got.frozen] == ["aten.cdist.default"]


def test_every_operator_of_the_table_is_one_of_torch() -> None:
    unknown = [name for name in RULES if not hasattr(torch.ops.aten, name)]
    assert unknown == []
    assert set(RULES) >= POINTING


def test_a_parameter_that_no_result_depends_on_makes_no_group() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x).relu()
            out: Tensor = self.used(x)
            return out

    assert sizes(Dead(), torch.randn(5, 6)) == []


def test_buffers_are_frozen_except_statistics_of_channels() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Linear(6, 8), nn.Linear(8, 3), nn.BatchNorm1d(8)
            self.register_buffer("scale", torch.arange(8.0))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.bn(self.a(x)) * self.scale)
            return out

    class Normal(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.bn(self.a(x)))
            return out

    assert sizes(Scaled(), torch.randn(5, 6)) == []
    got = found(Normal(), torch.randn(5, 6)).symmetry
    assert [axis.tensor for axis in got.groups[0].axes if axis.tensor.startswith("bn")] == [
        "bn.weight",
        "bn.bias",
        "bn.running_mean",
        "bn.running_var",
    ]


def test_normalisation_that_learns_its_statistics_keeps_its_channels() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(5, 6)
    exported = torch.export.export(module.train(), (x,)).run_decompositions({})
    assert [group.size for group in derived(exported).symmetry.groups] == [8]


def test_what_consumes_is_marked() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    axes = [group.axes for group in found(net, torch.randn(5, 6)).symmetry.groups]
    assert [[(a.tensor, a.position, a.consumes) for a in group] for group in axes] == [
        [("0.weight", 0, False), ("0.bias", 0, False), ("2.weight", 1, True)],
        [("2.weight", 0, False), ("2.bias", 0, False), ("4.weight", 1, True)],
    ]


def test_a_weight_made_of_two_parameters_is_marked_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 8)
            self.b = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x).relu())
            return out

    got = found(Scaled(), torch.randn(5, 6)).symmetry
    assert [g.size for g in got.groups] == [8]
    assert got.groups[0].axes[-1] == ("b.parametrizations.weight.original1", 1, True)


def test_tied_weights_are_one_and_a_model_may_lack_a_name_of_them() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.h = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.h.weight = self.e.weight

        def forward(self, i: Tensor) -> Tensor:
            out: Tensor = self.h(self.e(i))
            return out

    symmetry = found(Tied(), torch.randint(0, 9, (2, 3))).symmetry
    assert symmetry.tied == (("e.weight", "h.weight"),)
    assert {(a.tensor, a.consumes) for a in symmetry.groups[0].axes} == {("e.weight", True), ("h.weight", True)}
    alone = symmetry.fitted({"h.weight": (9, 4)}, "a model")
    assert [a.tensor for a in alone.groups[0].axes] == ["h.weight"]
    assert set(alone.tensors) == {"h.weight"}


def test_parameters_that_share_memory_in_two_shapes_are_frozen() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False)
            self.b.weight = nn.Parameter(self.a.weight.data.view(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x).relu())
            return out

    assert sizes(Shared(), torch.randn(5, 6)) == []


def test_atoms_split_where_dimensions_are_made_differently() -> None:
    atoms = Atoms()
    x, y, z = (atoms.new(12),), (atoms.new(3), atoms.new(4)), (atoms.new(6), atoms.new(2))
    atoms.unite(x, y)
    atoms.unite(y, z)
    assert [atoms.size(a) for a in atoms.flat(x)] == [3, 2, 2]
    assert atoms.flat(x) == atoms.flat(y) == atoms.flat(z)
    odd = (atoms.new(4), atoms.new(3))
    atoms.unite(odd, (atoms.new(3), atoms.new(4)))
    assert all(atoms.frozen(a) for a in odd)
    with pytest.raises(IrregularError):
        atoms.divided(x, 5)
    twice = atoms.new(6)
    outer, inner = atoms.divided((twice, twice), 12)
    assert [atoms.size(a) for a in outer] == [6, 2]
    assert [atoms.size(a) for a in inner] == [3]
    assert atoms.size(atoms.new(None)) is None

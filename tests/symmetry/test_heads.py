"""Heads that are turned: which widths may be, what turning keeps, planted orders and turns that are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Linear, Module, RMSNorm
from torch.nn import functional as F  # noqa: N812 (its usual name)

from crdtmerge.errors import MismatchError
from crdtmerge.symmetry.derive import derived
from crdtmerge.symmetry.groups import Symmetry
from crdtmerge.symmetry.heads import Width, align_width, match_heads, rotated_width, widths

Wide = NDArray[np.float64]
INPUT, LENGTH = 6, 5


class Attention(Module):
    """Attention between two layers; ``kind`` is what else happens to queries, keys and values."""

    def __init__(self, kind: str = "plain", heads: int = 3, width: int = 4) -> None:
        super().__init__()
        self.kind, self.heads, self.width = kind, heads, width
        bias = kind != "unbiased"
        served = 1 if kind == "served" else heads
        self.q = Linear(INPUT, heads * width, bias)
        self.k, self.v = (Linear(INPUT, served * width, bias) for _ in range(2))
        self.o = Linear(heads * width, INPUT)
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            if self.kind == "inside out":
                return y.view(*y.shape[:2], self.width, -1).permute(0, 3, 1, 2)
            return y.view(*y.shape[:2], -1, self.width).transpose(1, 2)

        q, k, v = heads(self.q(x)), heads(self.q(x) if self.kind == "shared" else self.k(x)), heads(self.v(x))
        if self.kind == "rope":
            q, k = _placed(q), _placed(k)
        if self.kind == "normed":
            q, k = self.norm(q), self.norm(k)
        if self.kind == "bent":
            v = torch.relu(v)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kind == "served")
        if self.kind == "inside out":
            seen = seen.permute(0, 2, 3, 1).flatten(2)
        else:
            seen = seen.transpose(1, 2).flatten(2)
        out: Tensor = self.o(seen)
        return out + self.v(x).sum(-1, keepdim=True) if self.kind == "looked at" else out


def _placed(x: Tensor) -> Tensor:
    """Rotary positions."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] / 10.0 ** torch.arange(half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


X = torch.from_numpy(np.random.default_rng(0).standard_normal((2, LENGTH, INPUT))).float()


def found(module: Module) -> tuple[Symmetry, list[Width]]:
    exported = torch.export.export(module.eval(), (X,))
    seen = derived(exported)
    return seen.symmetry, widths(exported, seen)


def weights(module: Module) -> dict[str, Wide]:
    return {name: x.detach().double().numpy() for name, x in module.state_dict().items()}


def output(module: Module, tensors: dict[str, Wide]) -> Tensor:
    with torch.no_grad():
        given = {name: torch.from_numpy(x).float() for name, x in tensors.items()}
        out: Tensor = torch.func.functional_call(module, given, (X,))
    return out


def turns(seed: int, count: int, size: int) -> Wide:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((count, size, size)))[0]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unbiased": {"kind": "unbiased"},
    "inside out": {"kind": "inside out"},
    "as many as wide": {"kind": "inside out", "heads": 4},
    "one head": {"heads": 1},
}


@pytest.fixture(params=list(KINDS.values()), ids=list(KINDS))
def model(request: pytest.FixtureRequest) -> tuple[Module, Symmetry, list[Width]]:
    torch.manual_seed(1)
    module = Attention(**request.param)
    return module, *found(module)


def test_both_widths_are_found_with_what_meets_in_them(model: tuple[Module, Symmetry, list[Width]]) -> None:
    module, symmetry, both = model
    assert isinstance(module, Attention)
    biases = module.q.bias is not None
    sides = {one.left: one.right for one in both}
    assert sides == {
        ("q.weight", "q.bias")[: 1 + biases]: ("k.weight", "k.bias")[: 1 + biases],
        ("v.weight", "v.bias")[: 1 + biases]: ("o.weight",),
    }
    for one in both:
        assert symmetry.groups[one.group].size == module.width
        assert (one.heads is None) == (module.heads == 1)
        assert one.heads is None or symmetry.groups[one.heads].size == module.heads


def test_turning_keeps_the_function(model: tuple[Module, Symmetry, list[Width]]) -> None:
    module, symmetry, both = model
    assert isinstance(module, Attention)
    tensors = weights(module)
    turned = tensors
    for seed, one in enumerate(both):
        turned = rotated_width(turned, one, symmetry, turns(seed, module.heads, module.width))
    assert torch.allclose(output(module, turned), output(module, tensors), rtol=0, atol=1e-5)
    assert all(np.abs(turned[name] - tensors[name]).max() > 0.1 for name in ("q.weight", "k.weight", "v.weight"))
    alone = {**tensors, "q.weight": turned["q.weight"]}
    assert (output(module, alone) - output(module, tensors)).abs().max() > 0.001


def test_planted_orders_and_turns_are_found(model: tuple[Module, Symmetry, list[Width]]) -> None:
    module, symmetry, both = model
    assert isinstance(module, Attention)
    tensors = weights(module)
    hidden = tensors
    for seed, one in enumerate(both):
        hidden = rotated_width(hidden, one, symmetry, turns(10 + seed, module.heads, module.width))
    orders = symmetry.identities()
    for group in {one.heads for one in both if one.heads is not None}:
        orders[group] = np.roll(orders[group], 1)
    hidden = {name: symmetry.turned(name, x, orders) for name, x in hidden.items()}
    back = match_heads(both, symmetry, tensors, hidden)
    again = {name: symmetry.turned(name, x, back) for name, x in hidden.items()}
    for one in both:
        again = rotated_width(again, one, symmetry, align_width(one, symmetry, tensors, again))
    assert all(np.allclose(again[name], tensors[name], rtol=0, atol=1e-9) for name in tensors)


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("rope", [("v.weight", "v.bias")]),
        ("normed", [("v.weight", "v.bias")]),
        ("bent", [("q.weight", "q.bias")]),
        ("looked at", [("q.weight", "q.bias")]),
        ("shared", [("v.weight", "v.bias")]),
        ("served", []),
    ],
)
def test_a_width_that_anything_else_touches_is_left_out(kind: str, left: list[tuple[str, ...]]) -> None:
    assert [one.left for one in found(Attention(kind))[1]] == left


def test_of_two_networks_no_other_turns_bring_them_nearer() -> None:
    torch.manual_seed(3)
    module = Attention()
    symmetry, both = found(module)
    one, other = weights(module), weights(Attention())
    for width in both:
        best = align_width(width, symmetry, one, other)

        def far(o: Wide, width: Width = width) -> float:
            turned = rotated_width(other, width, symmetry, o)
            return sum(float(((turned[name] - one[name]) ** 2).sum()) for name in one)

        assert far(best) < far(np.stack([np.eye(4)] * 3))
        for seed in range(5):
            skew = np.random.default_rng(seed).standard_normal((4, 4)) * 0.05
            near = np.linalg.solve(np.eye(4) + skew - skew.T, np.eye(4) - skew + skew.T)
            assert far(best) <= far(near @ best) + 1e-9


def test_dead_heads_stay_and_wrong_matrices_are_a_sentence() -> None:
    module = Attention("unbiased")
    symmetry, both = found(module)
    tensors = weights(module)
    first = [f"{name}.weight" for name in "qkv"]
    dead = {**tensors, **{name: tensors[name] * (np.arange(12) >= 4)[:, None] for name in first}}
    for one in both:
        assert (match_heads(both, symmetry, dead, dead)[one.heads or 0] == np.arange(3)).all()
    assert (align_width(both[0], symmetry, dead, dead)[0] == np.eye(4)).all()
    for o in (2 * turns(0, 3, 4), turns(0, 2, 4), turns(0, 3, 5)):
        with pytest.raises(MismatchError, match=r"orthogonal matrices \[3, 4, 4\]"):
            rotated_width(tensors, both[0], symmetry, o)

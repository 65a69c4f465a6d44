"""Residual streams that are turned: which groups may be, what turning keeps, planted turns that are found."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import Embedding, LayerNorm, Linear, Module, Parameter, RMSNorm

from crdtmerge.errors import MismatchError, NeedsError
from crdtmerge.symmetry.derive import derived
from crdtmerge.symmetry.groups import Symmetry
from crdtmerge.symmetry.orthogonal import Residual, align_residual, folded, residual_of, residuals, rotated

Wide = NDArray[np.float64]
WORDS, WIDTH, HEADS, INNER, LENGTH = 24, 8, 2, 12, 5


class Written(Module):
    """An RMS norm as language models write it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Block(Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.before, self.between = norm(WIDTH), norm(WIDTH)
        self.q, self.k, self.v = (Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.o = Linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = Linear(WIDTH, INNER), Linear(WIDTH, INNER), Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.reshape(y.shape[0], LENGTH, HEADS, -1).transpose(1, 2)

        y = self.before(x)
        seen = torch.nn.functional.scaled_dot_product_attention(heads(self.q(y)), heads(self.k(y)), heads(self.v(y)))
        x = x + self.o(seen.transpose(1, 2).reshape(x.shape[0], LENGTH, WIDTH))
        y = self.between(x)
        out: torch.Tensor = x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))
        return out


class Transformer(Module):
    def __init__(self, norm: Any = RMSNorm, tied: bool = False) -> None:
        super().__init__()
        self.words, self.places = Embedding(WORDS, WIDTH), Parameter(torch.randn(LENGTH, WIDTH))
        self.blocks = torch.nn.ModuleList(Block(norm) for _ in range(2))
        self.last, self.head = norm(WIDTH), Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight
        for name, x in self.named_parameters():
            if x.dim() == 1:
                torch.nn.init.normal_(x, 1.0 if "weight" in name else 0.0, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.words(x) + self.places
        for block in self.blocks:
            y = block(y)
        out: torch.Tensor = self.head(self.last(y))
        return out


IDS = torch.from_numpy(np.random.default_rng(0).integers(0, WORDS, (6, LENGTH)))


def found(module: Module) -> tuple[Symmetry, list[Residual]]:
    exported = torch.export.export(module.eval(), (IDS,))
    symmetry = derived(exported).symmetry
    return symmetry, residuals(exported, symmetry)


def weights(module: Module) -> dict[str, Wide]:
    return {name: x.detach().double().numpy() for name, x in module.state_dict().items()}


def output(module: Module, tensors: dict[str, Wide]) -> torch.Tensor:
    with torch.no_grad():
        given = {name: torch.from_numpy(x).float() for name, x in tensors.items()}
        out: torch.Tensor = torch.func.functional_call(module, given, (IDS,))
    return out


def turn(seed: int, size: int = WIDTH) -> Wide:
    q: Wide = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    return q


@pytest.fixture(scope="module", params=[RMSNorm, Written], ids=["rms_norm", "written"])
def model(request: pytest.FixtureRequest) -> tuple[Module, Symmetry, Residual]:
    torch.manual_seed(1)
    module = Transformer(request.param)
    symmetry, all_of_them = found(module)
    assert len(all_of_them) == 1
    return module, symmetry, all_of_them[0]


def test_the_residual_stream_is_found_with_its_norms(model: tuple[Module, Symmetry, Residual]) -> None:
    _, symmetry, residual = model
    assert symmetry.groups[residual.group].size == WIDTH
    taken = {norm.scale: sorted(name for name, _ in norm.consumers) for norm in residual.norms}
    wanted = {"last.weight": ["head.weight"]}
    for i in range(2):
        wanted[f"blocks.{i}.before.weight"] = [f"blocks.{i}.{name}.weight" for name in "kqv"]
        wanted[f"blocks.{i}.between.weight"] = [f"blocks.{i}.gate.weight", f"blocks.{i}.up.weight"]
    assert taken == wanted
    assert residual_of(json.loads(json.dumps(residual._asdict()))) == residual


def test_folding_and_turning_keep_the_function(model: tuple[Module, Symmetry, Residual]) -> None:
    module, symmetry, residual = model
    tensors = weights(module)
    wanted = output(module, tensors)
    flat = folded(tensors, residual, symmetry)
    assert all((flat[norm.scale] == 1).all() for norm in residual.norms)
    assert torch.allclose(output(module, flat), wanted, rtol=0, atol=1e-5)
    turned = rotated(flat, residual, symmetry, turn(2))
    assert torch.allclose(output(module, turned), wanted, rtol=0, atol=1e-5)
    assert np.abs(turned["head.weight"] - flat["head.weight"]).max() > 0.1
    unfolded = {**turned, **{norm.scale: tensors[norm.scale] for norm in residual.norms}}
    assert (output(module, unfolded) - wanted).abs().max() > 0.01


@pytest.mark.parametrize("everything", [False, True])
def test_a_planted_turn_is_found(model: tuple[Module, Symmetry, Residual], everything: bool) -> None:
    module, symmetry, residual = model
    flat = folded(weights(module), residual, symmetry)
    q = turn(3)
    turned = rotated(flat, residual, symmetry, q)
    back = align_residual(residual, symmetry, flat, turned, everything=everything)
    assert np.allclose(back, q.T, rtol=0, atol=1e-9)
    again = rotated(turned, residual, symmetry, back)
    assert all(np.allclose(again[name], flat[name], rtol=0, atol=1e-9) for name in flat)


def test_of_two_networks_no_other_turn_brings_them_nearer(model: tuple[Module, Symmetry, Residual]) -> None:
    module, symmetry, residual = model
    torch.manual_seed(9)
    one = folded(weights(module), residual, symmetry)
    other = folded(weights(Transformer(type(module.last))), residual, symmetry)  # type: ignore[arg-type]

    def far(q: Wide) -> float:
        turned = rotated(other, residual, symmetry, q)
        return sum(float(((turned[name] - one[name]) ** 2).sum()) for name in one)

    best = align_residual(residual, symmetry, one, other, everything=True)
    near = far(best)
    assert near < far(np.eye(WIDTH))
    for seed in range(5):
        skew = np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)) * 0.05
        step = np.linalg.qr(np.eye(WIDTH) + skew - skew.T)[0]
        assert near <= far(step * np.sign(np.diag(step)) @ best) + 1e-9


@pytest.mark.parametrize("module", [Transformer(LayerNorm), Transformer(RMSNorm, tied=True)], ids=["layer", "tied"])
def test_a_mean_that_is_taken_away_or_a_tied_embedding_forbids_it(module: Module) -> None:
    assert found(module)[1] == []


class Bent(Module):
    """A residual stream that meets a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = Linear(4, WIDTH), RMSNorm(WIDTH), Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.b(self.norm(torch.relu(self.a(x))))
        return out


def test_a_nonlinearity_forbids_it() -> None:
    exported = torch.export.export(Bent().eval(), (torch.zeros(2, 4),))
    symmetry = derived(exported).symmetry
    assert len(symmetry.groups) == 1
    assert residuals(exported, symmetry) == []


def test_what_cannot_be_done_is_a_sentence(model: tuple[Module, Symmetry, Residual]) -> None:
    module, symmetry, residual = model
    tensors = weights(module)
    flat = folded(tensors, residual, symmetry)
    with pytest.raises(MismatchError, match="fold the norms first"):
        rotated(tensors, residual, symmetry, turn(1))
    with pytest.raises(MismatchError, match="fold the norms first"):
        align_residual(residual, symmetry, tensors, flat)
    for q in (2 * turn(1), turn(1, 4)):
        with pytest.raises(MismatchError, match="orthogonal matrix"):
            rotated(flat, residual, symmetry, q)
    blind = {
        name: np.zeros_like(x) if name in ("words.weight", "head.weight", "places") else x for name, x in flat.items()
    }
    with pytest.raises(NeedsError, match="fewer than the 8 directions"):
        align_residual(residual, symmetry, blind, blind)

"""Transformers brought together: what was hidden by turns and orders is found, and what a network computes is kept."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import LayerNorm, Linear, Module, RMSNorm

from crdtmerge.errors import MismatchError, NeedsError
from crdtmerge.strategies.streams import Freedom, brought, by_features, freedom
from crdtmerge.symmetry.heads import rotated_width
from crdtmerge.symmetry.orthogonal import rotated
from tests.symmetry.test_heads import _placed
from tests.symmetry.test_orthogonal import IDS, INNER, WIDTH, Block, Transformer, output, turn, weights

Wide = NDArray[np.float64]


@pytest.fixture(scope="module")
def model() -> tuple[Module, Freedom]:
    torch.manual_seed(1)
    module = Transformer()
    return module, freedom(torch.export.export(module.eval(), (IDS,)))


def hidden(tensors: dict[str, Wide], free: Freedom, seed: int) -> dict[str, Wide]:
    """A copy that computes the same: folded, its stream and heads turned, all else reordered."""
    rng = np.random.default_rng(seed)
    found = free.folded(tensors)
    for one in free.residuals:
        found = rotated(found, one, free.symmetry, turn(seed, free.symmetry.groups[one.group].size))
    for width in free.widths:
        heads = free.symmetry.groups[width.heads].size if width.heads is not None else 1
        size = free.symmetry.groups[width.group].size
        found = rotated_width(found, width, free.symmetry, np.stack([turn(seed + h, size) for h in range(heads)]))
    orders = [rng.permutation(group.size) for group in free.symmetry.groups]
    for one in free.residuals:
        orders[one.group] = np.arange(len(orders[one.group]))
    return {name: free.symmetry.turned(name, x, orders) for name, x in found.items()}


def features(module: Module, tensors: dict[str, Wide], free: Freedom) -> dict[int, Wide]:
    """Residual values before the last norm, and what hidden units of the first block give."""
    assert isinstance(module, Transformer)
    block = module.blocks[0]
    assert isinstance(block, Block)
    seen: dict[int, Wide] = {}

    def keep(group: int, part: Module) -> torch.utils.hooks.RemovableHandle:
        def look(_: Module, given: tuple[Tensor, ...]) -> None:
            seen[group] = given[0].flatten(0, 1).T.double().numpy()

        return part.register_forward_pre_hook(look)

    (inner,) = (group for at, group in free.symmetry.of_tensor["blocks.0.down.weight"] if at == 1)
    handles = [keep(free.residuals[0].group, module.last), keep(inner, block.down)]
    output(module, tensors)
    for handle in handles:
        handle.remove()
    return seen


def test_what_a_transformer_does_not_notice(model: tuple[Module, Freedom]) -> None:
    _, free = model
    assert [free.symmetry.groups[one.group].size for one in free.residuals] == [WIDTH]
    assert len(free.widths) == 4
    assert sorted(one.left for one in free.widths) == [
        (f"blocks.{i}.{name}.weight",) for i in range(2) for name in "qv"
    ]


@pytest.mark.parametrize("seen", [False, True], ids=["weights", "features"])
def test_what_was_hidden_is_found(model: tuple[Module, Freedom], seen: bool) -> None:
    module, free = model
    tensors = weights(module)
    copy = hidden(tensors, free, 5)
    assert torch.allclose(output(module, copy), output(module, tensors), rtol=0, atol=1e-5)
    given = None
    if seen:
        ours, theirs = (features(module, one, free) for one in (tensors, copy))
        given = {group: (x, theirs[group]) for group, x in ours.items()}
    wanted, found = free.folded(tensors), brought(tensors, copy, free, given)
    atol = 1e-4 if seen else 1e-9  # features are of float32
    assert all(np.allclose(found[name], x, rtol=0, atol=atol) for name, x in wanted.items())
    middle = {name: (found[name] + x) / 2 for name, x in wanted.items()}
    assert torch.allclose(output(module, middle), output(module, tensors), rtol=0, atol=1e-3 if seen else 1e-5)
    plain = {name: (copy[name] + x) / 2 for name, x in wanted.items()}
    assert (output(module, plain) - output(module, tensors)).abs().max() > 0.1


def test_another_network_computes_what_it_did(model: tuple[Module, Freedom]) -> None:
    module, free = model
    torch.manual_seed(7)
    one, other = weights(module), weights(Transformer())
    ours, theirs = (features(module, x, free) for x in (one, other))
    for given in (None, {group: (x, theirs[group]) for group, x in ours.items()}):
        found = brought(one, other, free, given)
        assert torch.allclose(output(module, found), output(module, other), rtol=0, atol=1e-5)
        again = brought(one, other, free, given)
        assert all((found[name] == x).all() for name, x in again.items())

        def far(tensors: dict[str, Wide]) -> float:
            return sum(float(((x - tensors[name]) ** 2).sum()) for name, x in free.folded(one).items())

        assert far(found) < far(free.folded(other))


def test_the_same_bits_everywhere(model: tuple[Module, Freedom]) -> None:
    module, free = model
    rng = np.random.default_rng(11)
    one, other = ({name: rng.standard_normal(x.shape) for name, x in weights(module).items()} for _ in range(2))
    sizes = {group: x.shape[0] for group, x in features(module, weights(module), free).items()}
    given = {group: (rng.standard_normal((n, 50)), rng.standard_normal((n, 50))) for group, n in sizes.items()}
    found = brought(one, other, free, given)
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(found[name]).tobytes() for name in sorted(found)))
    assert digest.hexdigest()[:16] == "3fb3c480692f2629"


class Rotary(Transformer):
    """The same, with positions that turn queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            assert isinstance(block, Block)
            block.q, block.k = (torch.nn.Sequential(part, Turned()) for part in (block.q, block.k))  # type: ignore[assignment]


class Turned(Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.reshape(*x.shape[:2], 2, -1).transpose(1, 2)
        return _placed(heads).transpose(1, 2).reshape(x.shape)


def test_rotary_queries_and_keys_are_matched_as_they_are() -> None:
    torch.manual_seed(2)
    module = Rotary()
    free = freedom(torch.export.export(module.eval(), (IDS,)))
    assert [one.left for one in free.widths] == [(f"blocks.{i}.v.weight",) for i in range(2)]
    tensors = weights(module)
    copy = hidden(tensors, free, 3)
    assert torch.allclose(output(module, copy), output(module, tensors), rtol=0, atol=1e-5)
    found = brought(tensors, copy, free)
    assert all(np.allclose(found[name], x, rtol=0, atol=1e-9) for name, x in free.folded(tensors).items())


PERCEPTRON = torch.nn.Sequential(Linear(5, 4), torch.nn.ReLU(), Linear(4, 2))


@pytest.mark.parametrize(
    "module",
    [Transformer(LayerNorm), Transformer(RMSNorm, tied=True), PERCEPTRON],
    ids=["layer", "tied", "perceptron"],
)
def test_without_a_stream_that_may_be_turned_it_is_refused(module: Module) -> None:
    example = IDS if isinstance(module, Transformer) else torch.zeros(2, 5)
    with pytest.raises(NeedsError, match="RMS norms and untied embeddings"):
        freedom(torch.export.export(module.eval(), (example,)))


def test_features_and_models_of_other_shapes_are_a_sentence(model: tuple[Module, Freedom]) -> None:
    module, free = model
    tensors = weights(module)
    (stream,) = free.residuals
    for x, y in (((WIDTH, 9), (WIDTH, 8)), ((WIDTH + 1, 9), (WIDTH + 1, 9)), ((WIDTH,), (WIDTH,))):
        with pytest.raises(MismatchError, match="of the same samples"):
            brought(tensors, tensors, free, {stream.group: (np.ones(x), np.ones(y))})
    with pytest.raises(NeedsError, match="features of more tokens"):
        brought(tensors, tensors, free, {stream.group: (np.ones((WIDTH, 9)), np.ones((WIDTH, 9)))})
    narrow = {**tensors, "blocks.0.up.weight": tensors["blocks.0.up.weight"][: INNER - 1]}
    with pytest.raises(MismatchError, match=r"blocks\.0\.up\.weight"):
        brought(tensors, narrow, free)


def test_constant_units_correlate_with_none() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((5, 40))
    x[2] = 0.1 + 0.2
    p = rng.permutation(5)
    assert (p[by_features(x, 2.0 * x[p] + 1.0, 5)] == np.arange(5)).all()

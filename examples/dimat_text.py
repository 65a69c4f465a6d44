"""Two transformers that were trained apart on a text, on the straight line between them: as they are, and aligned.

    python examples/dimat_text.py [--seeds N] [--steps N] [--json]

The text is that of Python's own help (``pydoc_data.topics``), byte by byte. A network has two layers of attention and
of hidden units on a residual stream with RMS norms. Of each seed two networks start and see batches apart.

plain          the two as they are
permutations   the second one's units, heads and residual channels reordered by weights (``match_to``)
orthogonal     its residual stream and heads turned as well, by what both do on the text (``streams.brought``)

barrier = max over t of  loss((1 - t) a + t b) - ((1 - t) loss(a) + t loss(b)),  mean cross entropy of the last tenth
of the text, which nobody trained on, in nats a byte.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from crdtmerge.strategies.matching import match_to
from crdtmerge.strategies.streams import Freedom, brought, freedom
from crdtmerge.testing import plots

CONTEXT, BATCH, WIDTH, HEADS, HIDDEN, LAYERS = 32, 32, 64, 4, 256, 2
RATE, DECAY, STEPS = 3e-3, 0.1, 800

TESTED, WATCHED = 384, 128
"""Stretches of the text that losses are measured on, and that both networks are compared by."""

BETWEEN = np.linspace(0, 1, 6)

State = dict[str, Tensor]


class Text(NamedTuple):
    """A text as numbers below ``words``, the first nine tenths to train on."""

    train: Tensor
    test: Tensor
    words: int


def text() -> Text:
    """Python's help, sorted by topic."""
    from pydoc_data.topics import topics

    given = "".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    alphabet, numbers = np.unique(np.frombuffer(given, np.uint8), return_inverse=True)
    data = torch.from_numpy(numbers.astype(np.int64))
    cut = len(data) * 9 // 10
    return Text(data[:cut], data[cut:], len(alphabet))


def batch(source: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Stretches of a text, and the same a byte later."""
    starts = torch.randint(len(source) - CONTEXT, (size,), generator=generator)
    rows = source[starts[:, None] + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


class Attention(nn.Module):
    """Causal attention without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], HEADS, -1).transpose(1, 2)

        seen = functional.scaled_dot_product_attention(
            heads(self.q(x)), heads(self.k(x)), heads(self.v(x)), is_causal=True
        )
        out: Tensor = self.o(seen.transpose(1, 2).reshape(x.shape))
        return out


class Block(nn.Module):
    """Attention, then hidden units, each added to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.attention = nn.RMSNorm(WIDTH, eps=1e-5), Attention()
        self.between = nn.RMSNorm(WIDTH, eps=1e-5)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        out: Tensor = x + self.down(functional.gelu(self.up(self.between(x))))
        return out


class Transformer(nn.Module):
    """Says how likely each byte is to come next."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.last, self.head = nn.RMSNorm(WIDTH, eps=1e-5), nn.Linear(WIDTH, words, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.last(x))
        return out


def entropy(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross entropy of a batch."""
    return functional.cross_entropy(module(x).flatten(0, 1), y.flatten())


def trained(data: Text, seed: int, steps: int) -> State:
    """A network from a start of its own, after so many batches of its own."""
    torch.manual_seed(seed)
    module, generator = Transformer(data.words), torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, total_steps=steps)
    for _ in range(steps):
        adam.zero_grad()
        torch.autograd.backward(entropy(module, *batch(data.train, BATCH, generator)))
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adam.step()
        schedule.step()
    return {name: x.detach().clone() for name, x in module.state_dict().items()}


class Bench:
    """A text, a network of the architecture, and what that does not notice."""

    def __init__(self) -> None:
        self.data = text()
        self.module = Transformer(self.data.words).eval()
        self.tested = batch(self.data.test, TESTED, torch.Generator().manual_seed(1))
        self.watched, _ = batch(self.data.train, WATCHED, torch.Generator().manual_seed(2))
        self.free: Freedom = freedom(torch.export.export(self.module, (self.watched[:2],)))

    def loss(self, state: Mapping[str, Tensor]) -> float:
        """On the bytes that nobody trained on."""
        self.module.load_state_dict(state)
        with torch.no_grad():
            return float(entropy(self.module, *self.tested))

    def line(self, a: State, b: State) -> list[float]:
        """Losses from one network to another."""
        return [self.loss({name: (1 - t) * a[name] + t * b[name] for name in a}) for t in BETWEEN.tolist()]

    def features(self, state: State) -> dict[int, np.ndarray[Any, np.dtype[np.float64]]]:
        """Residual values before each block and the head, and what hidden units give: [units, samples] by group."""
        seen: dict[int, list[Tensor]] = {}
        (stream,) = self.free.residuals
        watching: list[tuple[int, Any]] = [(stream.group, self.module.last)]
        for i, block in enumerate(self.module.blocks):
            (hidden,) = (g for at, g in self.free.symmetry.of_tensor[f"blocks.{i}.down.weight"] if at == 1)
            watching += [(stream.group, block.before), (hidden, block.down)]

        def keep(group: int) -> Any:
            return lambda _, given: seen.setdefault(group, []).append(given[0].flatten(0, 1).T.double())

        handles = [part.register_forward_pre_hook(keep(group)) for group, part in watching]
        self.module.load_state_dict(state)
        with torch.no_grad():
            self.module(self.watched)
        for handle in handles:
            handle.remove()
        return {group: torch.cat(columns, dim=1).numpy() for group, columns in seen.items()}

    def lines(self, a: State, b: State) -> dict[str, list[float]]:
        """Losses between two networks: plain, permutations, orthogonal."""
        symmetry = self.free.symmetry
        one, other = ({name: x.double().numpy() for name, x in state.items()} for state in (a, b))
        order = match_to(symmetry, one, other)
        ours, theirs = self.features(a), self.features(b)
        turned = brought(one, other, self.free, {group: (x, theirs[group]) for group, x in ours.items()})
        return {
            "plain": self.line(a, b),
            "permutations": self.line(a, {name: symmetry.turned(name, x, order) for name, x in b.items()}),
            "orthogonal": self.line(_state(self.free.folded(one)), _state(turned)),
        }


def _state(tensors: Mapping[str, Any]) -> State:
    """Weights as networks load them."""
    return {name: torch.from_numpy(x).float() for name, x in tensors.items()}


def barrier(losses: list[float]) -> float:
    """How far a line of losses lies above the chord between its ends, at most."""
    chord = [(1 - t) * losses[0] + t * losses[-1] for t in BETWEEN.tolist()]
    return float(max(loss - straight for loss, straight in zip(losses, chord, strict=True)))


def experiments(seeds: int, steps: int) -> Iterator[dict[str, list[float]]]:
    """Lines of each seed."""
    bench = Bench()
    for seed in range(seeds):
        a, b = (trained(bench.data, 100 * seed + i, steps) for i in range(2))
        yield bench.lines(a, b)


def main() -> None:
    """Train, align, and say how high the barriers are."""
    parser = argparse.ArgumentParser(description="Align transformers that were trained apart on a text.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"batches a network ({STEPS})")
    parser.add_argument("--json", action="store_true", help="one JSON document of the means over seeds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, list[float]]] = []
    for seed, lines in enumerate(experiments(arguments.seeds, arguments.steps)):
        found.append(lines)
        ends = lines["plain"][0], lines["plain"][-1]
        print(f"seed {seed}: ends {ends[0]:.3f} {ends[1]:.3f}  {_words(_row([lines]))}", file=sys.stderr, flush=True)
    row = _row(found)
    if arguments.json:
        print(json.dumps({"A10": {name: round(value, 4) for name, value in row.items()}}, indent=2))
        return
    series = {
        name: [statistics.mean(values) for values in zip(*(lines[name] for lines in found), strict=True)]
        for name in found[0]
    }
    print(plots.text(plots.Panel("test loss between two networks, mean", "t", BETWEEN.tolist(), series)))
    print(f"A10  {_words(row)}")


def _row(found: list[dict[str, list[float]]]) -> dict[str, float]:
    """Mean losses of the ends, mean barriers, and how much of the plain one alignment leaves."""
    row = {"ends": statistics.mean(lines["plain"][at] for lines in found for at in (0, -1))}
    row |= {name: statistics.mean(barrier(lines[name]) for lines in found) for name in found[0]}
    return row | {
        "permutations_ratio": row["permutations"] / row["plain"],
        "ratio": row["orthogonal"] / row["plain"],
    }


def _words(row: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in row.items())


if __name__ == "__main__":
    main()

"""Networks that were trained apart on handwritten digits, brought together: once, and again and again as they train on.

    python examples/dimat_digits.py [--seeds N] [--only A1,A2] [--json] [--table]

A1  two and five networks that saw all images, from different starts: plain averages, and of aligned networks
A2  five peers on a ring, equal shares of the images: merge, train two epochs, ten times over; then merge all once
A3  the same with unequal shares (Dirichlet 0.5)                A4  ten peers, unequal shares
A5  matched by what units do on the images, and on noise        A9  small networks of convolutions with normalisation

Every loop is of ``crdtmerge.train`` peers, each with a pool of its own; who is aligned was aligned before the first
merge. Accuracy is on 450 images of all classes that nobody trained on, in percent, the mean over peers and seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import crdtmerge as cm
from crdtmerge import train
from crdtmerge.symmetry import permutation_groups
from crdtmerge.testing import agents, programs
from crdtmerge.testing.digits import Digits
from crdtmerge.train.rounds import spread

State = dict[str, torch.Tensor]
Module = torch.nn.Module
Make = Callable[[int], Module]

BATCH, RATE, WIDTH = 32, 1e-3, 64
BEFORE, EPOCHS, ROUNDS = 50, 2, 10
"""Epochs before the first merge, epochs between two merges, merges."""

PROBED = 256
"""Images that units are matched on."""


def trainer(module: Module, x: torch.Tensor, y: torch.Tensor, epochs: int, seed: int) -> train.TorchTrainer:
    """Adam, made anew for each round, on shuffled batches."""
    batches = train.shuffled([x, y], BATCH, epochs=epochs, seed=seed)
    return train.TorchTrainer(module, partial(torch.optim.Adam, lr=RATE), batches, examples=len(y))


def accuracy(module: Module, state: Mapping[str, torch.Tensor], data: Digits) -> float:
    """Percent of the test images that a model names rightly."""
    module.load_state_dict({**module.state_dict(), **state})
    module.eval()
    with torch.no_grad():
        return 100 * float((module(data.test_x).argmax(1) == data.test_y).float().mean())


def loss(module: Module, state: Mapping[str, torch.Tensor], data: Digits) -> float:
    """The mean cross entropy on the training images."""
    module.load_state_dict({**module.state_dict(), **state})
    module.eval()
    with torch.no_grad():
        return float(cross_entropy(module(data.train_x), data.train_y))


def units(module: Module, x: torch.Tensor) -> Callable[[Mapping[str, torch.Tensor]], list[Any]]:
    """What the units of each hidden layer give out, after its ReLU: float64 [units, samples] each."""

    def watch(state: Mapping[str, torch.Tensor]) -> list[Any]:
        module.load_state_dict({**module.state_dict(), **state})
        module.eval()
        found, z = [], x
        with torch.no_grad():
            for layer in module.children():
                z = layer(z)
                if isinstance(layer, torch.nn.ReLU):
                    found.append(z.transpose(0, 1).flatten(1).double().numpy())
        return found

    return watch


# ---------------------------------------------------------------- A1: one merge of networks that saw the same


def one_merge(seed: int, width: int = 128, epochs: int = 60) -> dict[str, float]:
    """Averages of networks from different starts, plain and aligned, and the barrier between two of them."""
    data = agents.load(seed)
    module = agents.perceptron(width, 0)
    models = [_trained(agents.perceptron(width, 100 * seed + i), data, epochs, 100 * seed + i) for i in range(5)]
    first, second = models[:2]
    symmetry = permutation_groups(module, (data.train_x[:2],))
    by_units = train.Alignment(symmetry, watch=units(module, data.train_x))
    turned = by_units.turned(second, by_units.onto(first, second))
    with tempfile.TemporaryDirectory(prefix="crdtmerge-dimat-") as folder:
        files = {"symmetry": "symmetry.json", "program": "model.pt2", "data": "data.safetensors"}
        inputs = {name: Path(folder) / file for name, file in files.items()}
        inputs["symmetry"].write_bytes(symmetry.encode())
        programs.export(module, [data.train_x[:2]], inputs["program"])
        programs.write({"inputs": data.train_x}, inputs["data"])

        def merged(count: int, strategy: str, **params: Any) -> float:
            needed = {"weight_average": (), "rebasin": ("symmetry",), "dimat": tuple(inputs)}[strategy]
            asked = {name: inputs[name] for name in needed}
            return accuracy(module, cm.merge(models[:count], strategy=strategy, inputs=asked, **params), data)

        return {
            "ends": statistics.mean(accuracy(module, model, data) for model in models),
            "plain": merged(2, "weight_average"),
            "activation": merged(2, "dimat"),
            "weight": merged(2, "rebasin"),
            "barrier_ratio": barrier(module, first, turned, data) / barrier(module, first, second, data),
            "five_plain": merged(5, "weight_average"),
            "five_aligned": merged(5, "dimat"),
        }


def _trained(module: Module, data: Digits, epochs: int, seed: int) -> State:
    return dict(trainer(module, data.train_x, data.train_y, epochs, seed)(module.state_dict(), 0))


def barrier(module: Module, a: State, b: State, data: Digits) -> float:
    """max over t of  loss((1 - t) a + t b) - ((1 - t) loss(a) + t loss(b)),  t = 0, 0.1, ..., 1."""
    ends = loss(module, a, data), loss(module, b, data)
    found = []
    for t in np.linspace(0, 1, 11):
        between = {name: (1 - t) * a[name] + t * b[name] for name in a}
        found.append(loss(module, between, data) - ((1 - t) * ends[0] + t * ends[1]))
    return float(max(found))


# ---------------------------------------------------------------- loops: merge and train


@dataclass(frozen=True)
class Ground:
    """What all loops of a seed start from: peers with shares of the images, trained apart."""

    data: Digits
    shares: tuple[Any, ...]
    starts: tuple[State, ...]
    make: Make
    seed: int

    def score(self, state: Mapping[str, torch.Tensor]) -> float:
        """The accuracy of a model."""
        return accuracy(self.make(0), state, self.data)

    def local(self, i: int, epochs: int = EPOCHS) -> train.TorchTrainer:
        """What peer i trains with."""
        share = self.shares[i]
        x, y = self.data.train_x[share], self.data.train_y[share]
        return trainer(self.make(1000 * self.seed + i), x, y, epochs, 7919 * self.seed + i)


@dataclass(frozen=True)
class Run:
    """Accuracy after each merge, after the last training, and of one final merge; bytes sent to each neighbour."""

    after: list[float]
    trained: float
    final: float
    sent: int


@cache
def ground(seed: int, count: int, split: str, convolutional: bool = False) -> Ground:
    """Peers on a ring. ``split`` is alike, unlike or apart."""
    data = agents.load(seed)
    deal = {"alike": agents.alike, "unlike": agents.unlike, "apart": agents.apart}[split]
    shares = deal(data.train_y.numpy(), count, np.random.default_rng(seed))
    make: Make = agents.convolutions if convolutional else partial(agents.perceptron, WIDTH)
    here = Ground(data, tuple(shares), (), make, seed)
    before = [here.local(i, BEFORE) for i in range(count)]
    return replace(here, starts=tuple(dict(one(one.module.state_dict(), 0)) for one in before))


def loop(
    here: Ground, alignment: train.Alignment | None = None, *, repair: bool, alone: bool = False, rounds: int = ROUNDS
) -> Run:
    """Merge with the neighbours and train on, ``rounds`` times; at the end one merge of all, counted by examples."""
    graph = train.ring(len(here.starts))
    pools = [train.InMemory(cm.MergeState("weight_average")) for _ in here.starts]
    rule = train.oneself if alone else train.neighbours(graph.metropolis(), [pool.author for pool in pools])
    peers = []
    for i, (pool, start) in enumerate(zip(pools, here.starts, strict=True)):
        mend = train.Repairer(here.make(0), here.data.train_x[here.shares[i]]) if repair else None
        peers.append(train.Peer(pool, start, here.local(i), rule=rule, alignment=alignment, repair=mend))
    rows = train.together(peers, graph, rounds, here.score)
    spread(peers)
    for peer in peers:
        peer.weighing = train.Weighing(examples=1)
    finals = [peer.final_merge() for peer in peers]
    assert len({one.receipt.output_digest for one in finals}) == 1, "equal sets give equal bytes"
    after = [row.mean_merged for row in rows]
    return Run(after, rows[-1].mean_trained, here.score(finals[0]), rows[-1].sent)


def gossip(here: Ground) -> Run:
    """Averages of neighbours after every step, as CDSGD does."""
    mixing = train.ring(len(here.starts)).metropolis()
    local = [here.local(i) for i in range(len(here.starts))]
    rows = train.every_step(local, here.starts, mixing, ROUNDS, here.score)
    return Run([row.mean_merged for row in rows], rows[-1].mean_trained, rows[-1].united, rows[-1].sent)


def by_weights(here: Ground) -> train.Alignment:
    """All matched together by their weights, once."""
    return train.Alignment(permutation_groups(here.make(0), (here.data.train_x[:2],)))


def by_activations(here: Ground, x: torch.Tensor, **how: Any) -> train.Alignment:
    """Matched by what units do on some images."""
    module = here.make(0)
    return train.Alignment(permutation_groups(module, (here.data.train_x[:2],)), watch=units(module, x), **how)


def ring_of_five(seed: int) -> dict[str, float]:
    """A2."""
    here = ground(seed, 5, "alike")
    found = loop(here, by_weights(here), repair=True)
    plain, local = loop(here, repair=False, rounds=1), loop(here, repair=False, alone=True)
    return {
        "after1": found.after[0],
        "after10": found.after[-1],
        "local": local.trained,
        "final": found.final,
        "plain1": plain.after[0],
    }


def unequal_five(seed: int) -> dict[str, float]:
    """A3."""
    here = ground(seed, 5, "unlike")
    found, local = loop(here, by_weights(here), repair=True), loop(here, repair=False, alone=True)
    return {"after10": found.after[-1], "final": found.final, "local": local.trained}


def unequal_ten(seed: int) -> dict[str, float]:
    """A4."""
    here = ground(seed, 10, "unlike")
    found = loop(here, by_weights(here), repair=True)
    return {
        "after10": found.after[-1],
        "final": found.final,
        "plain10": loop(here, repair=False).after[-1],
        "plain_repair10": loop(here, repair=True).after[-1],
    }


def probes(seed: int) -> dict[str, float]:
    """A5."""
    here = ground(seed, 5, "alike")
    noise = torch.randn(PROBED, 64, generator=torch.Generator().manual_seed(5))
    return {
        name: loop(here, by_activations(here, x), repair=True).after[-1]
        for name, x in (("data", here.data.train_x[:PROBED]), ("noise", noise))
    }


def convolutions(seed: int) -> dict[str, float]:
    """A9: batch normalisation is reset in both."""
    here = ground(seed, 5, "alike", convolutional=True)
    return {
        "aligned1": loop(here, by_activations(here, here.data.train_x[:PROBED]), repair=True, rounds=1).after[0],
        "plain1": loop(here, repair=True, rounds=1).after[0],
    }


EXPERIMENTS: dict[str, Callable[[int], dict[str, float]]] = {
    "A1": one_merge,
    "A2": ring_of_five,
    "A3": unequal_five,
    "A4": unequal_ten,
    "A5": probes,
    "A9": convolutions,
}


# ---------------------------------------------------------------- A11: what methods are worth, and what they send

METHODS: dict[str, Callable[[Ground], Run]] = {
    "alone": lambda here: loop(here, repair=False, alone=True),
    "plain": lambda here: loop(here, repair=False),
    "plain, repaired": lambda here: loop(here, repair=True),
    "aligned once": lambda here: loop(here, by_weights(here), repair=False),
    "aligned once, repaired": lambda here: loop(here, by_weights(here), repair=True),
    "aligned at every merge (DIMAT)": lambda here: loop(
        here, by_activations(here, here.data.train_x[:PROBED], when="every"), repair=False
    ),
    "averages at every step (CDSGD)": gossip,
}

GROUNDS = ((5, "alike"), (5, "unlike"), (10, "unlike"), (5, "apart"))


def table(seeds: int) -> None:
    """Every method on every ground, as Markdown; means over seeds.

    The last column is what a peer sent to each neighbour, in kB, until the mean accuracy after a merge was what CDSGD
    ended with.
    """
    for count, split in GROUNDS:
        runs = {name: [run(ground(seed, count, split)) for seed in range(seeds)] for name, run in METHODS.items()}
        curves = {
            name: [statistics.mean(at) for at in zip(*(one.after for one in own), strict=True)]
            for name, own in runs.items()
        }
        goal = curves["averages at every step (CDSGD)"][-1]
        print(f"\n{count} peers on a ring, shares {split}\n")
        print("| method | after 1 merge | 5 | 10 | trained on | one merge of all | kB to a neighbour | until CDSGD's |")
        print("|---|---|---|---|---|---|---|---|")
        for name, own in runs.items():
            curve, sent = curves[name], own[0].sent / 1000
            reached = next((i + 1 for i, value in enumerate(curve) if value >= goal), None)
            until = "never" if reached is None or not sent else f"{sent * reached / ROUNDS:,.0f}"
            ends = [statistics.mean(getattr(one, what) for one in own) for what in ("trained", "final")]
            cells = [f"{value:.1f}" for value in (curve[0], curve[4], curve[9], *ends)]
            print(f"| {name} | {' | '.join(cells)} | {sent:,.0f} | {until} |", flush=True)


def main() -> None:
    """Run the experiments that are asked for."""
    parser = argparse.ArgumentParser(description="Merge networks that were trained apart on handwritten digits.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="some of A1,A2,A3,A4,A5,A9")
    parser.add_argument("--json", action="store_true", help="one JSON document of the means over seeds")
    parser.add_argument("--table", action="store_true", help="every method on every ground instead, as Markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.table:
        table(arguments.seeds)
        return
    found: dict[str, dict[str, float]] = {}
    for name in arguments.only.split(","):
        rows = []
        for seed in range(arguments.seeds):
            rows.append(EXPERIMENTS[name](seed))
            print(f"{name}, seed {seed}: {_words(rows[-1])}", file=sys.stderr, flush=True)
        found[name] = {key: round(statistics.mean(row[key] for row in rows), 3) for key in rows[0]}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name, row in found.items():
        print(f"{name}  {_words(row)}")


def _words(row: Mapping[str, float]) -> str:
    return "  ".join(f"{key} {value:.3f}" if "ratio" in key else f"{key} {value:.1f}" for key, value in row.items())


if __name__ == "__main__":
    main()

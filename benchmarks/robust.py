"""Merge-and-train with liars among the contributors: accuracy of every robust rule under every attack, on real digits.

RULES
- Eleven nodes, three of them liars. The eight honest ones start from one network, hold disjoint shares of the training
  images and train two epochs on them (Adam, batches of 32). All contributions are merged with ``crdtmerge.merge``, and
  everyone goes on from there.
- Liars know what the honest contribute. Their contents differ in the last digits: equal contents would count once.
- Each rule is told of three liars; without any it runs with its default, the most that eight contributions allow.
- Accuracy is that of the merged model after the last round, on images nobody trained on, as a mean over seeds.
- ``iid`` deals images at random; ``dirichlet`` gives every class to the nodes in shares drawn from Dirichlet(1).

Example: python -m benchmarks.robust --rule mean --rule nna --attack sign_flip --seeds 1
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import crdtmerge as cm
from crdtmerge.testing import digits

NODES, LIARS = 11, 3
HONEST = NODES - LIARS
ROUNDS, EPOCHS, BATCH, RATE = 10, 2, 32, 2e-3
NOISE = 1e-6

StateDict = dict[str, Any]
Tensor = torch.Tensor
Attack = Callable[[Tensor], Tensor]
"""From the values of all honest contributions, [honest, ...], to what the liars say instead."""

SPREAD = statistics.NormalDist().inv_cdf((HONEST - (NODES // 2 + 1 - LIARS)) / HONEST)
"""The standard deviations by which ``a little is enough`` may move while a majority still looks further out."""

ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "sign_flip": lambda xs: -xs.mean(dim=0),
    "fall_of_empires": lambda xs: -2.0 * xs.mean(dim=0),
    "inner_product": lambda xs: -0.1 * xs.mean(dim=0),
    "little_is_enough": lambda xs: xs.mean(dim=0) - SPREAD * xs.std(dim=0),
    "mimic": lambda xs: xs[0],
}

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("weight_average", {}),
    "nna": ("nna", {"byzantine": LIARS}),
    "median": ("median", {"byzantine": LIARS}),
    "trimmed_mean": ("trimmed_mean", {"byzantine": LIARS}),
    "meamed": ("meamed", {"byzantine": LIARS}),
    "krum": ("krum", {"byzantine": LIARS}),
    "multi_krum": ("multi_krum", {"byzantine": LIARS}),
    "mda": ("mda", {"byzantine": LIARS}),
    "geometric_median": ("geometric_median", {"byzantine": LIARS}),
    "centered_clip": ("centered_clip", {"byzantine": LIARS}),
    "nnm+trimmed_mean": ("trimmed_mean", {"byzantine": LIARS, "before": "nnm"}),
    "nnm+median": ("median", {"byzantine": LIARS, "before": "nnm"}),
    "nnm+krum": ("krum", {"byzantine": LIARS, "before": "nnm"}),
}


def lies(honest: Sequence[StateDict], attack: Attack, seed: int) -> list[StateDict]:
    """What the liars contribute."""
    said = {name: attack(torch.stack([one[name] for one in honest])) for name in honest[0]}
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: x + NOISE * torch.randn(x.shape, generator=generator) for name, x in said.items()} for _ in range(LIARS)
    ]


def shares(labels: NDArray[np.int64], split: str, seed: int) -> list[Tensor]:
    """The training images of each honest node."""
    generator = np.random.default_rng(seed)
    if split == "iid":
        dealt = np.array_split(generator.permutation(len(labels)), HONEST)
    else:
        parts: list[list[NDArray[np.int64]]] = [[] for _ in range(HONEST)]
        for digit in range(digits.CLASSES):
            of_class = generator.permutation(np.flatnonzero(labels == digit))
            cuts = (np.cumsum(generator.dirichlet(np.ones(HONEST)))[:-1] * len(of_class)).astype(np.int64)
            for part, piece in zip(parts, np.split(of_class, cuts), strict=True):
                part.append(piece)
        dealt = [np.concatenate(part) for part in parts]
    return [torch.from_numpy(one) for one in dealt]


def trained(start: StateDict, x: Tensor, y: Tensor, seed: int) -> StateDict:
    """A node's own epochs, from a start."""
    model = digits.network()
    model.load_state_dict(start)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        order = torch.randperm(len(y), generator=shuffle)
        for at in range(0, len(y), BATCH):
            batch = order[at : at + BATCH]
            optimiser.zero_grad()
            loss: Any = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimiser.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def accuracy(
    data: digits.Digits, rule: str | None, attack: str, *, split: str = "iid", seed: int = 0, rounds: int = ROUNDS
) -> float:
    """Accuracy after all rounds, in per cent; without a rule, the mean over nodes that never merge."""
    seen = shares(data.train_y.numpy(), split, seed)
    models: list[StateDict] = [digits.network().state_dict()] * HONEST
    for number in range(rounds):
        honest = [
            trained(model, data.train_x[own], data.train_y[own], 1000 * seed + 10 * number + node)
            for node, (model, own) in enumerate(zip(models, seen, strict=True))
        ]
        models = honest if rule is None else [merged(honest, rule, attack, number)] * HONEST
    reached = [digits.accuracy(model, data.test_x, data.test_y) for model in (models if rule is None else models[:1])]
    return 100.0 * statistics.fmean(reached)


def merged(honest: Sequence[StateDict], rule: str, attack: str, seed: int) -> StateDict:
    """What all nodes go on from."""
    lie = ATTACKS[attack]
    strategy, how = RULES[rule]
    if lie is None:
        return dict(cm.merge(honest, strategy=strategy, **{name: how[name] for name in how if name != "byzantine"}))
    return dict(cm.merge([*honest, *lies(honest, lie, seed)], strategy=strategy, **how))


def table(found: dict[str, dict[str, float]], rules: Sequence[str]) -> str:
    """Attacks as columns, rules as rows."""
    attacks = list(found)
    lines = [" | ".join(["| rule", *attacks]) + " |", "|---" * (len(attacks) + 1) + "|"]
    lines += [" | ".join([f"| {rule}", *(f"{found[attack][rule]:.1f}" for attack in attacks)]) + " |" for rule in rules]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", action="append", choices=RULES)
    parser.add_argument("--attack", action="append", choices=ATTACKS)
    parser.add_argument("--split", choices=["iid", "dirichlet"], default="iid")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rules, attacks = asked.rule or list(RULES), asked.attack or list(ATTACKS)
    torch.set_num_threads(1)
    data = digits.load()

    def mean(rule: str | None, attack: str) -> float:
        runs = [
            accuracy(data, rule, attack, split=asked.split, seed=seed, rounds=asked.rounds)
            for seed in range(asked.seeds)
        ]
        return statistics.fmean(runs)

    alone = mean(None, "none")
    found = {attack: {rule: mean(rule, attack) for rule in rules} for attack in attacks}
    if asked.json:
        print(json.dumps({"split": asked.split, "seeds": asked.seeds, "alone": alone, "accuracy": found}))
        return
    print(f"{asked.split}, {asked.seeds} seeds, {asked.rounds} rounds; without any merging {alone:.1f} %\n")
    print(table(found, rules))


if __name__ == "__main__":
    main()

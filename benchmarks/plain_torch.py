"""Merges checkpoints with plain torch, the way one writes it in an afternoon: load everything, loop, save.

It is the yardstick for what the arithmetic costs without our promises: no digests, no receipt, no portable bits. Sums
run in float32 and are rounded once to the dtype of the inputs. Needs torch and safetensors alone.

Example: python benchmarks/plain_torch.py ties --base .bench/mid/base --out OUT .bench/mid/ft1 .bench/mid/ft2
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

T = 0.5
LAMBDA = 0.5
TIES_DENSITY = 0.2
DARE_DENSITY = 0.5


def load(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def linear(models: list[Tensor], base: Tensor) -> Tensor:
    total = models[0].float()
    for model in models[1:]:
        total = total + model.float()
    return total / len(models)


def slerp(models: list[Tensor], base: Tensor) -> Tensor:
    first, second = (model.float() for model in models)
    cosine = (first.flatten() @ second.flatten()) / (first.norm() * second.norm())
    if abs(cosine) > 0.9995:
        return (1 - T) * first + T * second
    angle = torch.acos(cosine)
    return (torch.sin((1 - T) * angle) * first + torch.sin(T * angle) * second) / torch.sin(angle)


def task_arithmetic(models: list[Tensor], base: Tensor) -> Tensor:
    origin = base.float()
    total = torch.zeros_like(origin)
    for model in models:
        total += model.float() - origin
    return origin + LAMBDA * total


def ties(models: list[Tensor], base: Tensor) -> Tensor:
    origin = base.float()
    return origin + elect_and_average([trim(model.float() - origin) for model in models])


def dare_ties(models: list[Tensor], base: Tensor) -> Tensor:
    origin = base.float()
    return origin + elect_and_average([drop(model.float() - origin) for model in models])


def trim(delta: Tensor) -> Tensor:
    size = delta.abs()
    dropped = delta.numel() - int(TIES_DENSITY * delta.numel())
    return torch.where(size > size.flatten().kthvalue(dropped).values, delta, 0.0)


def drop(delta: Tensor) -> Tensor:
    return torch.where(torch.rand_like(delta) < DARE_DENSITY, delta / DARE_DENSITY, 0.0)


def elect_and_average(deltas: list[Tensor]) -> Tensor:
    stacked = torch.stack(deltas)
    sign = torch.where(stacked.sum(dim=0) >= 0, 1.0, -1.0)
    agree = torch.where(stacked.sign() == sign, stacked, 0.0)
    return agree.sum(dim=0) / (agree != 0).sum(dim=0).clamp(min=1)


Rule = Callable[[list[Tensor], Tensor], Tensor]
RULES: dict[str, Rule] = {rule.__name__: rule for rule in (linear, slerp, task_arithmetic, ties, dare_ties)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge checkpoints with plain torch.")
    parser.add_argument("strategy", choices=sorted(RULES))
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    models = [load(folder) for folder in arguments.models]
    base = load(arguments.base) if arguments.base else models[0]
    rule = RULES[arguments.strategy]
    merged = {name: rule([model[name] for model in models], row).to(row.dtype) for name, row in base.items()}
    arguments.out.mkdir(parents=True)
    save_file(merged, arguments.out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(arguments.models[0] / "config.json", arguments.out)


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.inference_mode():
        main()

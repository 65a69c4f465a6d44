"""Merges checkpoints with the published package crdt-merge, run by the Python of its own environment.

RULES
- Its public two-layer face is used as its documentation shows: one CRDTMergeState a tensor, add, resolve.
- That face takes no strategy parameters, so its defaults hold: ties density 0.2, task_arithmetic scale 1, dare_ties
  drop rate 0.9 with trim density 0.2. The work is of the same kind as ours, the numbers that come out are not.
- It takes arrays of numpy, which has no bf16: tensors are widened to float32 before and rounded to bf16 after.

Example: .peers/crdt-merge/bin/python benchmarks/published_run.py ties --base BASE --out OUT FT1 FT2
"""

from __future__ import annotations

import argparse
import importlib
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE = importlib.import_module("crdt_merge.model.crdt_state").CRDTMergeState  # not importable where mypy runs


def load(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def resolve(strategy: str, models: list[Tensor], base: Tensor | None) -> Tensor:
    state = STATE(strategy, base=None if base is None else base.float().numpy())
    for number, model in enumerate(models):
        state.add(model.float().numpy(), model_id=f"ft{number}")
    return torch.from_numpy(state.resolve()).to(models[0].dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge checkpoints with crdt-merge.")
    parser.add_argument("strategy")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    models = [load(folder) for folder in arguments.models]
    base = load(arguments.base) if arguments.base else {}
    merged = {
        name: resolve(arguments.strategy, [model[name] for model in models], base.get(name)) for name in models[0]
    }
    arguments.out.mkdir(parents=True)
    save_file(merged, arguments.out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(arguments.models[0] / "config.json", arguments.out)


if __name__ == "__main__":
    main()

"""Exported programs for tests: a small torch module as a .pt2 file, and data as safetensors."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crdtmerge.numerics.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


def export(module: Module, examples: Sequence[Tensor], path: Path) -> bytes:
    """Write a module in evaluation mode as a program that takes any number of examples; the file's SHA-256."""
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(module.eval(), tuple(examples), dynamic_shapes=tuple({0: batch} for _ in examples))
    torch.export.save(exported, path)
    return hashlib.sha256(path.read_bytes()).digest()


def write(tensors: Mapping[str, Tensor], path: Path) -> bytes:
    """Write tensors as a safetensors file; its SHA-256."""
    from safetensors.torch import save_file

    save_file({name: x.detach().contiguous().clone() for name, x in tensors.items()}, path)
    return hashlib.sha256(path.read_bytes()).digest()


def perceptron(seed: int, sizes: Sequence[int] = (4, 8, 3), *, tanh: bool = False) -> Module:
    """A small multi-layer perceptron: parameters ``0.weight``, ``0.bias``, ``2.weight``, ..."""
    torch.manual_seed(seed)
    layers: list[Module] = []
    for wide, narrow in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(wide, narrow), torch.nn.Tanh() if tanh else torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])

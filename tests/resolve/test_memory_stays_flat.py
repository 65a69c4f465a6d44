"""A merge needs a few stretches of memory a thread, whatever the number and size of the models."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.resolve import models
from tests.resolve.running import process

MIB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")


def write(path: Path, seed: int, mib: int) -> Path:
    """A model of ``mib`` MiB in bfloat16: four tensors, finite values near a common base."""
    drawn = np.random.default_rng(seed).integers(0, 1 << 16, (4, mib * MIB // 8), np.uint16)
    bits = torch.from_numpy((drawn & 0x80FF | 0x3F00).view(np.int16))
    return models.save(path, {f"layers.{i}.weight": bits[i].view(torch.bfloat16).reshape(-1, 1024) for i in range(4)})


def peak(inputs: list[Path], base: Path, strategy: str) -> int:
    """Peak anonymous bytes of a merge in a process of its own, which must have used the kernels and two threads."""
    ran = process(
        *("merge", *inputs, "--base", base, "--strategy", strategy, "--threads", 2, "--json"),
        settings={"CRDTMERGE_KERNELS": "numba"},
    )
    assert ran.code == 0, ran.err
    assert ran.err == "", "no kernel was left out"
    found: int = ran.json["peak_anon_bytes"]
    assert found > 10 * MIB
    return found


def test_ten_models_and_models_twice_as_large_need_no_more_memory_than_three(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", 0, 64)
    inputs = [write(tmp_path / f"{number}.safetensors", number, 64) for number in range(1, 11)]
    for strategy in ("task_arithmetic", "ties"):
        three, ten = peak(inputs[:3], base, strategy), peak(inputs, base, strategy)
        assert ten - three <= 100 * MIB, f"{strategy}: {three / MIB:.0f} MiB for 3 models, {ten / MIB:.0f} MiB for 10"
    for path in inputs:
        path.unlink()
    large_base = write(tmp_path / "base.safetensors", 0, 128)
    large = [write(tmp_path / f"{number}.safetensors", number, 128) for number in range(1, 4)]
    twice = peak(large, large_base, "ties")
    for path in (*large, large_base):
        path.unlink()
    assert twice - three <= 30 * MIB, f"{three / MIB:.0f} MiB for models of 64 MiB, {twice / MIB:.0f} MiB for 128 MiB"

"""A tensor's digest says what the tensor is, and nothing of the file that holds it."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import blake3
import msgpack
import numpy as np
import pytest
import torch

from crdtmerge import limits
from crdtmerge.numerics.dtypes import DTYPES
from crdtmerge.numerics.workers import Workers
from crdtmerge.weights import digests
from crdtmerge.weights.checkpoint import Checkpoint
from crdtmerge.weights.digests import digest_checkpoint, piece_digests, tensor_digest
from crdtmerge.weights.facts import Facts
from crdtmerge.weights.state_dict import StateDict
from crdtmerge.weights.writer import Output, plan_output
from tests.weights.small_checkpoints import Tensors, random_tensors, save

TENSORS = random_tensors(5)


def facts_of(path: Path, threads: int = 2) -> dict[str, Facts]:
    with Checkpoint.open(path) as checkpoint, Workers(threads) as workers:
        return digest_checkpoint(checkpoint, workers)


def naive_digest(dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    """The definition, written out anew."""
    pieces = [blake3.blake3(data[at : at + 2**20]).digest() for at in range(0, len(data), 2**20)]
    value = {"bytes": len(data), "dtype": dtype, "pieces": b"".join(pieces), "shape": list(shape)}
    return hashlib.sha256(b"crdtmerge/tensor/1\0" + msgpack.packb(value)).digest()


def naive(tensors: Tensors) -> dict[str, bytes]:
    return {name: naive_digest(*tensor) for name, tensor in sorted(tensors.items())}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_digests_are_those_of_the_definition_for_any_count_of_threads(threads: int, tmp_path: Path) -> None:
    found = facts_of(save(tmp_path / "m.safetensors", TENSORS), threads)
    assert list(found) == sorted(TENSORS)
    assert {name: facts.digest for name, facts in found.items()} == naive(TENSORS)


@pytest.mark.parametrize("extra", [-2, 0, 2])
@pytest.mark.parametrize("pieces", [1, 3])
def test_tensors_around_the_borders_of_pieces_and_stretches(
    extra: int, pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "STRETCH_BYTES", 2 * limits.PIECE_BYTES)
    count = (pieces * limits.PIECE_BYTES + extra) // 2
    data = np.arange(count, dtype=np.uint16) & 0x3FFF
    tensors = {"w": ("BF16", (count,), data.tobytes()), "v": ("I8", (3,), b"abc")}
    found = facts_of(save(tmp_path / "m.safetensors", tensors))
    assert {name: facts.digest for name, facts in found.items()} == naive(tensors)


def test_shards_padding_and_order_do_not_enter(tmp_path: Path) -> None:
    one = facts_of(save(tmp_path / "one.safetensors", TENSORS))
    many = facts_of(save(tmp_path / "many", TENSORS, folder=True, shard_bytes=150))
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    assert one == many


def test_dtype_and_shape_enter() -> None:
    data = bytes(24)
    found = {
        naive_digest(dtype, shape, data)
        for dtype, shape in [("F32", (6,)), ("F32", (2, 3)), ("I32", (6,)), ("I8", (24,))]
    }
    assert len(found) == 4
    assert tensor_digest(DTYPES["F32"], (2, 3), piece_digests(data)) in found


def test_a_digest_wants_one_piece_digest_for_each_piece() -> None:
    with pytest.raises(AssertionError, match="each piece"):
        tensor_digest(DTYPES["F32"], (2, 3), b"")


def test_nan_and_infinity_are_counted_and_the_first_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "STRETCH_BYTES", limits.PIECE_BYTES)
    values = np.zeros(3 * limits.PIECE_BYTES // 4, "<f4")
    at = [limits.PIECE_BYTES // 4 + 7, limits.PIECE_BYTES // 2 + 1, len(values) - 1]
    values[at] = [np.nan, -np.inf, np.inf]
    tensors = {
        "bad": ("F32", values.shape, values.tobytes()),
        "good": ("F64", (1,), struct.pack("<d", 1e308)),
        "integers": ("I16", (1,), b"\xff\xff"),
    }
    found = facts_of(save(tmp_path / "m.safetensors", tensors))
    assert {name: facts.nonfinite for name, facts in found.items()} == {
        "bad": (3, at[0]),
        "good": None,
        "integers": None,
    }


def test_progress_is_told_of_every_byte(tmp_path: Path) -> None:
    seen: list[int] = []
    with Checkpoint.open(save(tmp_path / "m.safetensors", TENSORS)) as checkpoint, Workers(2) as workers:
        digest_checkpoint(checkpoint, workers, None, seen.append)
        assert sum(seen) == checkpoint.nbytes


def test_pass_1_takes_little_memory(tmp_path: Path) -> None:
    size = 256 << 20
    layout = plan_output([("w", DTYPES["F32"], (size // 4,))], single_file="m.safetensors")
    with Output(tmp_path / "m.safetensors", layout, folder=False) as output:
        output.commit()  # a file of zeros, which the disk does not store
    tracemalloc.start()
    try:
        found = facts_of(tmp_path / "m.safetensors")
        assert tracemalloc.get_traced_memory()[1] < size // 16
    finally:
        tracemalloc.stop()
    assert found["w"].nonfinite is None


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.weights.test_digests import TENSORS, facts_of, save
path = save(Path(sys.argv[2]), TENSORS, folder=True, shard_bytes=150)
print({name: facts.digest.hex() for name, facts in facts_of(path).items()})
"""


def test_saving_twice_in_two_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    printed = []
    for seed in ("0", "1", "4242"):
        arguments = [sys.executable, "-c", CHILD, str(Path(__file__).parents[2]), str(tmp_path / seed)]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        printed.append(subprocess.run(arguments, env=environment, capture_output=True, check=True).stdout)
    assert len(set(printed)) == 1
    trees = [{path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()} for seed in ("0", "1", "4242")]
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.parametrize("empty", [torch.empty(0, 3), torch.from_numpy(np.zeros(0)), torch.zeros(4, 0).T])
def test_a_tensor_without_elements_in_memory_has_no_bytes_whatever_its_strides(empty: torch.Tensor) -> None:
    assert StateDict({"w": empty}, "a").raw["w"].size == 0

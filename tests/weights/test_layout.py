"""Where tensors lie in an output depends on the tensors alone, and is what the Hugging Face hub would write."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from crdtmerge.errors import OutputError
from crdtmerge.numerics.dtypes import DTYPES
from crdtmerge.weights.checkpoint import Checkpoint
from crdtmerge.weights.writer import plan_output
from tests.weights.small_checkpoints import random_tensors, save, specs

TENSORS = random_tensors(8)
I8 = DTYPES["I8"]


def sizes(*nbytes: int) -> list[tuple[str, object, tuple[int, ...]]]:
    return [(f"t{number}", I8, (size,)) for number, size in enumerate(nbytes)]


def shards(*nbytes: int, shard_bytes: int) -> list[list[str]]:
    return [sorted(file.entries) for file in plan_output(sizes(*nbytes), shard_bytes=shard_bytes).files]  # type: ignore[arg-type]


def test_the_order_in_which_tensors_are_given_does_not_matter() -> None:
    given = specs(TENSORS)
    wanted = plan_output(given, shard_bytes=200)
    for seed in range(5):
        random.Random(seed).shuffle(given)
        assert plan_output(given, shard_bytes=200) == wanted


def test_shards_are_filled_in_name_order_and_a_large_tensor_has_its_own() -> None:
    assert shards(4, 4, 4, shard_bytes=12) == [["t0", "t1", "t2"]]
    assert shards(4, 4, 4, shard_bytes=8) == [["t0", "t1"], ["t2"]]
    assert shards(9, 4, 4, shard_bytes=8) == [["t0"], ["t1", "t2"]]
    assert shards(4, 9, 4, shard_bytes=8) == [["t1"], ["t0", "t2"]]  # the hub's rule: the shard under way goes on
    assert shards(0, 8, 0, 1, shard_bytes=8) == [["t0", "t1", "t2"], ["t3"]]
    assert shards(shard_bytes=8) == [[]]


def test_one_shard_has_the_plain_name_and_no_index() -> None:
    layout = plan_output(specs(TENSORS))
    assert [file.name for file in layout.files] == ["model.safetensors"]
    assert layout.index is None
    assert plan_output(specs(TENSORS), single_file="x.safetensors", shard_bytes=1).files[0].name == "x.safetensors"


def test_the_index_names_every_tensor_as_the_hub_writes_it() -> None:
    layout = plan_output(specs(TENSORS), shard_bytes=200)
    count = len(layout.files)
    assert [file.name for file in layout.files] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    weight_map = {name: layout.place(name)[0].name for name in TENSORS}
    table = {"metadata": {"total_size": sum(len(data) for _, _, data in TENSORS.values())}, "weight_map": weight_map}
    assert layout.index == (json.dumps(table, indent=2, sort_keys=True) + "\n").encode()


def test_our_folders_are_read_back_as_they_were(tmp_path: Path) -> None:
    path = save(tmp_path / "merged", TENSORS, folder=True, shard_bytes=200)
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.notes == []
        assert len(checkpoint.files) > 2
        for name, (dtype, shape, data) in TENSORS.items():
            buffer = bytearray(len(data))
            checkpoint.read_into(name, 0, buffer)
            assert (checkpoint.entries[name].dtype.name, checkpoint.entries[name].shape, bytes(buffer)) == (
                dtype,
                shape,
                data,
            )


def test_sizes_and_places_agree() -> None:
    layout = plan_output(specs(TENSORS), shard_bytes=200)
    for file in layout.files:
        assert len(file.header) + sum(entry.nbytes for entry in file.entries.values()) == file.size
    for name in TENSORS:
        file, entry = layout.place(name)
        assert file.entries[name] == entry
        assert len(file.header) <= entry.begin <= entry.end <= file.size


@pytest.mark.parametrize("names", [["a", "a"], ["__metadata__"], [""], ["a\0"], ["\ud800"], ["x" * 513]])
@pytest.mark.parametrize("shard_bytes", [1, 100])
def test_tensors_that_no_reader_would_take_back_are_refused(names: list[str], shard_bytes: int) -> None:
    with pytest.raises(OutputError, match=r"cannot be written"):
        plan_output([(name, I8, (1,)) for name in names], shard_bytes=shard_bytes)

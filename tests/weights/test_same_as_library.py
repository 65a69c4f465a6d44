"""The safetensors library is the oracle: it reads all we accept and write, with the same meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crdtmerge.errors import CrdtMergeError
from crdtmerge.numerics.dtypes import DTYPES
from crdtmerge.weights.checkpoint import Checkpoint
from crdtmerge.weights.tensorfile import TensorFile
from crdtmerge.weights.writer import header_bytes
from tests.weights.small_checkpoints import header_of, random_tensors, save, specs

UNREADABLE_BY_TORCH = ("F6_E2M3", "F6_E3M2", "F4")


def torch_tensor(dtype: str, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    kind = getattr(torch, DTYPES[dtype].torch_name)
    return torch.frombuffer(bytearray(data), dtype=kind).reshape(shape) if data else torch.empty(shape, dtype=kind)


def bytes_of_torch(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("seed", range(4))
def test_our_writer_is_read_by_safetensors_bit_for_bit(seed: int, tmp_path: Path) -> None:
    tensors = random_tensors(seed)
    loaded = load_file(save(tmp_path / "m.safetensors", tensors))
    assert loaded.keys() == tensors.keys()
    for name, (dtype, shape, data) in tensors.items():
        assert loaded[name].dtype == getattr(torch, DTYPES[dtype].torch_name)
        assert loaded[name].shape == shape
        assert bytes_of_torch(loaded[name]) == data


@pytest.mark.parametrize("seed", range(4))
def test_the_library_saves_the_same_bytes_as_we_do(seed: int, tmp_path: Path) -> None:
    tensors = random_tensors(seed)
    save(tmp_path / "ours.safetensors", tensors)
    theirs = {name: torch_tensor(*tensor) for name, tensor in tensors.items()}
    save_file(theirs, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


usual_names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)


@given(st.lists(usual_names.filter(lambda name: name != "__metadata__"), unique=True, max_size=8))
@settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_names_are_ordered_and_escaped_as_the_library_does(tmp_path: Path, names: list[str]) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    ours = header_bytes([(name, DTYPES["F32"], (1,)) for name in names])
    assert (tmp_path / "theirs.safetensors").read_bytes()[: len(ours)] == ours


def test_what_the_library_saves_we_read(tmp_path: Path) -> None:
    tensors = random_tensors(9)
    theirs = {name: torch_tensor(*tensor) for name, tensor in tensors.items()}
    save_file(theirs, tmp_path / "m.safetensors", metadata={"a": "é\n", "b": "", "format": "pt"})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.entries) == sorted(tensors)
        for name, (dtype, shape, data) in tensors.items():
            entry, buffer = checkpoint.entries[name], bytearray(len(data))
            checkpoint.read_into(name, 0, buffer)
            assert (entry.dtype.name, entry.shape, bytes(buffer)) == (dtype, shape, data)


# Whatever ours accepts, the library accepts

dimensions = st.one_of(st.integers(0, 3), st.sampled_from([2**31, 2**62, 2**63, 2**64, 7]))
shapes = st.lists(st.integers(0, 3), max_size=4)
printable = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=5)
names = st.one_of(st.sampled_from("abcd"), printable, printable, st.sampled_from(["", "\0", "__metadata__", "\x7f"]))
spaces = st.sampled_from(["", " ", "\n", "\t", "  "])


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A valid table of tensors, in any order of names and of data, and its count of data bytes."""
    table: dict[str, Any] = {}
    at, real = 0, st.sampled_from(sorted(DTYPES))
    for name in draw(st.lists(names, unique=True, max_size=5)):
        dtype, shape = DTYPES[draw(real)], draw(shapes)
        bits = dtype.bits
        for size in shape:
            bits *= size
        table[name] = {"dtype": dtype.name, "shape": shape, "data_offsets": [at, at + bits // 8]}
        at += bits // 8
    if draw(st.booleans()):
        table["__metadata__"] = draw(st.dictionaries(names, names, max_size=2))
    return {name: table[name] for name in draw(st.permutations(sorted(table)))}, at


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A file that is valid but for a few changes: to fields, to the text, to the data's length."""
    table, data_bytes = draw(headers())
    for name in draw(st.sampled_from([[], [], [], sorted(table)[:1]])):
        if isinstance(table[name].get("shape"), list) and table[name]["shape"]:
            table[name]["shape"][-1] = draw(dimensions)
    text = json.dumps(table, separators=(draw(spaces) + ",", ":" + draw(spaces)), ensure_ascii=draw(st.booleans()))
    for old, new in draw(st.one_of(st.just([]), st.lists(st.sampled_from(SWAPS), max_size=2))):
        text = text.replace(old, new, 1)
    header = text.encode() + b" " * draw(st.integers(0, 9))
    body = bytes(max(0, data_bytes + draw(st.sampled_from([0] * 9 + [1, -1]))))
    return len(header).to_bytes(8, "little") + header + body


SWAPS = (
    ("0", "-0"), ("1", "1.0"), ("2", "2e0"), ("{", " {"), ('"dtype"', '"dtypes"'), ('"shape"', '"shape":[],"shape"'),
    ("[0,", "[00,"), ("[", "[true,"), ("}", ',"x":1}'), ("F", "f"), (":", ": "), ("{}", "null"), ("\\u", "\\U"),
    ("\\", "\\u005c"), ("}", "}\n"), (",", ",,"), ("]", ",]"), ("3", "Infinity"), ("1", "18446744073709551617"),
)  # fmt: skip


@given(files())
@settings(
    max_examples=1500, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_our_reader_accepts_only_what_safetensors_accepts(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    try:
        ours = TensorFile.open(path)
    except CrdtMergeError:
        event("refused")
        return
    event(f"accepted {min(len(ours.entries), 3)}")
    with ours, safe_open(path, framework="pt") as theirs:
        assert sorted(theirs.keys()) == list(ours.entries)
        for name, entry in ours.entries.items():
            assert entry.elements * entry.dtype.bits == entry.nbytes * 8
            if entry.dtype.name in UNREADABLE_BY_TORCH:
                continue
            part, buffer = theirs.get_slice(name), bytearray(entry.nbytes)
            ours.read_into(entry.begin, buffer)
            assert (part.get_dtype(), tuple(part.get_shape())) == (entry.dtype.name, entry.shape)
            assert bytes_of_torch(theirs.get_tensor(name)) == bytes(buffer)


def test_the_header_begins_with_the_format_and_is_padded_to_eight(tmp_path: Path) -> None:
    tensors = random_tensors()
    path = save(tmp_path / "m.safetensors", tensors)
    assert next(iter(header_of(path).items())) == ("__metadata__", {"format": "pt"})
    assert len(header_bytes(specs(tensors))) % 8 == 0

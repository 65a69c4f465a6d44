"""Every way a safetensors file can be wrong, and the sentence that refuses it."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from crdtmerge import limits
from crdtmerge.errors import CheckpointError, CrdtMergeError, HeaderError, InputError
from crdtmerge.numerics.workers import Workers
from crdtmerge.weights.checkpoint import Checkpoint
from crdtmerge.weights.digests import digest_checkpoint
from crdtmerge.weights.tensorfile import TensorFile
from tests.attacks.malformed_bytes import packed, tensor, valid_file

A8 = tensor("F32", [2], 0, 8)
A_TEXT = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
DEEP = 100_000

ROWS: dict[str, tuple[bytes, type[CrdtMergeError], str]] = {
    # the length
    "empty": (b"", HeaderError, ": 0 bytes; a safetensors file has at least 10"),
    "seven_bytes": (b"\1" * 7, HeaderError, ": 7 bytes; a safetensors file has at least 10"),
    "length_beyond_file": (
        packed({"a": A8}, bytes(8), 10**6),
        HeaderError,
        "header claims 1000000 bytes, the file has",
    ),
    "length_2_63": (packed({"a": A8}, bytes(8), 2**63), HeaderError, "header claims 9223372036854775808 bytes"),
    "length_101_mb": (packed({"a": A8}, bytes(8), 101_000_000), HeaderError, "the limit is 100000000"),
    "length_too_small": (packed({"a": A8}, bytes(8), 5), HeaderError, "not complete JSON (ends at byte 5)"),
    "length_zero": (packed({"a": A8}, bytes(8), 0), HeaderError, "header is empty"),
    # the text
    "not_json": (packed(b"xxxx"), HeaderError, "must begin with {; it begins with xxxx"),
    "control_text": (packed(b"\x1b[31mred"), HeaderError, r"it begins with \x1b[31mred"),
    "list": (packed(b"[]"), HeaderError, "must begin with {"),
    "string": (packed(b'"{}"'), HeaderError, "must begin with {"),
    "byte_order_mark": (packed(b"\xef\xbb\xbf{" + A_TEXT + b"}", bytes(8)), HeaderError, r"begins with \xef\xbb\xbf"),
    "leading_space": (packed(b"  {" + A_TEXT + b"}", bytes(8)), HeaderError, "must begin with {"),
    "not_utf8": (packed(b'{"\xff":{}}'), HeaderError, "not UTF-8 at byte 2"),
    "utf16": (packed('{"a":1}'.encode("utf-16-le")), HeaderError, "not JSON"),
    "surrogate_name": (packed(b'{"\\ud800":{}}'), HeaderError, r"""half a surrogate pair: '{"\ud800'"""),
    "surrogate_metadata": (packed(b'{"__metadata__":{"a":"\\udc00"}}'), HeaderError, "half a surrogate pair"),
    "syntax": (packed(b'{"a":,}'), HeaderError, "not JSON: expecting value at byte 5"),
    "unterminated_string": (packed(b'{"a'), HeaderError, "not complete JSON (ends at byte 3)"),
    "two_maps": (packed(b"{}{}"), HeaderError, "not JSON: extra data at byte 2"),
    "trailing_newline": (packed(b"{" + A_TEXT + b"}\n", bytes(8)), HeaderError, "then only spaces"),
    "trailing_nul": (packed(b"{" + A_TEXT + b"}\0", bytes(8)), HeaderError, "extra data"),
    "deep_lists": (packed(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"), HeaderError, "nested deeper than 4"),
    "deep_maps": (packed(b'{"a":' * DEEP + b"1" + b"}" * DEEP), HeaderError, "nested deeper than 4"),
    "deep_open": (packed(b'{"a":' + b"[" * DEEP), HeaderError, "nested deeper than 4"),
    "deep_mixed": (packed(b'{"a":' + b'[{"b":' * DEEP), HeaderError, "nested deeper than 4"),
    "brackets_crossed": (packed(b'{"a":[}]'), HeaderError, "not JSON"),
    "many_quotes": (packed(b'{"' + b'\\"' * DEEP), HeaderError, "not complete JSON"),
    "nan": (packed(b'{"a":NaN}'), HeaderError, "holds NaN, not a whole number"),
    "infinity": (packed(b'{"a":-Infinity}'), HeaderError, "holds -Infinity, not a whole number"),
    "long_integer": (packed(b'{"a":' + b"9" * 5000 + b"}"), HeaderError, "an integer of 5000 digits"),
    # names
    "twice_same_range": (packed(b"{" + A_TEXT + b"," + A_TEXT + b"}", bytes(8)), HeaderError, "header has 'a' twice"),
    "twice_other_range": (
        packed(b"{" + A_TEXT + b"," + A_TEXT.replace(b"[0,8]", b"[8,16]") + b"}", bytes(16)),
        HeaderError,
        "header has 'a' twice",
    ),
    "twice_by_escape": (
        packed(b"{" + A_TEXT + b"," + A_TEXT.replace(b'"a"', b'"\\u0061"') + b"}", bytes(8)),
        HeaderError,
        "header has 'a' twice",
    ),
    "field_twice": (packed(b'{"a":{"dtype":"F32","dtype":"F32"}}'), HeaderError, "header has 'dtype' twice"),
    "metadata_twice": (packed(b'{"__metadata__":{},"__metadata__":{}}'), HeaderError, "has '__metadata__' twice"),
    "empty_name": (packed({"": A8}, bytes(8)), HeaderError, "tensor '' has an empty name"),
    "nul_in_name": (packed({"a\0b": A8}, bytes(8)), HeaderError, r"tensor 'a\x00b' has control characters"),
    "escape_in_name": (packed({"\x1b[2J": A8}, bytes(8)), HeaderError, r"tensor '\x1b[2J' has control characters"),
    "c1_in_name": (packed({"\x9b2J": A8}, bytes(8)), HeaderError, r"tensor '\x9b2J' has control characters"),
    "long_name": (packed({"é" * 257: A8}, bytes(8)), HeaderError, "a name of 514 bytes; the limit is 512"),
    # metadata
    "metadata_number": (packed({"__metadata__": {"x": 1}, "a": A8}, bytes(8)), HeaderError, "map from text to text"),
    "metadata_null": (packed({"__metadata__": None, "a": A8}, bytes(8)), HeaderError, "map from text to text"),
    "metadata_list": (packed({"__metadata__": [], "a": A8}, bytes(8)), HeaderError, "map from text to text"),
    # fields
    "unknown_field": (
        packed({"a": {**A8, "evil": 1}}, bytes(8)),
        HeaderError,
        "tensor 'a' must have exactly the fields",
    ),
    "missing_field": (packed({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), HeaderError, "exactly the fields"),
    "entry_not_a_map": (packed({"a": [1]}), HeaderError, "tensor 'a' must have exactly the fields"),
    "unknown_dtype": (
        packed({"a": tensor("F7", [2], 0, 8)}, bytes(8)),
        HeaderError,
        "has dtype 'F7', which is unknown",
    ),
    "dtype_number": (packed({"a": {**A8, "dtype": 32}}, bytes(8)), HeaderError, "has dtype 32, which is unknown"),
    "dtype_list": (packed({"a": {**A8, "dtype": ["F32"]}}, bytes(8)), HeaderError, "which is unknown"),
    "dtype_case": (packed({"a": tensor("f32", [2], 0, 8)}, bytes(8)), HeaderError, "has dtype 'f32', which is unknown"),
    "rank_70": (packed({"a": tensor("F32", [1] * 70, 0, 4)}, bytes(4)), HeaderError, "has rank 70; the limit is 8"),
    "shape_text": (packed({"a": tensor("F32", "2", 0, 8)}, bytes(8)), HeaderError, "has shape '2'; wanted a list"),
    "shape_bool": (packed({"a": tensor("F32", [True], 0, 4)}, bytes(4)), HeaderError, "has shape [True]; wanted"),
    "shape_fraction": (
        packed({"a": tensor("F32", [2.0], 0, 8)}, bytes(8)),
        HeaderError,
        "holds 2.0, not a whole number",
    ),
    "shape_exponent": (packed(b'{"a":{"dtype":"I8","shape":[1e0]}}'), HeaderError, "holds 1e0, not a whole number"),
    "shape_negative": (packed({"a": tensor("F32", [-2], 0, 8)}, bytes(8)), HeaderError, "the negative number -2"),
    "shape_minus_zero": (packed(b'{"a":{"dtype":"I8","shape":[-0]}}'), HeaderError, "the negative number -0"),
    "shape_null": (packed({"a": tensor("F32", None, 0, 4)}, bytes(4)), HeaderError, "has shape None; wanted a list"),
    "shape_too_large": (
        packed({"a": tensor("F32", [3], 0, 8)}, bytes(8)),
        HeaderError,
        "12 bytes; its data_offsets span 8",
    ),
    "shape_overflow": (packed({"a": tensor("F32", [2**40, 2**40], 0, 8)}, bytes(8)), HeaderError, "which overflows"),
    "shape_overflow_times_0": (packed({"a": tensor("F32", [2**62, 2**62, 0], 0, 0)}), HeaderError, "which overflows"),
    "shape_0_times_overflow": (packed({"a": tensor("F32", [0, 2**62, 2**62], 0, 0)}), HeaderError, "which overflows"),
    "half_a_byte": (packed({"a": tensor("F4", [3], 0, 2)}, bytes(2)), HeaderError, "no whole number of bytes of F4"),
    "offset_negative": (packed({"a": tensor("F32", [2], -8, 0)}, bytes(8)), HeaderError, "the negative number -8"),
    "offset_fraction": (packed({"a": tensor("F32", [2], 0.0, 8)}, bytes(8)), HeaderError, "not a whole number"),
    "offset_bool": (
        packed({"a": tensor("I8", [1], False, True)}, bytes(1)),
        HeaderError,
        "has data_offsets [False, True]",
    ),
    "offsets_swapped": (packed({"a": tensor("F32", [2], 8, 0)}, bytes(8)), HeaderError, "wanted [begin, end]"),
    "offsets_three": (packed({"a": {**A8, "data_offsets": [0, 8, 8]}}, bytes(8)), HeaderError, "wanted [begin, end]"),
    "offset_huge": (packed({"a": tensor("F32", [2], 2**64, 2**64 + 8)}, bytes(8)), HeaderError, "belong to no tensor"),
    # the cover
    "overlap": (
        packed({"a": A8, "b": tensor("F32", [2], 4, 12)}, bytes(12)),
        HeaderError,
        "bytes 4..8 belong to 'a' and 'b'",
    ),
    "alias": (packed({"a": A8, "b": A8}, bytes(8)), HeaderError, "bytes 0..8 belong to 'a' and 'b'"),
    "empty_inside": (packed({"a": A8, "b": tensor("F32", [0], 4, 4)}, bytes(8)), HeaderError, "belong to 'a' and 'b'"),
    "hole": (
        packed({"a": tensor("F32", [1], 0, 4), "b": tensor("F32", [1], 8, 12)}, bytes(12)),
        HeaderError,
        "bytes 4..8 before tensor 'b' belong to no tensor",
    ),
    "hole_at_begin": (packed({"a": tensor("F32", [1], 4, 8)}, bytes(8)), HeaderError, "bytes 0..4 before tensor 'a'"),
    "trailing_bytes": (packed({"a": A8}, bytes(20)), HeaderError, "12 bytes after the last tensor"),
    "zip_appended": (packed({"a": A8}, bytes(8) + b"PK\3\4"), HeaderError, "4 bytes after the last tensor"),
    "data_without_tensors": (packed({}, bytes(4)), HeaderError, "4 bytes after the last tensor"),
    "truncated": (
        packed({"a": tensor("F32", [4], 0, 16)}, bytes(8)),
        HeaderError,
        "8 of 16 bytes of 'a' are missing: truncated or still downloading?",
    ),
    "truncated_before": (
        packed({"a": A8, "b": tensor("F32", [2], 8, 16)}, bytes(8)),
        HeaderError,
        "8 of 8 bytes of 'b' are missing",
    ),
    # other formats under a false name
    "gguf": (b"GGUF\3\0\0\0" + bytes(16), CheckpointError, "quantised blocks have no linear structure"),
    "zip": (b"PK\3\4" + b"\x14\0\0\0\x08\x08" + bytes(90), CheckpointError, "a pickle can run code"),
    "pickle": (b"\x80\x02}q\x00X\x01\0\0\0aq\x01K\x01s.", CheckpointError, "a pickle can run code"),
}


def refusal(path: Path) -> CrdtMergeError:
    """The error with which a file is refused, also by whoever opens it as a checkpoint."""
    with pytest.raises(CrdtMergeError) as caught:
        TensorFile.open(path)
    with pytest.raises(type(caught.value)):
        Checkpoint.open(path)
    return caught.value


@pytest.mark.parametrize("name", ROWS)
def test_every_malformed_file_is_refused_with_its_own_sentence(name: str, tmp_path: Path) -> None:
    content, error, words = ROWS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused = refusal(path)
    assert type(refused) is error
    assert words in str(refused)
    assert str(refused).startswith(f"{path}: ")
    assert str(refused).isprintable()


def test_the_valid_file_of_these_tests_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(valid_file().replace(b"\7", b"\1"))
    with TensorFile.open(path) as file:
        assert list(file.entries) == sorted(file.entries)
        assert file.entries["layers.0.weight"].shape == (2, 3)
        assert file.entries["empty"].nbytes == 0
        assert file.entries["scale"].elements == 1


@pytest.mark.parametrize("content", [packed({}), packed({"a": A8, "z": tensor("F32", [0], 8, 8)}, bytes(8))])
def test_empty_tables_and_empty_tensors_at_the_end_are_accepted(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    TensorFile.open(path).close()


def test_more_tensors_than_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TENSORS_MAX", 3)
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed({name: tensor("F32", [0], 0, 0) for name in "abcd"}))
    assert "4 tensors; the limit is 3" in str(refusal(path))
    path.write_bytes(packed({name: tensor("F32", [0], 0, 0) for name in "abcdefgh"}))
    assert "the limit is 64" in str(refusal(path))


@pytest.mark.parametrize("content", [b"\2\7", b"\0\xff"])
def test_a_bool_that_is_neither_0_nor_1_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed({"m": tensor("BOOL", [2], 0, 2)}, content))
    with (
        Checkpoint.open(path) as checkpoint,
        Workers(1) as workers,
        pytest.raises(InputError, match=r"tensor 'm' is BOOL but holds \d+ at index [01]; a bool is 0 or 1"),
    ):
        digest_checkpoint(checkpoint, workers)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".PT", ".gguf"])
def test_other_formats_are_refused_by_name_without_being_opened(suffix: str, tmp_path: Path) -> None:
    refused = refusal(tmp_path / f"model{suffix}")
    assert type(refused) is CheckpointError
    assert "merge the original weights" in str(refused) or "Convert it where you trust its source" in str(refused)


def test_a_header_length_that_looks_like_a_pickle_is_not_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    text = b"{" + A_TEXT + b"}"
    path.write_bytes(packed(text + b" " * (0x0280 - len(text)), bytes(8)))
    assert path.read_bytes().startswith(b"\x80\x02")
    TensorFile.open(path).close()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder where a file is wanted"):
        TensorFile.open(tmp_path)


def test_a_pipe_is_refused_without_waiting_on_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "is a pipe, socket or device" in str(refusal(tmp_path / "model.safetensors"))


def test_a_device_is_refused() -> None:
    assert "is a pipe, socket or device" in str(refusal(Path(os.devnull)))


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("model.safetensors")
        assert "cannot be opened" in str(refusal(Path("model.safetensors")))


@pytest.mark.parametrize("name", ["missing.safetensors", "a\0b.safetensors", "x" * 300])
def test_a_path_that_cannot_be_opened_is_our_error(name: str, tmp_path: Path) -> None:
    assert "cannot be opened" in repr(refusal(tmp_path / name))


def test_a_sparse_file_of_a_terabyte_costs_nothing_to_refuse(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 10) + b"{}        ")
    os.truncate(path, 1 << 40)
    assert f"{(1 << 40) - 18} bytes after the last tensor" in str(refusal(path))

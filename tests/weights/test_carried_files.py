"""Configuration and tokenizer files travel with a model; code never does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from crdtmerge import limits
from crdtmerge.errors import CheckpointError
from crdtmerge.weights.carried import CARRIED_NAMES, carried_files, with_dtype

CONFIG = b'{"architectures": ["Llama"],   "torch_dtype": "float32", "x": 1e-05, "limit": [0.0, Infinity]}'


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def test_every_name_on_the_list_is_carried_byte_for_byte_and_nothing_else(tmp_path: Path) -> None:
    listed = {name: b'{"name":\t"' + name.encode() + b'"}' for name in CARRIED_NAMES}
    fill(tmp_path, listed | {"README.md": b"x", "model.safetensors": b"x", "run.sh": b"x", "config.json.bak": b"{}"})
    (tmp_path / "original").mkdir()
    assert carried_files(tmp_path) == (listed, [])
    assert list(carried_files(tmp_path)[0]) == sorted(CARRIED_NAMES)


def test_code_is_left_out_and_said_once(tmp_path: Path) -> None:
    fill(tmp_path, {"modeling_x.py": b"import os", "config.json": b"{}"})
    assert carried_files(tmp_path) == ({"config.json": b"{}"}, ["'modeling_x.py' is code and was not copied"])


def test_auto_map_is_taken_out_and_said_once(tmp_path: Path) -> None:
    code = b'{"b": "\xc3\xa9", "auto_map": {"AutoModel": "x.Y"}, "a": 1.5}'
    escaped = code.replace(b"auto", b"\\u0061uto")
    fill(tmp_path, {"config.json": code, "tokenizer_config.json": escaped, "vocab.json": b'{"auto_map": 7}'})
    files, notes = carried_files(tmp_path)
    assert files["config.json"] == files["tokenizer_config.json"] == '{\n  "b": "é",\n  "a": 1.5\n}\n'.encode()
    assert files["vocab.json"] == b'{"auto_map": 7}'
    assert notes == ["auto_map, which names code to run, was taken out of 'config.json', 'tokenizer_config.json'"]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_states_the_dtype_of_the_output(key: str, tmp_path: Path) -> None:
    fill(tmp_path, {"config.json": CONFIG.replace(b"torch_dtype", key.encode())})
    files = with_dtype(carried_files(tmp_path)[0], "bfloat16")
    wanted = ["architectures", ["Llama"]], [key, "bfloat16"], ["x", 1e-05], ["limit", [0.0, math.inf]]
    assert json.loads(files["config.json"], object_pairs_hook=lambda pairs: [list(pair) for pair in pairs]) == list(
        wanted
    )


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_config_that_is_right_is_not_rewritten(dtype: str | None, tmp_path: Path) -> None:
    fill(tmp_path, {"config.json": CONFIG})
    assert with_dtype(carried_files(tmp_path)[0], dtype) == {"config.json": CONFIG}


def test_a_config_without_a_dtype_is_not_given_one(tmp_path: Path) -> None:
    fill(tmp_path, {"config.json": b"{}", "generation_config.json": b'{"dtype": "float32"}'})
    files = with_dtype(carried_files(tmp_path)[0], "bfloat16")
    assert files == {"config.json": b"{}", "generation_config.json": b'{"dtype": "float32"}'}


def test_files_beyond_the_limit_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CARRIED_FILES_BYTES_MAX", 100)
    fill(tmp_path, {"merges.txt": bytes(60), "vocab.txt": bytes(60)})
    with pytest.raises(CheckpointError, match=r"vocab\.txt: 60 bytes; at most 40 are read"):
        carried_files(tmp_path)


def test_a_folder_that_cannot_be_listed_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be listed: No such file"):
        carried_files(tmp_path / "nowhere")


@pytest.mark.parametrize("data", [b"[]", b"", b"{", b'{"a": 1, "a": 1}', b"\xff"])
def test_a_config_that_is_not_plain_json_is_refused(data: bytes, tmp_path: Path) -> None:
    fill(tmp_path, {"config.json": data})
    with pytest.raises(CheckpointError, match=r"config\.json: file "):
        carried_files(tmp_path)

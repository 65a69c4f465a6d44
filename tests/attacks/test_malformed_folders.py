"""Every way a checkpoint folder can be wrong, and the sentence that refuses it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from crdtmerge import limits
from crdtmerge.errors import CheckpointError, CrdtMergeError, HeaderError, InputError
from crdtmerge.weights.carried import carried_files
from crdtmerge.weights.checkpoint import Checkpoint
from tests.attacks.malformed_bytes import packed, tensor

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def shard(*names: str, dtype: str = "I8") -> bytes:
    table = {name: tensor(dtype, [1], at, at + 1) for at, name in enumerate(names)}
    return packed(table, bytes(len(names)))


def index(weight_map: object, **more: object) -> bytes:
    return json.dumps({"metadata": {"total_size": 2}, "weight_map": weight_map, **more}).encode()


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


GOOD = {INDEX: index({"a": ONE, "b": TWO}), ONE: shard("a"), TWO: shard("b")}
SINGLE = {"model.safetensors": shard("a")}


def without(*names: str) -> dict[str, bytes]:
    return {name: data for name, data in GOOD.items() if name not in names}


def single_with(*names: str, dtype: str = "I8") -> dict[str, bytes]:
    return {"model.safetensors": shard(*names, dtype=dtype)}


MANY = [f"t{number:02d}" for number in range(42)]

ROWS: dict[str, tuple[dict[str, bytes], type[CrdtMergeError], str]] = {
    # which files
    "empty": ({}, CheckpointError, "holds no safetensors file; wanted model.safetensors or"),
    "other_files_only": ({"README.md": b"hello"}, CheckpointError, "holds no safetensors file"),
    "hidden_only": ({"._model.safetensors": b"junk"}, CheckpointError, "holds no safetensors file"),
    "pickle_only": ({"pytorch_model.bin": b"x"}, CheckpointError, "a pickle can run code when it is loaded"),
    "zip_bomb_only": ({"model.pt": b"PK\3\4"}, CheckpointError, "Convert it where you trust its source"),
    "gguf_only": ({"model-q4.gguf": b"GGUF"}, CheckpointError, "merge the original weights, then convert"),
    "several": (
        {"a.safetensors": shard("a"), "b.safetensors": shard("b")},
        CheckpointError,
        "several safetensors files",
    ),
    "both": (GOOD | SINGLE, CheckpointError, "holds both model.safetensors and model.safetensors.index.json"),
    "no_index": (without(INDEX), CheckpointError, f"holds shards but no {INDEX}: '{ONE}', '{TWO}'"),
    "single_and_shards": (without(INDEX) | SINGLE, CheckpointError, f"holds shards but no {INDEX}"),
    "missing_shard": (without(TWO), CheckpointError, f"shards missing from the folder: '{TWO}'"),
    "shard_not_in_index": (
        GOOD | {"model-00003-of-00003.safetensors": shard("c")},
        CheckpointError,
        "shards absent from the index: 'model-00003-of-00003.safetensors'",
    ),
    "no_tensors": ({"model.safetensors": packed({})}, CheckpointError, "holds 0 tensors"),
    "bad_header": ({"model.safetensors": b"x"}, HeaderError, "model.safetensors: 1 bytes"),
    # the index
    "index_empty": (GOOD | {INDEX: b""}, CheckpointError, f"{INDEX}: file is empty"),
    "index_list": (GOOD | {INDEX: b"[]"}, CheckpointError, "must begin with {"),
    "index_deep": (GOOD | {INDEX: b'{"a":' + b"[" * 100_000}, CheckpointError, "nested deeper than 8"),
    "index_twice": (GOOD | {INDEX: b'{"weight_map":{"a":"x","a":"y"}}'}, CheckpointError, "has 'a' twice"),
    "index_no_map": (GOOD | {INDEX: b"{}"}, CheckpointError, "has no weight_map"),
    "index_map_empty": (GOOD | {INDEX: index({})}, CheckpointError, "has no weight_map"),
    "index_map_list": (GOOD | {INDEX: index([ONE])}, CheckpointError, "has no weight_map"),
    "index_not_text": (GOOD | {INDEX: index({"a": 1})}, CheckpointError, "tensor 'a' is said to be in 1;"),
    # index against shards
    "tensor_not_in_shard": (
        GOOD | {INDEX: index({"a": ONE, "b": TWO, "c": TWO})},
        CheckpointError,
        "1 tensors in the index but in no shard: 'c'",
    ),
    "tensor_not_in_index": (
        GOOD | {TWO: shard("b", "c")},
        CheckpointError,
        "1 tensors in a shard but not in the index: 'c'",
    ),
    "tensor_elsewhere": (
        GOOD | {INDEX: index({"a": TWO, "b": ONE})},
        CheckpointError,
        "2 tensors in another shard than the index says: 'a', 'b'",
    ),
    "tensor_twice": (GOOD | {TWO: shard("a", "b")}, CheckpointError, f"tensor 'a' is in two shards: {ONE} and {TWO}"),
    "many_missing": (
        GOOD | {INDEX: index({"a": ONE, "b": TWO} | dict.fromkeys(MANY, TWO))},
        CheckpointError,
        "42 tensors in the index but in no shard: 't00', 't01', 't02', 't03', 't04' and 37 more",
    ),
    # quantised
    "fp8": (single_with("w", dtype="F8_E4M3"), CheckpointError, "tensor 'w' of dtype F8_E4M3"),
    "gptq": (
        single_with("l.qweight", "l.qzeros"),
        CheckpointError,
        "quantised or complex weights (tensor 'l.qweight')",
    ),
    "adapter": (
        single_with("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"),
        CheckpointError,
        "a low-rank adapter (tensor 'base_model.model.q.lora_A.weight')",
    ),
    "awq": (single_with("l.qzeros"), CheckpointError, "(tensor 'l.qzeros')"),
    "fp8_scales": (single_with("l.weight_scale_inv"), CheckpointError, "(tensor 'l.weight_scale_inv')"),
    "fp8_scale": (single_with("l.weight_scale"), CheckpointError, "(tensor 'l.weight_scale')"),
    "int8": (single_with("l.SCB"), CheckpointError, "(tensor 'l.SCB')"),
    "nf4": (single_with("l.weight.absmax"), CheckpointError, "(tensor 'l.weight.absmax')"),
    "nf4_state": (
        single_with("l.weight.quant_state.bitsandbytes__nf4"),
        CheckpointError,
        "(tensor 'l.weight.quant_state.bitsandbytes__nf4')",
    ),
    "config": (
        SINGLE | {"config.json": b'{"quantization_config": {"bits": 4}}'},
        CheckpointError,
        "config.json: quantised or complex weights (the key quantization_config)",
    ),
    "config_not_json": (SINGLE | {"config.json": b"{'a': 1}"}, CheckpointError, "config.json: file is not JSON"),
    "config_twice": (SINGLE | {"config.json": b'{"a": 1, "a": 2}'}, CheckpointError, "file has 'a' twice"),
}

PATHS = (
    *("../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "..", "", ".", "model.bin"),
    *("..\\model.safetensors", "sub\\model.safetensors", "C:model.safetensors", "C:\\model.safetensors"),
    *("\\\\host\\share\\model.safetensors", "//host/share/model.safetensors", "a.safetensors:stream.safetensors"),
    *("a\0.safetensors", "a\n.safetensors", "a\x1b[2J.safetensors", ".safetensors", "./a.safetensors"),
    *("a.safetensors/", "x" * 300 + ".safetensors", "a\u202e.safetensors"),
)


def refusal(folder: Path) -> CrdtMergeError:
    with pytest.raises(CrdtMergeError) as caught:
        Checkpoint.open(folder)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(str(folder))
    return caught.value


@pytest.mark.parametrize("name", ROWS)
def test_every_malformed_folder_is_refused_with_its_own_sentence(name: str, tmp_path: Path) -> None:
    files, error, words = ROWS[name]
    fill(tmp_path, files)
    refused = refusal(tmp_path)
    assert type(refused) is error
    assert words in str(refused)


@pytest.mark.parametrize("path", PATHS)
def test_an_index_names_only_plain_files_of_its_folder(path: str, tmp_path: Path) -> None:
    fill(tmp_path, GOOD | {INDEX: index({"a": path, "b": TWO})})
    assert "wanted one plain file name ending .safetensors" in str(refusal(tmp_path))


def test_the_good_folder_of_these_tests_is_accepted(tmp_path: Path) -> None:
    fill(tmp_path, GOOD | {"config.json": b'{"rope": 1e-5, "window": -1, "limit": [0.0, Infinity]}'})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.entries) == ["a", "b"]
        assert checkpoint.notes == []
        assert checkpoint.where("b") == str(tmp_path / TWO)


def test_an_index_beyond_its_limit_is_refused_unread(tmp_path: Path) -> None:
    fill(tmp_path, GOOD)
    os.truncate(tmp_path / INDEX, 1 << 40)
    assert f"at most {limits.INDEX_BYTES_MAX} are read" in str(refusal(tmp_path))


def test_more_shards_than_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SHARDS_MAX", 1)
    fill(tmp_path, GOOD)
    assert "2 shards; the limit is 1" in str(refusal(tmp_path))


@pytest.mark.parametrize("size", [3, 1.5, "2", None, -1, {"a": 1}])
def test_a_wrong_total_size_is_noted_and_never_trusted(size: object, tmp_path: Path) -> None:
    fill(
        tmp_path,
        GOOD | {INDEX: json.dumps({"metadata": {"total_size": size}, "weight_map": {"a": ONE, "b": TWO}}).encode()},
    )
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.nbytes == 2
        assert [note for note in checkpoint.notes if "total_size" in note] == checkpoint.notes
        assert len(checkpoint.notes) == (size is not None)


def test_files_that_are_not_read_are_noted(tmp_path: Path) -> None:
    fill(tmp_path, GOOD | {"consolidated.safetensors": b"anything"})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.notes == [f"{tmp_path}: 'consolidated.safetensors' not read: not part of the model that is"]


@pytest.mark.parametrize("name", [INDEX, ONE, "config.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_pipes_and_folders_in_place_of_files_are_refused(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    fill(tmp_path, GOOD)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    assert isinstance(refusal(tmp_path), CheckpointError)


def test_the_index_itself_is_no_checkpoint(tmp_path: Path) -> None:
    fill(tmp_path, GOOD)
    with pytest.raises(CheckpointError, match="give the folder"):
        Checkpoint.open(tmp_path / INDEX)


def test_a_place_where_nothing_is_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened: No such file"):
        Checkpoint.open(tmp_path / "nothing")


# Links


def outside(tmp_path: Path) -> Path:
    """A safetensors file and a configuration outside the model's folder."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").mkdir()
    fill(tmp_path / "elsewhere", SINGLE | {"config.json": b"{}"})
    return tmp_path / "model"


@pytest.mark.parametrize("target", ["../elsewhere/model.safetensors", "absolute", "chain"])
def test_a_link_out_of_the_folder_is_refused(target: str, tmp_path: Path) -> None:
    folder = outside(tmp_path)
    (folder / "chained").symlink_to("../elsewhere/model.safetensors")
    target = {"absolute": str(tmp_path / "elsewhere/model.safetensors"), "chain": "chained"}.get(target, target)
    (folder / "model.safetensors").symlink_to(target)
    assert "outside its folder" in str(refusal(folder))


def test_a_linked_configuration_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = outside(tmp_path)
    fill(folder, SINGLE)
    (folder / "config.json").symlink_to("../elsewhere/config.json")
    assert "outside its folder" in str(refusal(folder))
    with pytest.raises(CheckpointError, match="outside its folder"):
        carried_files(folder)


def test_a_link_within_the_folder_and_a_link_to_the_folder_are_followed(tmp_path: Path) -> None:
    folder = outside(tmp_path)
    fill(folder, {"weights": shard("a")})
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "alias").symlink_to("model")
    for path in (folder, tmp_path / "alias"):
        with Checkpoint.open(path) as checkpoint:
            assert list(checkpoint.entries) == ["a"]


def test_a_file_that_the_user_names_may_be_a_link(tmp_path: Path) -> None:
    folder = outside(tmp_path)
    (folder / "model.safetensors").symlink_to("../elsewhere/model.safetensors")
    Checkpoint.open(folder / "model.safetensors").close()


def hub_cache(tmp_path: Path) -> Path:
    """A model as the Hugging Face cache keeps it: every file of the snapshot is a link to a blob."""
    root = tmp_path / "hub" / "models--org--name"
    snapshot = root / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, (name, data) in enumerate({**GOOD, "config.json": b"{}"}.items()):
        (root / "blobs" / f"{number:040x}").write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_the_hub_cache_is_followed(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    with Checkpoint.open(snapshot) as checkpoint:
        assert list(checkpoint.entries) == ["a", "b"]
        assert checkpoint.where("a") == str(snapshot / ONE)
    assert carried_files(snapshot)[0] == {"config.json": b"{}"}


@pytest.mark.parametrize(
    "target", ["../../../models--evil--name/blobs/0", "../../refs/0", "../../blobs/sub/0", "../other/0"]
)
def test_a_snapshot_leads_only_to_the_blobs_of_its_own_model(target: str, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    path = snapshot / target
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shard("a"))
    (snapshot / ONE).unlink()
    (snapshot / ONE).symlink_to(target)
    assert "outside its folder" in str(refusal(snapshot))


def test_a_blob_that_is_itself_a_link_out_is_refused(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    blob = Path(os.path.realpath(snapshot / ONE))
    blob.rename(tmp_path / "moved")
    blob.symlink_to(tmp_path / "moved")
    assert "outside its folder" in str(refusal(snapshot))


@pytest.mark.parametrize("target", ["model.safetensors", "nowhere"])
def test_links_in_a_circle_or_to_nothing_are_our_error(target: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(target)
    assert isinstance(refusal(tmp_path), InputError)

"""Verification: 0 the same bytes, 1 different, 2 cannot tell; and it never writes."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

from crdtmerge.resolve import merging
from crdtmerge.resolve.merge import merge
from crdtmerge.resolve.verify import verify
from crdtmerge.weights.layout import plan_output
from tests.resolve import forging, models
from tests.resolve.running import Ran, here, process

KINDS = ("folder", "sharded", "file")
SHARD_BYTES = 300
CONFIG = '{"architectures": ["Llama"], "auto_map": {"AutoModel": "x.Y"}, "torch_dtype": "float32"}'
SEED = 20260101


class Case(NamedTuple):
    """An output and what it was merged from."""

    folder: Path
    out: Path
    inputs: dict[str, Path]

    @property
    def receipt(self) -> Path:
        return self.beside("receipt.json")

    def beside(self, name: str) -> Path:
        return self.out / name if self.out.is_dir() else self.out.with_name(f"{self.out.name}.{name}")

    @property
    def files(self) -> list[Path]:
        """Every file of the output that verification speaks of."""
        found = sorted(self.out.iterdir()) if self.out.is_dir() else [self.out, self.receipt]
        return [path for path in found if path.name != "inputs.json"]

    @property
    def weights(self) -> list[Path]:
        return [path for path in self.files if path.suffix == ".safetensors"]


def merged(folder: Path, kind: str, *options: object, strategy: str = "ties") -> Case:
    """Three models, one of them in shards, and a base with a config and a tokenizer, merged."""
    inputs = {
        "base": models.save_folder(
            folder / "base", models.state("base"), {"config.json": CONFIG, "vocab.json": '{"a": 1}'}
        ),
        "a": models.save_folder(folder / "a", models.state("a"), {"config.json": "{}"}),
        "b": models.save_shards(folder / "b", models.state("b"), 2),
        "c": models.save(folder / "c.safetensors", models.state("c")),
    }
    out = folder / ("merged.safetensors" if kind == "file" else "merged")
    tuned = [inputs[who] for who in "abc"]
    ran = here("merge", *tuned, "--base", inputs["base"], "--strategy", strategy, *options, "-o", out)
    assert ran.code == 0, ran.err
    return Case(folder, out, inputs)


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    if request.param == "sharded":
        monkeypatch.setattr(merging, "plan_output", functools.partial(plan_output, shard_bytes=SHARD_BYTES))
    made = merged(tmp_path, request.param, "--weight", 1, "--weight", "0.5", "--weight", 2)
    assert len(made.weights) == (3 if request.param == "sharded" else 1)
    return made


@pytest.fixture
def folder_case(tmp_path: Path) -> Case:
    return merged(tmp_path, "folder")


def verdict(case: Case, *options: object) -> Ran:
    """What ``verify`` says; it must not have written anything."""
    before = models.tree(case.folder)
    ran = here("verify", case.out, *options, "--json")
    assert models.tree(case.folder) == before, "verify wrote something"
    return ran


def test_the_output_of_a_merge_is_verified(case: Case) -> None:
    ran = verdict(case)
    receipt = json.loads(case.receipt.read_bytes())
    assert ran.code == 0
    assert ran.json == {
        "out": str(case.out),
        "answer": "same",
        "reason": ran.json["reason"],
        "merge_id": receipt["merge_id"],
        "output_digest": receipt["output_digest"],
    }


@pytest.mark.parametrize("strategy", ["weight_average", "linear", "slerp", "task_arithmetic", "dare", "magmax"])
def test_outputs_of_every_strategy_are_verified(strategy: str, tmp_path: Path) -> None:
    assert verdict(merged(tmp_path, "folder", strategy=strategy)).code == 0


def test_outputs_with_every_option_of_the_recipe_are_verified(tmp_path: Path) -> None:
    options = ["--dtype", "bf16", "--exclude", "*bias", "--set", "seed=7", "--set", "density@scale=0.5"]
    options += ["--set", "scope=tensor", "--set", "density=0.3", "--missing", "base", "--allow-nonfinite"]
    case = merged(tmp_path, "folder", *options, "--task", "x", "--task", "y", "--task", "z")
    assert verdict(case).code == 0
    assert "bfloat16" in (case.out / "config.json").read_text()


def test_any_one_byte_changed_in_any_file_is_found(case: Case) -> None:
    chosen = random.Random(SEED)
    tried = 0
    for path in case.files:
        data = path.read_bytes()
        positions = {0, 7, 8, len(data) // 2, len(data) - 1} | {chosen.randrange(len(data)) for _ in range(10)}
        for at in sorted(positions & set(range(len(data)))):
            changed = bytearray(data)
            changed[at] ^= 1 << chosen.randrange(8)
            path.write_bytes(changed)
            ran = verdict(case)
            assert (ran.code, ran.json["answer"]) == (1, "different"), (path.name, at, ran)
            tried += 1
        path.write_bytes(data)
    assert tried >= 12 * len(case.files)
    assert verdict(case).code == 0


def test_a_byte_more_or_less_in_any_file_is_found(case: Case) -> None:
    for path in case.files:
        data = path.read_bytes()
        for changed in (data[:-1], data + b"\0", data + b" ", b""):
            path.write_bytes(changed)
            assert verdict(case).code == 1, (path.name, len(changed) - len(data))
        path.write_bytes(data)


def test_any_file_missing_from_the_output_is_found(case: Case) -> None:
    for path in case.files:
        if path == case.receipt or path == case.out:
            continue
        data = path.read_bytes()
        path.unlink()
        assert verdict(case).code == 1, path.name
        path.write_bytes(data)
    assert verdict(case).code == 0


def test_a_receipt_rewritten_to_match_changed_weights_does_not_help(case: Case) -> None:
    for path in case.weights:
        data = path.read_bytes()
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        receipt = case.receipt.read_bytes()
        forging.state_digests(case.receipt, case.out)
        assert case.receipt.read_bytes() != receipt
        ran = verdict(case)
        assert ran.code == 1
        assert "differs" in ran.json["reason"]
        path.write_bytes(data)
        case.receipt.write_bytes(receipt)


def test_a_receipt_rewritten_to_match_a_changed_config_does_not_help(folder_case: Case) -> None:
    config = folder_case.out / "config.json"
    config.write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    digest = hashlib.sha256(config.read_bytes()).hexdigest()
    forging.rewrite(folder_case.receipt, lambda receipt: receipt["files"].update({"config.json": digest}))
    ran = verdict(folder_case)
    assert ran.code == 1
    assert "receipt" in ran.json["reason"]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("contributions", 0, "weight"), "3"),
        (("recipe", "params", "density"), "0.4"),
        (("recipe", "params", "lambda"), "1.5"),
        (("recipe", "exclude"), ["scale"]),
        (("recipe", "dtype"), "BF16"),
        (("tensors", 0, "digest"), "00" * 32),
        (("tensors", 0, "name"), "another"),
    ],
    ids=lambda where: "-".join(map(str, where)) if isinstance(where, tuple) else "",
)
def test_a_receipt_of_another_merge_does_not_fit(where: tuple[str | int, ...], value: object, case: Case) -> None:
    forging.rewrite(case.receipt, lambda receipt: forging.put(receipt, where, value))
    assert verdict(case).code == 1


def test_the_receipt_of_a_merge_of_fewer_models_does_not_fit(case: Case) -> None:
    forging.rewrite(case.receipt, lambda receipt: receipt["contributions"].pop())
    assert verdict(case).code == 1


@pytest.mark.parametrize("name", ["extra.safetensors", "model-00001-of-00002.safetensors", "x.safetensors"])
def test_other_weights_in_the_folder_are_found(name: str, folder_case: Case) -> None:
    models.save(folder_case.out / name, models.state("a"))
    ran = verdict(folder_case)
    assert ran.code == 1
    assert name in ran.json["reason"]


def test_an_index_that_is_not_the_merge_s_is_found(folder_case: Case) -> None:
    (folder_case.out / "model.safetensors.index.json").write_text("{}")
    assert verdict(folder_case).code == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_a_carried_file_that_the_merge_does_not_carry_is_found(name: str, folder_case: Case) -> None:
    (folder_case.out / name).write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    assert verdict(folder_case).code == 1


# Cannot tell


@pytest.mark.parametrize("who", ["base", "a", "b", "c"])
def test_without_an_input_there_is_no_telling(who: str, case: Case) -> None:
    case.inputs[who].rename(case.folder / "elsewhere")
    ran = verdict(case)
    assert (ran.code, ran.json["answer"]) == (2, "unknown")
    assert "is missing" in ran.json["reason"]
    assert str(case.inputs[who]) in ran.json["reason"]


@pytest.mark.parametrize("who", ["base", "a", "c"])
def test_when_an_input_has_changed_there_is_no_telling(who: str, case: Case) -> None:
    path = case.inputs[who] / "model.safetensors" if case.inputs[who].is_dir() else case.inputs[who]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    ran = verdict(case)
    assert (ran.code, ran.json["answer"]) == (2, "unknown")


def test_an_input_that_changed_is_found_although_its_size_and_times_are_as_before(case: Case) -> None:
    import os

    path = case.inputs["c"]
    status, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert verdict(case).code == 2


def test_without_a_receipt_there_is_no_telling(case: Case) -> None:
    case.receipt.unlink()
    ran = verdict(case)
    assert (ran.code, ran.json["answer"], ran.json["merge_id"]) == (2, "unknown", None)
    assert "receipt.json is missing" in ran.json["reason"]


def test_without_the_list_of_inputs_one_must_say_where_they_are(case: Case) -> None:
    case.beside("inputs.json").unlink()
    ran = verdict(case)
    assert ran.code == 2
    assert "--against" in ran.json["reason"]
    assert verdict(case, *(part for path in case.inputs.values() for part in ("--against", path))).code == 0


def test_another_version_of_the_strategy_can_not_tell(case: Case) -> None:
    forging.rewrite(case.receipt, lambda receipt: receipt["recipe"].update(version=999))
    ran = verdict(case)
    assert ran.code == 2
    assert "version 999 of ties" in ran.json["reason"]


def test_a_merge_of_class_p_can_not_be_told_here(case: Case) -> None:
    forging.rewrite(case.receipt, lambda receipt: receipt.update({"class": "P", "build": "another"}))
    assert verdict(case).code == 2


def test_an_unknown_strategy_can_not_tell(case: Case) -> None:
    forging.rewrite(case.receipt, lambda receipt: receipt["recipe"].update(strategy="ties2"))
    ran = verdict(case)
    assert ran.code == 2
    assert ran.json["error"]["kind"] == "UnknownStrategyError"


def test_an_output_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    ran = here("verify", tmp_path / "nowhere", "--json")
    assert ran.code == 2
    assert ran.json["error"]["kind"] == "InputError"


# Inputs elsewhere


def test_moved_inputs_are_found_with_against_in_any_order_and_among_others(case: Case) -> None:
    moved = case.folder / "moved"
    moved.mkdir()
    for number, who in enumerate(("c", "base", "b", "a")):
        case.inputs[who].rename(moved / (f"{number}.safetensors" if who == "c" else str(number)))
    models.save(moved / "other.safetensors", models.state("x"))
    assert verdict(case).code == 2
    against = [part for path in sorted(moved.iterdir()) for part in ("--against", path)]
    assert verdict(case, *against).code == 0
    assert verdict(case, *reversed(against[1::2]), "--against", moved / "0.safetensors").code == 2


def test_an_output_may_be_moved_and_is_verified_where_it_lies(folder_case: Case) -> None:
    there = folder_case.out.rename(folder_case.folder / "moved")
    assert here("verify", there).code == 0


def test_inputs_in_other_files_with_the_same_content_will_do(case: Case) -> None:
    shutil.rmtree(case.inputs["b"])
    models.save(case.folder / "b.safetensors", models.state("b"))
    paths = [case.inputs["base"], case.inputs["a"], case.folder / "b.safetensors", case.inputs["c"]]
    assert verdict(case, *(part for path in paths for part in ("--against", path))).code == 0


def test_a_list_of_inputs_that_lies_changes_no_answer(folder_case: Case) -> None:
    hints = folder_case.beside("inputs.json")
    found = json.loads(hints.read_bytes())
    for row in found["contributions"]:
        row["id"] = "00" * 32
    found["contributions"].reverse()
    hints.write_text(json.dumps(found))
    assert verdict(folder_case).code == 0
    found["contributions"][0]["path"] = str(folder_case.inputs["base"])
    hints.write_text(json.dumps(found))
    assert verdict(folder_case).code == 2


def test_the_command_ends_with_the_code_of_its_answer(folder_case: Case) -> None:
    assert process("verify", folder_case.out).code == 0
    weights = folder_case.out / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = process("verify", folder_case.out)
    assert (found.code, found.out.partition(":")[0]) == (1, "different")
    folder_case.receipt.unlink()
    assert process("verify", folder_case.out).code == 2


def test_what_was_in_memory_has_no_path_and_can_be_verified_against_files(tmp_path: Path) -> None:
    a, b = {"w": np.float32([1, 3])}, {"w": np.float32([3, 5])}
    merge([a, b], strategy="linear").save(tmp_path / "out")
    hints = json.loads((tmp_path / "out" / "inputs.json").read_bytes())
    assert [row["path"] for row in hints["contributions"]] == [None, None]
    assert verify(tmp_path / "out").answer == "unknown"
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for state, path in zip((a, b), paths, strict=True):
        save_file(state, path)
    assert verify(tmp_path / "out", paths).answer == "same"

"""Ids of recipes and merges: what enters them; and the receipt, checked by a program that shares no code with ours."""

from __future__ import annotations

import getpass
import hashlib
import json
import platform
import re
import shutil
import socket
import time
from collections.abc import Mapping
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import blake3
import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from crdtmerge.errors import ReceiptError, UsageError
from crdtmerge.recipe import Recipe, recipe_bytes
from crdtmerge.resolve.asking import recipe_of
from crdtmerge.resolve.merge import merge
from crdtmerge.resolve.receipt import Receipt
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled
from tests.resolve import models
from tests.resolve.running import here
from tests.strategies.models import DEEP

BASE = bytes(range(32))


def complete(name: str, *, base: bytes | None = BASE, **said: Any) -> Recipe:
    """A recipe as a merge completes it."""
    options = {key: said.pop(key) for key in ("dtype", "missing", "exclude", "allow_nonfinite") if key in said}
    recipe, _ = recipe_of(name, said, **options)
    strategy = registry.get(name)
    return recipe.completed(strategy.version, Filled(name, strategy.Params, recipe.params).canonical, base)


# The id of a recipe


@pytest.mark.parametrize("one", [1, 1.0, "1", "1.0", "1.00", "1e0", Decimal("1"), Decimal("1.000")])
def test_one_number_has_one_id_however_it_is_written(one: object) -> None:
    assert complete("ties", **{"lambda": one}).id == complete("ties").id
    assert complete("dare", density=one).id == complete("dare", density=1).id != complete("dare").id


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"density": 0.2}),
        ({"density": 0.3, "lambda": 2}, {"lambda": "2", "density": "0.30"}),
        ({"density": "0.3"}, {"drop": 0.7}),
        ({"lambda": "0.1"}, {"lambda_": 0.1}),
        ({"seed": "5"}, {"seed": 5}),
        ({}, {"seed": "root"}),
        ({"exclude": ["b", "a", "b"]}, {"exclude": ("a", "b")}),
        ({"dtype": "bfloat16"}, {"dtype": "BF16"}),
        ({"density": [{"filter": "w", "value": ".5"}, {"value": ".2"}]}, {"density": [{"filter": "w", "value": 0.5}]}),
        ({"density": [{"filter": "*", "value": 0.4}]}, {"density": 0.4}),
    ],
)  # fmt: skip
def test_spellings_of_one_recipe_have_one_id(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert complete("ties", **one).id == complete("ties", **other).id
    assert complete("ties", **one).canonical() == complete("ties", **other).canonical()


def test_a_tenth_is_a_tenth_and_not_the_float_near_it() -> None:
    assert complete("dare", density=0.1).id == complete("dare", density="0.1").id
    nearest = Decimal.from_float(0.1)
    assert nearest != Decimal("0.1")
    assert complete("dare", density=str(nearest)[:40]).id != complete("dare", density="0.1").id


OTHER_VALUES: dict[str, Any] = {
    "density": "0.35",
    "lambda": "0.5",
    "scope": "tensor",
    "elect": "count",
    "combine": "max",
    "rescale": False,
    "normalize": False,
    "reduce": "fold",
    "space": "task_vectors",
    "dot_threshold": "0.9",
    "epsilon": "0.001",
}


@pytest.mark.parametrize("name", DEEP)
def test_every_parameter_enters_the_id(name: str) -> None:
    defaults = complete(name).params
    assert defaults.keys() <= OTHER_VALUES.keys(), "say here how each parameter can be changed"
    said = {key: OTHER_VALUES[key] if not (name == "dare" and key == "combine") else "mean" for key in defaults}
    changed = [complete(name, **{key: value}) for key, value in said.items()]
    found = {complete(name).id, *(recipe.id for recipe in changed)}
    assert len(found) == len(defaults) + 1


def test_everything_else_that_is_asked_for_enters_the_id() -> None:
    rules = [{"filter": "a*", "value": 0.5}, {"filter": "*b", "value": 0.6}]
    recipes = [
        *(complete(name) for name in DEEP),
        *(complete("ties", base=base) for base in (None, bytes(32))),
        *(complete("ties", dtype=dtype) for dtype in ("F32", "BF16")),
        *(complete("ties", seed=seed) for seed in (0, 1, 2**64 - 1)),
        *(complete("ties", missing=missing) for missing in ("base", "skip")),
        *(complete("ties", exclude=exclude) for exclude in (["a"], ["b"], ["a", "b"])),
        complete("ties", allow_nonfinite=True),
        *(complete("ties", density=chosen) for chosen in (rules, rules[::-1], rules[:1])),
    ]
    recipes.append(complete("ties").completed(2, complete("ties").params, BASE))
    assert len({recipe.id for recipe in recipes}) == len(recipes)


def test_a_seed_that_is_no_whole_number_of_64_bits_is_refused() -> None:
    for seed in (-1, 2**64, 1.5, "x", True, "", None):
        with pytest.raises(UsageError, match="seed"):
            Recipe("dare", seed=seed)  # type: ignore[arg-type]


shares = st.decimals("0.001", 1, places=3).map(str)
numbers = st.decimals(-5, 5, places=4).map(str)
globs = st.text("ab*?.[]é", min_size=1, max_size=6).filter(lambda glob: glob != "*")
rules = st.lists(st.fixed_dictionaries({"filter": globs, "value": shares}), min_size=1, max_size=3)
asked = st.fixed_dictionaries(
    {},
    optional={
        "density": st.one_of(shares, rules),
        "lambda": numbers,
        "scope": st.sampled_from(["model", "tensor"]),
        "elect": st.sampled_from(["sum", "count"]),
        "combine": st.sampled_from(["mean", "sum", "max"]),
        "seed": st.one_of(st.just("root"), st.integers(0, 2**64 - 1)),
        "dtype": st.sampled_from(["F32", "BF16"]),
        "missing": st.sampled_from(["base", "skip"]),
        "exclude": st.lists(globs),
        "allow_nonfinite": st.booleans(),
    },
)


@given(asked)
def test_a_recipe_comes_back_from_its_canonical_form(said: dict[str, Any]) -> None:
    recipe = complete("ties", **said)
    back = Recipe.from_canonical(json.loads(json.dumps(recipe.canonical())))
    assert (back, back.id, back.canonical()) == (recipe, recipe.id, recipe.canonical())
    again = Filled("ties", registry.get("ties").Params, back.params).canonical
    assert recipe_bytes(back.completed(back.version or 0, again, back.base)) == recipe_bytes(recipe)


# The receipt, by the words of the design and nothing of ours


def packed(value: Any) -> bytes:
    def ordered(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: ordered(item[key]) for key in sorted(item, key=str.encode)}
        return [ordered(one) for one in item] if isinstance(item, list) else item

    data: bytes = msgpack.packb(ordered(value), use_bin_type=True)
    return data


def hashed(domain: str, value: Any) -> bytes:
    return hashlib.sha256(f"crdtmerge/{domain}/1\0".encode() + packed(value)).digest()


def root_of(leaves: list[tuple[str, bytes]]) -> bytes:
    """Leaves as (the rest of the id's bits, hash)."""
    if len(leaves) == 1:
        return leaves[0][1]
    zero, one = ([(bits[1:], leaf) for bits, leaf in leaves if bits[0] == side] for side in "01")
    if not zero or not one:
        return root_of(zero or one)
    return hashlib.sha256(b"\1" + root_of(zero) + root_of(one)).digest()


def recomputed(receipt: Mapping[str, Any], weights: list[Path]) -> dict[str, Any]:
    """The ids of a receipt from its other parts, and the digests of tensors from files as safetensors reads them."""
    leaves = []
    for one in receipt["contributions"]:
        content = bytes.fromhex(one["id"])
        claim = {"content": content, "stats": {}, **{key: one[key] for key in ("weight", "role", "task")}}
        bits = "".join(f"{byte:08b}" for byte in content)
        leaves.append((bits, hashlib.sha256(b"\0" + content + hashed("leaf", claim)).digest()))
    root, recipe = root_of(leaves), hashed("recipe", receipt["recipe"])
    seed = receipt["recipe"]["seed"]
    rows = []
    for file in weights:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                dtype, shape = opened.get_slice(name).get_dtype(), opened.get_slice(name).get_shape()
                data = opened.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes()
                pieces = b"".join(blake3.blake3(data[at : at + 2**20]).digest() for at in range(0, len(data), 2**20))
                found = {"dtype": dtype, "shape": shape, "bytes": len(data), "pieces": pieces}
                rows.append([name, dtype, shape, hashed("tensor", found)])
    rows.sort(key=lambda row: row[0])
    return {
        "root": root.hex(),
        "recipe_id": recipe.hex(),
        "merge_id": hashed("merge", [root, recipe]).hex(),
        "seed": hashed("seed", root if seed == "root" else seed).hex(),
        "output_digest": hashed("output", rows).hex(),
        "tensors": [{"name": n, "dtype": d, "shape": s, "digest": found.hex()} for n, d, s, found in rows],
    }


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("seed", ["root", 77])
def test_a_receipt_is_recomputed_without_our_code(dtype: str, seed: object, tmp_path: Path) -> None:
    shapes = {**models.SMALL, "of two pieces": (600, 1000)}
    for who in ("base", "a", "b", "c"):
        models.save(tmp_path / f"{who}.safetensors", models.state(who, dtype, shapes))
    out = tmp_path / "out"
    weights = ["--weight", "1", "--weight", "2.50", "--weight", "1e-1", "--task", "x", "--task", "y", "--task", "é"]
    ran = here(
        *("merge", *(tmp_path / f"{who}.safetensors" for who in "abc"), "--base", tmp_path / "base.safetensors"),
        *("--strategy", "dare_ties", "--set", f"seed={seed}", "--set", "density@blocks*=0.5", *weights),
        *("--exclude", "scale", "--json", "-o", out),
    )
    assert ran.code == 0, ran.err
    receipt = json.loads((out / "receipt.json").read_bytes())
    found = recomputed(receipt, [out / "model.safetensors"])
    assert {key: receipt[key] for key in found} == found
    assert {key: ran.json[key] for key in found if key != "tensors"} == {
        k: v for k, v in found.items() if k != "tensors"
    }
    assert [one["id"] for one in receipt["contributions"]] == sorted(one["id"] for one in receipt["contributions"])
    assert sorted(one["weight"] for one in receipt["contributions"]) == ["0.1", "1", "2.5"]


def test_contents_are_named_by_a_digest_that_is_recomputed_without_our_code(tmp_path: Path) -> None:
    tensors = models.state("a", "F16")
    path = models.save(tmp_path / "a.safetensors", tensors)
    found = recomputed(
        {"contributions": [{"id": "00", "weight": "1", "role": "", "task": None}], "recipe": {"seed": 1}}, [path]
    )
    rows = [[row["name"], row["dtype"], row["shape"], bytes.fromhex(row["digest"])] for row in found["tensors"]]
    content = hashed("content", {"kind": "full", "base": None, "rows": rows})
    assert here("inspect", path, "--json").json["id"] == content.hex()


# What a receipt does not hold


def merged_at(folder: Path) -> bytes:
    folder.mkdir(parents=True)
    for who in ("base", "a", "b"):
        models.save_folder(folder / f"model-{who}", models.state(who), {"config.json": '{"x": 1}'})
    inputs = [folder / f"model-{who}" for who in ("a", "b")]
    ran = here("merge", *inputs, "--base", folder / "model-base", "--strategy", "dare", "-o", folder / "out-here")
    assert ran.code == 0, ran.err
    return (folder / "out-here" / "receipt.json").read_bytes()


def test_a_receipt_is_the_same_bytes_elsewhere_and_on_another_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = merged_at(tmp_path / "one")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86400 * 400)
    monkeypatch.setattr(time, "time_ns", lambda: int((now + 86400 * 400) * 1e9))
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert merged_at(tmp_path / "deep" / "below" / "two") == one


def test_a_receipt_names_no_time_host_path_or_library(tmp_path: Path) -> None:
    text = merged_at(tmp_path / "folder").decode()
    told = re.sub(r'"[0-9a-f]{64}"', '""', text)
    assert len(told) < len(text)
    words = [str(tmp_path), "folder", "model-a", "out-here", platform.python_version()]
    words += [name for name in (socket.gethostname(), getpass.getuser()) if name not in ("root", "E")]
    words += [version(name) for name in ("torch", "numpy", "numba", "safetensors", "crdtmerge")]
    words += [time.strftime("%Y"), "cpu", "numba", "threads", "linux", "x86"]
    assert [word for word in words if word.lower() in told.lower()] == []
    assert set(json.loads(text)) == {
        *("format", "merge_id", "root", "recipe_id", "recipe", "seed", "class", "build"),
        *("contributions", "output_digest", "tensors", "files"),
    }


def test_paths_stand_in_inputs_json_beside_it(tmp_path: Path) -> None:
    merged_at(tmp_path / "folder")
    hints = json.loads((tmp_path / "folder" / "out-here" / "inputs.json").read_bytes())
    receipt = json.loads((tmp_path / "folder" / "out-here" / "receipt.json").read_bytes())
    assert hints["base"] == {"id": receipt["recipe"]["base"], "path": str(tmp_path / "folder" / "model-base")}
    assert [one["id"] for one in hints["contributions"]] == [one["id"] for one in receipt["contributions"]]
    assert {one["path"] for one in hints["contributions"]} == {str(tmp_path / "folder" / f"model-{w}") for w in "ab"}


# Bytes


def test_a_receipt_comes_back_from_its_bytes_and_any_other_bytes_are_refused(tmp_path: Path) -> None:
    data = merged_at(tmp_path / "folder")
    assert Receipt.from_bytes(data, "x").to_bytes() == data
    for other in (
        data + b"\n",
        data[:-1],
        data.replace(b"  ", b" ", 1),
        data.replace(b'"E"', b'"e"'),
        b"",
        b"[]",
        b"{}",
    ):
        with pytest.raises(ReceiptError, match=r"^x: "):
            Receipt.from_bytes(other, "x")


def test_the_library_and_the_command_line_write_the_same_output(tmp_path: Path) -> None:
    paths = [models.save(tmp_path / f"{who}.safetensors", models.state(who)) for who in ("base", "a", "b")]
    merge(paths[1:], strategy="ties", base=paths[0], density=0.3, weights=[2, 1]).save(tmp_path / "library")
    options = ["--strategy", "ties", "--set", "density=0.3", "--weight", "1", "--weight", "2"]
    assert here("merge", *reversed(paths[1:]), "--base", paths[0], *options, "-o", tmp_path / "line").code == 0
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("library", "line"))
    assert one == two
    shutil.rmtree(tmp_path / "line")


def test_state_dicts_and_files_of_one_content_give_one_receipt(tmp_path: Path) -> None:
    states = [models.state(who) for who in "abc"]
    paths = [models.save(tmp_path / f"{number}.safetensors", held) for number, held in enumerate(states)]
    mixed = [paths[0], states[1], {name: t.numpy() for name, t in states[2].items()}]
    receipts = {merge(given, strategy="slerp").receipt.to_bytes() for given in (states, paths, mixed)}
    assert len(receipts) == 1


# The format's version


def test_the_format_is_version_1() -> None:
    """Whoever changes one of these changes what receipts everywhere mean: that is a new format version."""
    count = torch.tensor([7])
    base = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "count": count}
    a = {"w": torch.tensor([[3.0, 2.0], [1.0, 8.0]]), "count": count}
    b = {"w": torch.tensor([[1.0, 6.0], [5.0, 0.0]]), "count": count}
    merged = merge([a, b], strategy="task_arithmetic", base=base, weights=[1, "0.5"], lambda_=2)
    assert merged["w"].tolist() == [[5.0, 6.0], [1.0, 8.0]]
    receipt = merged.receipt
    assert json.loads(receipt.to_bytes())["format"] == "crdtmerge/receipt/1"
    assert [content.hex() for content, _ in receipt.contributions] == CONTENTS
    found = (receipt.root, receipt.recipe.id, receipt.merge_id, receipt.output_digest)
    assert {what: value.hex() for what, value in zip(FORMAT, found, strict=True)} == FORMAT
    assert hashlib.sha256(receipt.to_bytes()).hexdigest() == RECEIPT_BYTES


CONTENTS = [
    "387d95d94b555b6e4c81977bbac48d2ecc6b19b7e858ca9a3446eb529dca3999",
    "e8339f1ed812aa40bfcf477282a84a5e1ee08872760afa9c3c991d43058a2255",
]
FORMAT = {
    "root": "e099b8684a56d809a08e4634d94dd8d6deb524ea4b52aa464b8a6d444faabe71",
    "recipe id": "723da2b38cce9282b7bc9907f67b06ff7e9840c1df30b5572e0d1fecc27ad769",
    "merge id": "cd322b4a3e01397f6ffbbe870b5087dbf7c68b5c4b5d6a3f9d60351ca9f82cb5",
    "output digest": "77414e91e3c2df63797b69e0a04ef4b0c2c15b4a922edbb2ff6ed3225ddbae81",
}
RECEIPT_BYTES = "8575522cbc60fdab8bcbbb3efbe62cd217739a7adfda9b71d3436b3e16f236fb"

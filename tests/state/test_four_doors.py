"""Every way to merge the same inputs gives the same root, recipe, merge id, receipt, output and files, to the byte.

The doors: the command ``merge``; ``cm.merge``; a MergeState, itself or read from its bytes; a Replica, in memory, into
an output and by the commands ``init``, ``add``, ``resolve``; a Replica begun from a MergeState's bytes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import crdtmerge as cm
from crdtmerge.recipe import Recipe
from crdtmerge.weights.carried import CARRIED_NAMES
from tests.resolve.models import save, save_folder, save_shards, state
from tests.resolve.running import Ran, here, process
from tests.state.test_laws_through_the_layers import uses_base
from tests.strategies.models import DEEP, EACH, ROWS, Row

FILES = {
    who: {
        "config.json": json.dumps({"architectures": ["Small"], "torch_dtype": "float32", "from": who}),
        "tokenizer.json": json.dumps({"tokens": who}),
        "tokenizer_config.json": json.dumps({"auto_map": {"code": "x.py"}, "from": who}),
        "notes.txt": "not carried",
    }
    for who in ("base", "a", "b", "c")
}


@dataclass
class Asked:
    """A merge of folders on disk, as it is asked for at every door."""

    folder: Path
    row: Row
    dtype: str = "F32"
    options: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] | None = None
    roles: tuple[str, ...] | None = None
    tensors: Callable[[str, str], dict[str, torch.Tensor]] = state
    numbers: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.paths = {who: save_folder(self.folder / who, self.tensors(who, self.dtype), FILES[who]) for who in FILES}
        self.models = [self.paths[who] for who in "abc"]
        self.weights = self.row.weights[:3]
        self.base = self.paths["base"] if uses_base(self.row) else None
        self.recipe = Recipe.of(self.row.strategy, self.row.params, **self.options)

    def out(self) -> Path:
        """A place for an output."""
        return self.folder / f"out-{next(self.numbers)}"

    # The doors: each writes an output and says where.

    def command_merge(self) -> Path:
        models = [*self.models]
        said = list(zip(models, self.weights, self.tasks or [None] * 3, self.roles or [None] * 3, strict=True))
        said = [said[2], said[0], said[1]]
        more = [part for _, weight, _, _ in said for part in ("--weight", weight)]
        more += [part for _, _, task, _ in said if task for part in ("--task", task)]
        more += [part for _, _, _, role in said if role for part in ("--role", role)]
        out = self.out()
        paths = [model for model, _, _, _ in said]
        based = ["--base", self.base] if self.base else []
        done(here("merge", *paths, *based, *self._recipe_arguments(), *more, "-o", out))
        return out

    def one_call(self) -> Path:
        out = self.out()
        options = {**self.options, **self.row.params}
        merged = cm.merge(
            self.models,
            strategy=self.row.strategy,
            base=self.base,
            weights=self.weights,
            roles=self.roles,
            tasks=self.tasks,
            **options,
        )
        merged.save(out)
        return out

    def state(self) -> cm.MergeState:
        """The inputs as states of their own that met."""
        empty = cm.MergeState(self.recipe, base=self.base)
        joined = cm.MergeState(self.recipe, base=self.base)
        for how in self._said():
            joined |= empty.add(how.pop("model"), **how)
        return joined

    def a_state(self) -> Path:
        out = self.out()
        self.state().resolve().save(out)
        return out

    def a_state_from_bytes(self) -> Path:
        out = self.out()
        cm.MergeState.from_bytes(self.state().to_bytes()).resolve().save(out)
        return out

    def a_replica_in_memory(self) -> Path:
        out = self.out()
        with self._replica() as replica:
            replica.resolve().save(out)
        return out

    def a_replica_into_an_output(self) -> Path:
        out = self.out()
        with self._replica() as replica:
            resolved = replica.resolve_to(out)
            assert resolved.merged
            assert replica.resolve_to(out) == (resolved.receipt, 0, 0, False, 0.0, ()), "and it is left as it is"
        return out

    def a_replica_of_a_state(self) -> Path:
        out, bundle = self.out(), self.out()
        bundle.write_bytes(self.state().to_bytes())
        with cm.Replica.of_bundle(self.out(), bundle) as replica:
            replica.resolve_to(out)
        return out

    def commands_of_a_replica(self) -> Path:
        pool, out = self.out(), self.out()
        begun = ["--base", self.base] if self.base else ["--like", self.paths["base"]]
        done(here("init", pool, *begun, *self._recipe_arguments()))
        for how in reversed(self._said()):
            said = [part for name in ("weight", "task", "role") if how.get(name) for part in (f"--{name}", how[name])]
            done(here("add", how["model"], "-C", pool, *said))
        done(here("resolve", "-C", pool, "-o", out))
        return out

    def _replica(self) -> cm.Replica:
        like = None if self.base else self.paths["base"]
        replica = cm.Replica.create(self.out(), self.recipe, base=self.base, like=like)
        for how in self._said():
            replica.add(how.pop("model"), **how)
        return replica

    def _said(self) -> list[dict[str, Any]]:
        """What is said of each model, as keywords of ``add``."""
        return [
            {"model": model, "weight": weight, "task": task, "role": role}
            for model, weight, task, role in zip(
                self.models, self.weights, self.tasks or [None] * 3, self.roles or [None] * 3, strict=True
            )
        ]

    def _recipe_arguments(self) -> list[object]:
        asked: list[object] = ["--strategy", self.row.strategy]
        for name, value in self.row.params.items():
            asked += ["--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
        for name, value in self.options.items():
            if name == "seed":
                asked += ["--set", f"seed={value}"]
            elif name == "exclude":
                asked += [part for glob in value for part in ("--exclude", glob)]
            else:
                asked += [f"--{name}", value]
        return asked


def done(ran: Ran) -> Ran:
    """A command that went well."""
    assert ran.code == 0, ran.err
    return ran


def files(out: Path) -> dict[str, bytes]:
    """Every file of an output but the one that says where the inputs lie."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "inputs.json"}


DOORS: tuple[Callable[[Asked], Path], ...] = (
    Asked.command_merge,
    Asked.one_call,
    Asked.a_state,
    Asked.a_state_from_bytes,
    Asked.a_replica_in_memory,
    Asked.a_replica_into_an_output,
    Asked.a_replica_of_a_state,
    Asked.commands_of_a_replica,
)


def through_all(asked: Asked, doors: tuple[Callable[[Asked], Path], ...] = DOORS) -> tuple[cm.Receipt, Path]:
    """The one receipt and an output of all doors, which are equal."""
    outs = {door.__name__: door(asked) for door in doors}
    first, *others = outs
    expected = files(outs[first])
    for name in others:
        found = files(outs[name])
        assert found.keys() == expected.keys(), name
        assert [key for key in expected if found[key] != expected[key]] == [], name
    receipts = {name: cm.Receipt.from_bytes((out / "receipt.json").read_bytes(), name) for name, out in outs.items()}
    ids = {(one.root, one.recipe.id, one.merge_id, one.output_digest, one.to_bytes()) for one in receipts.values()}
    assert len(ids) == 1
    return receipts[first], outs[first]


@EACH
def test_every_door_gives_the_same_files_for_every_strategy(row: Row, tmp_path: Path) -> None:
    asked = Asked(tmp_path, row)
    receipt, out = through_all(asked)
    assert sorted(str(claim.weight) for _, claim in receipt.contributions) == sorted(asked.weights)
    carried = {path.name for path in out.iterdir()} & CARRIED_NAMES
    assert carried == {*FILES["a"]} - {"notes.txt"}
    config = json.loads((out / "config.json").read_text())
    assert config["from"] == ("base" if asked.base else _first(receipt, asked)), "the base's files, else the first's"
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
    assert cm.verify(out, asked.paths.values()).answer == "same"


def _first(receipt: cm.Receipt, asked: Asked) -> str:
    """Whose content comes first in canonical order."""
    ids = {cm.MergeState("linear").add(asked.paths[who]).visible[0].id: who for who in "abc"}
    return ids[receipt.contributions[0][0]]


def _sample(strategy: str) -> Row:
    return next(row for row in ROWS if row.strategy == strategy)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
@pytest.mark.parametrize("strategy", ["weight_average", "ties", "dare", "slerp"])
def test_every_door_gives_the_same_files_in_every_dtype(strategy: str, dtype: str, tmp_path: Path) -> None:
    receipt, _ = through_all(Asked(tmp_path, _sample(strategy), dtype))
    assert dtype in {row.dtype for row in receipt.tensors}


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("weight_average", {"dtype": "BF16"}),
        ("ties", {"dtype": "F64"}),
        ("slerp", {"exclude": ["blocks.*.bias", "scale"]}),
        ("task_arithmetic", {"exclude": ["scale"], "dtype": "F16"}),
        ("dare", {"seed": 7}),
        ("dare_ties", {"seed": 2**64 - 1, "exclude": ["scale"]}),
        ("dare_ties", {"seed": "root"}),
        ("linear", {"seed": 3}),
    ],
    ids=str,
)
def test_every_door_gives_the_same_files_for_every_option(
    strategy: str, options: dict[str, Any], tmp_path: Path
) -> None:
    receipt, _ = through_all(Asked(tmp_path, _sample(strategy), options=options))
    plain = cm.merge(
        [tmp_path / who for who in "abc"],
        strategy=strategy,
        base=tmp_path / "base" if uses_base(_sample(strategy)) else None,
        weights=_sample(strategy).weights[:3],
        **_sample(strategy).params,
    ).receipt
    assert (receipt.merge_id == plain.merge_id) == (options == {"seed": "root"})


@pytest.mark.parametrize(
    ("strategy", "missing"), [("weight_average", "skip"), ("ties", "skip"), ("ties", "base"), ("magmax", "base")]
)
def test_every_door_gives_the_same_files_where_tensors_are_missing(strategy: str, missing: str, tmp_path: Path) -> None:
    def tensors(who: str, dtype: str) -> dict[str, torch.Tensor]:
        whole = state(who, dtype)
        return {name: x for name, x in whole.items() if (who, name) not in {("a", "scale"), ("c", "blocks.0.bias")}}

    receipt, _ = through_all(Asked(tmp_path, _sample(strategy), options={"missing": missing}, tensors=tensors))
    assert {"scale", "blocks.0.bias"} <= {row.name for row in receipt.tensors}


@pytest.mark.parametrize("strategy", DEEP)
def test_every_door_gives_the_same_files_with_roles_and_tasks(strategy: str, tmp_path: Path) -> None:
    row = _sample(strategy)
    said = Asked(tmp_path, row, tasks=("math", "code", "math"), roles=("task",) * 3)
    doors = (Asked.command_merge, Asked.one_call, Asked.a_state, Asked.commands_of_a_replica)
    receipt, _ = through_all(said, doors)
    assert sorted(str(claim.task) for _, claim in receipt.contributions) == ["code", "math", "math"]


def test_the_program_in_a_process_of_its_own_is_the_same_door(tmp_path: Path) -> None:
    asked = Asked(tmp_path, _sample("dare_ties"))
    asked_again = [str(part) for part in asked._recipe_arguments()]
    pool, out = tmp_path / "pool", tmp_path / "out"
    assert asked.base
    done(process("init", pool, "--base", asked.base, *asked_again))
    with cm.Replica.open(pool) as replica:
        for how in asked._said():
            replica.add(how.pop("model"), **how)
    done(process("resolve", "-C", pool, "-o", out, settings={"PYTHONHASHSEED": "5"}))
    assert files(out) == files(asked.a_state())


def test_shards_files_and_state_dicts_of_one_content_are_one_input_at_every_door(tmp_path: Path) -> None:
    models = [state(who) for who in "abc"]
    shards = [save_shards(tmp_path / f"shards-{at}", one, 2) for at, one in enumerate(models)]
    single = [save(tmp_path / f"{at}.safetensors", one) for at, one in enumerate(models)]
    arrays = [{name: x.numpy() for name, x in one.items()} for one in models]
    receipts = set()
    for forms in ([*shards], [*single], [*models], [*arrays], [shards[0], single[1], arrays[2]]):
        joined = cm.MergeState("linear")
        with cm.Replica.create(tmp_path / f"pool-{len(receipts)}-{id(forms)}", "linear", like=models[0]) as replica:
            for form in forms:
                joined |= cm.MergeState("linear").add(form)
                replica.add(form)
            merged = [joined.resolve(), replica.resolve(), cm.merge(forms[::-1], strategy="linear")]
        receipts |= {one.receipt.to_bytes() for one in merged}
    assert len(receipts) == 1


@pytest.mark.parametrize("name", ["bfloat16", "bf16", "torch.bfloat16"])
def test_a_dtype_means_the_same_at_every_door_however_it_is_written(name: str) -> None:
    models = [state(who) for who in "ab"]
    asked = cm.merge(models, strategy="linear", dtype=name).receipt
    recipe = Recipe("linear", dtype=name)
    pool = cm.MergeState(recipe).add(models[0]).add(models[1])
    assert asked.to_bytes() == pool.resolve().receipt.to_bytes() == cm.merge(models, strategy=recipe).receipt.to_bytes()


@pytest.mark.parametrize("door", ["merge", "MergeState", "Replica"])
def test_a_lambda_is_read_under_both_names_at_every_door(door: str, tmp_path: Path) -> None:
    base, model = state("base"), state("a")
    found = set()
    for name in ("lambda", "lambda_"):
        if door == "merge":
            found.add(cm.merge([model], strategy="ties", base=base, **{name: 0.5}).receipt.to_bytes())
        elif door == "MergeState":
            found.add(cm.MergeState(Recipe("ties", **{name: 0.5}), base=base).add(model).resolve().receipt.to_bytes())
        else:
            with cm.Replica.create(tmp_path / name, Recipe("ties", **{name: "0.50"}), base=base) as replica:
                replica.add(model)
                found.add(replica.resolve().receipt.to_bytes())
    assert len(found) == 1

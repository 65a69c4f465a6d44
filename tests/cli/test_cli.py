"""The command line: what it prints where, how it ends, and what it leaves behind, whatever happens to it."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from safetensors.torch import load_file

from crdtmerge import __version__
from crdtmerge.cli.app import app
from crdtmerge.cli.merging import parsed
from crdtmerge.recipe import Recipe
from crdtmerge.resolve.asking import completed, recipe_of
from crdtmerge.strategies import registry
from tests.resolve import models
from tests.resolve.running import ROOT, Ran, environment, here, process, program

COMMANDS = (
    *(
        "merge",
        "verify",
        "inspect",
        "strategies",
        "laws",
        "plan",
        "stats",
        "symmetry",
        "init",
        "add",
        "remove",
        "retract",
        "status",
        "log",
        "show",
    ),
    *("resolve", "recipe", "export", "import", "sync", "serve", "fsck", "gc"),
    *("keys show", "keys import", "keys trust", "keys distrust", "keys invite", "keys grant", "keys revoke"),
)
HEX = set("0123456789abcdef")


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Two models and their base."""
    return [models.save(tmp_path / f"{who}.safetensors", models.state(who)) for who in ("a", "b", "base")]


def ties(inputs: list[Path], *options: object) -> list[object]:
    return ["merge", *inputs[:2], "--base", inputs[2], "--strategy", "ties", *options]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Exit codes and streams


def test_each_end_has_its_exit_code(inputs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert process(*ties(inputs, "-o", out)).code == 0
    assert process("verify", out).code == 0
    receipt = out / "receipt.json"
    receipt.write_bytes(receipt.read_bytes() + b" ")
    assert process("verify", out).code == 1
    receipt.unlink()
    assert process("verify", out).code == 2
    assert process("merge", inputs[0], tmp_path / "nowhere").code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge"],
        ["merge", "a", "--nothing"],
        ["merge", "a", "--threads", "0"],
        ["merge", "a", "--threads", "two"],
        ["nothing"],
        ["verify"],
        ["inspect"],
        ["inspect", "a", "b"],
        ["strategies", "ties", "dare"],
        ["strategies", "ti"],
        ["inspect", "nowhere"],
        [],
    ],
    ids=" ".join,
)
def test_a_wrong_request_ends_with_2_and_says_why_on_stderr(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = here(*arguments)
    assert ran.code == 2
    assert ran.err if arguments else ran.out + ran.err
    assert "Traceback" not in ran.err
    assert names(tmp_path) == set()


def test_the_version_is_printed() -> None:
    assert process("--version").out.strip() == f"crdtmerge {__version__}"


def test_stdout_holds_one_json_document_and_stderr_all_else(inputs: list[Path], tmp_path: Path) -> None:
    copy = models.save_shards(tmp_path / "copy", models.state("a"), 2)
    ran = process("merge", *inputs[:2], copy, "--base", inputs[2], "-o", tmp_path / "out", "--json")
    assert ran.code == 0
    assert ran.out == json.dumps(ran.json, indent=2) + "\n"
    assert ran.err.splitlines() == [
        f"note: {copy} holds the same content as {inputs[0]} and counts once",
        "note: weight_average does not use a base; only its files are carried over",
    ]
    assert process("merge", *inputs[:2], "--json").err == ""


def test_an_error_is_a_json_document_too(inputs: list[Path], tmp_path: Path) -> None:
    ran = process("merge", inputs[0], tmp_path / "nowhere", "--json")
    assert ran.json == {"error": {"kind": "InputError", "message": ran.json["error"]["message"]}}
    assert ran.err == f"error: {ran.json['error']['message']}\n"
    plain = process("merge", inputs[0], tmp_path / "nowhere")
    assert (plain.code, plain.out, plain.err) == (2, "", ran.err)


def test_without_json_a_merge_says_the_same_for_people(inputs: list[Path], tmp_path: Path) -> None:
    found = here(*ties(inputs, "--json")).json
    ran = here(*ties(inputs, "-o", tmp_path / "out"))
    assert (ran.code, ran.err) == (0, "")
    for key in ("root", "merge_id", "output_digest"):
        assert found[key] in ran.out
    assert str(tmp_path / "out") in ran.out
    assert all(str(path) in ran.out for path in inputs)


# merge


def is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= HEX


def test_the_report_of_a_merge_has_these_keys_and_no_others(inputs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = here(*ties(inputs, "--weight", "2", "--weight", "0.50", "-o", out, "--json"))
    report = ran.json
    assert list(report) == [
        *("out", "merge_id", "root", "recipe_id", "strategy", "version", "class", "seed", "contributions", "base"),
        *("tensors", "output_digest", "bytes_read", "bytes_written", "seconds", "fsync_seconds"),
        *("peak_rss_bytes", "peak_anon_bytes"),
    ]
    receipt = json.loads((out / "receipt.json").read_bytes())
    shared = ("merge_id", "root", "recipe_id", "seed", "class", "output_digest")
    assert {key: report[key] for key in shared} == {key: receipt[key] for key in shared}
    assert all(is_digest(report[key]) for key in shared if key != "class")
    assert (report["out"], report["strategy"], report["class"]) == (str(out), "ties", "E")
    assert report["version"] == registry.get("ties").version
    assert report["tensors"] == len(receipt["tensors"]) == 5
    assert report["bytes_written"] == (out / "model.safetensors").stat().st_size
    data = sum(tensor.nbytes for tensor in models.state("a").values())
    assert report["bytes_read"] >= 3 * data
    assert report["seconds"] >= report["fsync_seconds"] >= 0
    assert report["peak_rss_bytes"] >= report["peak_anon_bytes"] >= 0
    ids = {here("inspect", path, "--json").json["id"]: path for path in inputs}
    assert [list(one) for one in report["contributions"]] == [["path", "id", "weight"]] * 2
    assert {one["path"]: one["weight"] for one in report["contributions"]} == {
        str(inputs[0]): "2",
        str(inputs[1]): "0.5",
    }
    assert all(str(ids[one["id"]]) == one["path"] for one in [*report["contributions"], report["base"]])
    assert [one["id"] for one in report["contributions"]] == sorted(one["id"] for one in report["contributions"])


def test_without_out_nothing_is_written_and_the_digests_are_the_same(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = models.tree(tmp_path)
    found = here(*ties(inputs, "--json")).json
    assert models.tree(tmp_path) == before
    assert (found["out"], found["bytes_written"], found["fsync_seconds"]) == (None, 0, 0.0)
    written = here(*ties(inputs, "-o", tmp_path / "out", "--json")).json
    differing = {key for key in found if found[key] != written[key]}
    unequal = {"out", "bytes_written", "seconds", "fsync_seconds", "peak_rss_bytes", "peak_anon_bytes"}
    assert differing <= unequal


def test_receipts_lie_in_the_folder_or_beside_the_file(inputs: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    assert here(*ties(inputs, "-o", place / "out")).code == 0
    assert here(*ties(inputs, "-o", place / "one.safetensors")).code == 0
    assert names(place / "out") == {"model.safetensors", "receipt.json", "inputs.json"}
    one = {"one.safetensors", "one.safetensors.receipt.json", "one.safetensors.inputs.json"}
    assert names(place) == {"out"} | one
    assert (place / "out" / "receipt.json").read_bytes() == (place / "one.safetensors.receipt.json").read_bytes()
    assert (place / "out" / "model.safetensors").read_bytes() == (place / "one.safetensors").read_bytes()
    assert set(load_file(place / "one.safetensors")) == set(models.state("a"))


def test_an_earlier_output_is_replaced_whole(inputs: list[Path], tmp_path: Path) -> None:
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        assert here(*ties(inputs, "-o", out)).code == 0
        assert here("merge", *inputs, "-o", out).code == 0
        assert here("verify", out, "--json").json["answer"] == "same"
        receipt = out / "receipt.json" if out.is_dir() else out.with_name(f"{out.name}.receipt.json")
        assert json.loads(receipt.read_bytes())["recipe"]["strategy"] == "weight_average"


def test_an_output_may_be_an_input_of_the_next_merge(inputs: list[Path], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert here(*ties(inputs, "-o", first)).code == 0
    assert here("merge", first, inputs[0], "-o", second).code == 0
    assert here("verify", second).code == 0


def refused_output(ran: Ran, out: Path, words: str) -> None:
    assert ran.code == 2, ran
    assert ran.json["error"]["kind"] == "OutputError"
    assert str(out) in ran.json["error"]["message"]
    assert words in ran.json["error"]["message"]


def outputs_onto_inputs(tmp_path: Path, inputs: list[Path]) -> dict[str, tuple[list[object], Path]]:
    folder = tmp_path / "in" / "model"
    folder.parent.mkdir()
    models.save_folder(folder, models.state("c"))
    (tmp_path / "link").symlink_to(folder)
    return {
        "a file": (["merge", *inputs], inputs[0]),
        "the base": (ties(inputs), inputs[2]),
        "a folder": (["merge", folder, inputs[0]], folder),
        "a folder above": (["merge", folder, inputs[0]], folder.parent),
        "a folder by a link": (["merge", tmp_path / "link", inputs[0]], folder),
        "a link to a folder": (["merge", folder, inputs[0]], tmp_path / "link"),
        "a folder by another spelling": (["merge", folder, inputs[0]], folder / ".." / "model"),
    }


@pytest.mark.parametrize(
    "case",
    [
        *("a file", "the base", "a folder", "a folder above", "a folder by a link", "a link to a folder"),
        "a folder by another spelling",
    ],
)
def test_an_output_never_replaces_an_input(case: str, inputs: list[Path], tmp_path: Path) -> None:
    arguments, out = outputs_onto_inputs(tmp_path, inputs)[case]
    before = models.tree(tmp_path)
    refused_output(here(*arguments, "-o", out, "--json"), out, "would replace the input")
    assert models.tree(tmp_path) == before


def test_an_output_never_replaces_an_input_that_is_an_earlier_output(inputs: list[Path], tmp_path: Path) -> None:
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        assert here(*ties(inputs, "-o", out)).code == 0
        before = models.tree(tmp_path)
        refused_output(here("merge", out, inputs[0], "-o", out, "--json"), out, "would replace the input")
        assert models.tree(tmp_path) == before


def test_an_output_never_replaces_the_file_of_an_input_folder(inputs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    out = folder / "merged.safetensors"
    assert here(*ties(inputs, "-o", out)).code == 0
    before = models.tree(folder)
    ran = here("merge", folder, inputs[0], "-o", out, "--json")
    assert models.tree(folder) == before
    refused_output(ran, out, "would replace the input")


@pytest.mark.parametrize("kind", ["folder", "file", "file in place of a folder", "folder in place of a file"])
def test_an_output_never_replaces_what_is_not_ours(kind: str, inputs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / ("foreign.safetensors" if "of a file" in kind or kind == "file" else "foreign")
    if kind in ("folder", "folder in place of a file"):
        out.mkdir()
        (out / "work.txt").write_text("of days")
    else:
        out.write_text("of days")
    before = models.tree(tmp_path)
    refused_output(here(*ties(inputs, "-o", out, "--json")), out, "not written by crdtmerge")
    assert models.tree(tmp_path) == before


# What goes wrong with the output


def test_an_output_without_a_folder_to_lie_in_is_refused(inputs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "no" / "where"
    refused_output(here(*ties(inputs, "-o", out, "--json")), out, "does not exist")
    out = inputs[0] / "out"
    refused_output(here(*ties(inputs, "-o", out, "--json")), out, "")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can write")
def test_an_output_where_nobody_can_write_is_refused(inputs: list[Path]) -> None:
    out = Path("/proc/merged")
    refused_output(process(*ties(inputs, "-o", out, "--json")), out, "")


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
@pytest.mark.parametrize("limit", [0, 1000])
def test_a_disk_that_is_full_is_our_error_and_leaves_nothing(
    name: str, limit: int, inputs: list[Path], tmp_path: Path
) -> None:
    before = models.tree(tmp_path)
    done = subprocess.run(
        program(*ties(inputs, "-o", tmp_path / name, "--json")),
        capture_output=True,
        text=True,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        timeout=100,
        check=False,
    )
    refused_output(Ran(done.returncode, done.stdout, done.stderr), tmp_path / name, "cannot be written: File too large")
    assert models.tree(tmp_path) == before


SLOW = """
import os, sys, time
from crdtmerge.weights.writer import Output
write = Output.write
def slowly(self, name, offset, data):
    write(self, name, offset, data)
    os.write(2, b"writing\\n")
    time.sleep(0.2)
Output.write = slowly
from crdtmerge.cli import main
sys.argv = ["crdtmerge", *sys.argv[1:]]
main()
"""


@pytest.fixture
def many(tmp_path: Path) -> list[Path]:
    """Two models of so many tensors that writing them slowly takes a while, and a base."""
    return [
        models.save(tmp_path / f"{who}.safetensors", models.state(who, shapes={f"w{i}": (3,) for i in range(60)}))
        for who in ("a", "b", "base")
    ]


def ended(arguments: list[object], how: signal.Signals) -> tuple[int, str]:
    """Run a merge that writes slowly and send it a signal after its first write: (exit code, all of stderr)."""
    command = [sys.executable, "-c", SLOW, *map(str, arguments), "--threads", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment()) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "writing\n"
        time.sleep(0.3)
        child.send_signal(how)
        rest = child.stderr.read()
    return child.returncode, rest


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_merge_that_is_killed_leaves_no_output(name: str, earlier: bool, many: list[Path], tmp_path: Path) -> None:
    out = tmp_path / name
    if earlier:
        assert here("merge", *many, "-o", out).code == 0
    before = models.tree(tmp_path)
    assert ended(ties(many, "-o", out), signal.SIGKILL)[0] == -signal.SIGKILL
    after = models.tree(tmp_path)
    assert {path: found for path, found in after.items() if not path.startswith(f".{name}.crdtmerge-")} == before
    assert out.exists() == earlier
    assert here(*ties(many, "-o", out)).code == 0
    assert here("verify", out).code == 0


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_merge_that_is_interrupted_ends_with_130_and_removes_what_it_staged(
    name: str, many: list[Path], tmp_path: Path
) -> None:
    before = models.tree(tmp_path)
    code, said = ended(ties(many, "-o", tmp_path / name), signal.SIGINT)
    assert code == 130
    assert "Traceback" not in said
    assert models.tree(tmp_path) == before


def test_a_merge_that_is_interrupted_says_so(many: list[Path], tmp_path: Path) -> None:
    assert "interrupted" in ended(ties(many, "-o", tmp_path / "out"), signal.SIGINT)[1]


# Help


WIDE = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


def told(*arguments: str) -> str:
    with pytest.MonkeyPatch.context() as own:
        for name, value in WIDE.items():
            own.setenv(name, value)
        ran = here(*arguments)
    assert (ran.code, ran.err) == (0, "")
    return ran.out


def commands(group: Any) -> dict[str, Any]:
    """The commands of a group and of the groups in it, by the words that call them."""
    found = {}
    for name, command in group.commands.items():
        below = commands(command) if hasattr(command, "commands") else {"": command}
        found |= {f"{name} {rest}".strip(): one for rest, one in below.items()}
    return found


ALL = commands(typer.main.get_command(app))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_lists_every_option_with_words(command: str) -> None:
    text = told(*command.split(), "--help")
    found = ALL[command]
    for parameter in found.params:
        assert all(option in text for option in parameter.opts if option.startswith("-")), parameter.name
    assert found.help.splitlines()[0] in " ".join(text.split()) or found.help.splitlines()[0] in text
    assert told(*command.split(), "-h") == text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_ends_with_an_example_that_it_takes(command: str) -> None:
    found = ALL[command]
    example = shlex.split(found.epilog.removeprefix("Example: "))
    words = command.split()
    assert example[: len(words) + 1] == ["crdtmerge", *words]
    assert found.make_context(command, example[len(words) + 1 :]).params


def test_the_help_of_the_program_lists_every_command() -> None:
    text, keys = process("--help", settings=WIDE).out, told("keys", "--help")
    assert text.partition("[OPTIONS]")[2] == told("--help").partition("[OPTIONS]")[2]
    assert all(command.split()[0] in text for command in COMMANDS)
    assert all(command.split()[1] in keys for command in COMMANDS if command.startswith("keys "))
    assert {*COMMANDS, "demo"} == set(ALL)


UNSAID = {"threads of verify"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is(command: str) -> None:
    silent = {f"{p.name} of {command}" for p in ALL[command].params if not getattr(p, "help", "x") and p.name != "help"}
    assert silent <= UNSAID


# strategies


def test_the_list_of_strategies_is_a_list() -> None:
    listed = process("strategies", "--json").json
    assert [row["name"] for row in listed] == sorted(registry.BUILT_IN)
    for row in listed:
        keys = {"name", "version", "family", "class", "needs", "parameters", "reference"}
        assert keys <= row.keys()
        assert row["class"] in ("E", "P")
        assert row["version"] >= 1
        assert row["needs"]["base"] in ("required", "optional", "unused")
        assert row["reference"]
        assert all({"default", "type", "description"} == set(told) for told in row["parameters"].values())
        assert all(told["description"] for told in row["parameters"].values())


def test_the_bounds_of_a_number_are_told() -> None:
    parameters = here("strategies", "ties", "--json").json[0]["parameters"]
    assert (parameters["density"]["default"], parameters["density"]["type"]) == ("0.2", "number > 0 <= 1")


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_one_strategy_is_told_in_the_same_form(name: str) -> None:
    (row,) = here("strategies", name, "--json").json
    assert row in here("strategies", "--json").json
    text = here("strategies", name).out
    assert row["reference"] in text
    assert all(f"{parameter} = {told['default']}" in text for parameter, told in row["parameters"].items())
    assert name in here("strategies").out


def test_every_default_that_is_told_may_be_said() -> None:
    for row in here("strategies", "--json").json:
        sayable = {n: told["default"] for n, told in row["parameters"].items() if told["default"] not in (None, "")}
        words = {
            n: ",".join(f"{key}={value}" for key, value in default.items()) if isinstance(default, dict) else default
            for n, default in sayable.items()
        }
        said, _ = recipe_of(row["name"], parsed([f"{n}={word}" for n, word in words.items()]))
        assert completed(said, bytes(32)).id == completed(Recipe(row["name"]), bytes(32)).id, row["name"]


# inspect


def test_inspect_tells_tensors_and_the_id_that_a_merge_knows(inputs: list[Path], tmp_path: Path) -> None:
    tensors = models.state("a") | {"odd": torch.tensor([1.0, float("nan"), float("inf")])}
    path = models.save(tmp_path / "odd.safetensors", tensors)
    found = here("inspect", path, "--json").json
    assert list(found) == ["path", "id", "bytes", "tensors"]
    assert found["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert [(row["name"], row["shape"], row["nonfinite"]) for row in found["tensors"]] == [
        (name, list(tensors[name].shape), 2 if name == "odd" else 0) for name in sorted(tensors)
    ]
    assert all(is_digest(row["digest"]) for row in found["tensors"])
    text = here("inspect", path).out
    assert found["id"] in text
    assert "2 NaN or infinite" in text
    merged = here("merge", *inputs[:2], "--json").json
    assert here("inspect", inputs[0], "--json").json["id"] in {one["id"] for one in merged["contributions"]}


# Names that would do something to a terminal

ESCAPE = "\x1b]0;evil\x07\x1b[31m"


def test_names_of_tensors_are_printed_quoted(tmp_path: Path) -> None:
    name = "w\u202eevil\u2066\ue000"
    a = models.save(tmp_path / "a.safetensors", {name: torch.ones(2), "x": torch.ones(1)})
    b = models.save(tmp_path / "b.safetensors", {"x": torch.ones(1)})
    for ran in (process("inspect", a), process("merge", a, b), process("merge", a, b, "--json")):
        assert (ran.out + ran.err).isascii()
        assert "u202eevil" in ran.out + ran.err


def test_names_with_control_characters_are_refused_and_printed_quoted(tmp_path: Path) -> None:
    path = models.save(tmp_path / "a.safetensors", {ESCAPE: torch.ones(2)})
    ran = process("inspect", path)
    assert ran.code == 2
    assert "\x1b" not in ran.out + ran.err
    assert "\\x1b" in ran.err


def test_paths_are_printed_quoted(tmp_path: Path) -> None:
    path = models.save(tmp_path / f"{ESCAPE}.safetensors", models.state("a"))
    for ran in (process("merge", path), process("merge", path, path), process("merge", tmp_path / ESCAPE)):
        assert "\x1b" not in ran.out + ran.err


def test_paths_that_came_with_an_output_are_printed_quoted(inputs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert here(*ties(inputs, "-o", out)).code == 0
    hints = json.loads((out / "inputs.json").read_bytes())
    hints["contributions"][0]["path"] = f"/nowhere/{ESCAPE}"
    (out / "inputs.json").write_text(json.dumps(hints))
    ran = process("verify", out)
    assert ran.code == 2
    assert "\x1b" not in ran.out + ran.err


def test_a_path_that_is_no_utf8_is_merged_and_told(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.safetensors"))
    path.write_bytes(models.save(tmp_path / "a.safetensors", models.state("a")).read_bytes())
    ran = process("merge", path, "-o", tmp_path / "out", settings={"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"})
    assert ran.code == 0, ran.err
    assert process("verify", tmp_path / "out").code == 0


# Inputs as they lie in caches


def hub_cache(folder: Path, who: str, shards: int) -> Path:
    """A model as huggingface_hub keeps it: a snapshot of links into a folder of blobs."""
    real = models.save_shards(folder / f"{who}-real", models.state(who), shards)
    home = folder / f"models--org--{who}"
    snapshot = home / "snapshots" / "0123abc"
    (home / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(real.iterdir())):
        path.rename(home / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / f"{number:064x}")
    real.rmdir()
    return snapshot


def test_models_in_the_cache_of_the_hub_are_merged_and_verified(inputs: list[Path], tmp_path: Path) -> None:
    a, b = hub_cache(tmp_path, "a", 2), hub_cache(tmp_path, "b", 3)
    out = tmp_path / "out"
    found = here("merge", a, b, "--base", inputs[2], "--strategy", "ties", "-o", out, "--json").json
    assert found["output_digest"] == here(*ties(inputs, "--json")).json["output_digest"]
    assert found["merge_id"] == here(*ties(inputs, "--json")).json["merge_id"]
    assert here("verify", out).code == 0
    assert not any(path.is_symlink() for path in out.iterdir())


def test_a_link_to_a_file_may_be_given_as_a_model(inputs: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(inputs[0])
    assert here("merge", link, inputs[1], "--json").json["root"] == here("merge", *inputs[:2], "--json").json["root"]


def test_a_link_out_of_a_folder_is_not_followed(inputs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(inputs[0])
    ran = here("merge", folder, inputs[1], "--json")
    assert ran.code == 2
    assert ran.json["error"]["kind"] == "CheckpointError"
    assert "outside its folder" in ran.json["error"]["message"]

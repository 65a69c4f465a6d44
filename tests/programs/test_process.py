"""The process that runs a program: what it refuses to load, how it ends, and a plan that goes on after a kill."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from crdtmerge.cli.app import app
from crdtmerge.errors import InputError, MismatchError, NeedsError, OutputError
from crdtmerge.programs.archive import cleaned
from crdtmerge.programs.exported import Program
from crdtmerge.programs.messages import receive, send
from crdtmerge.programs.runner import Runner
from crdtmerge.testing.programs import write
from tests.programs.conftest import Loaded, around, normal


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def rewritten(data: bytes, change: Callable[[str, bytes], bytes], more: dict[str, bytes] | None = None) -> bytes:
    """An archive with its records changed."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(written, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename.partition("/")[2], old.read(info)))
        for name, record in (more or {}).items():
            new.writestr(info.filename.partition("/")[0] + "/" + name, record)
    return written.getvalue()


def changed_json(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[str, bytes], bytes]:
    def apply(record: str, data: bytes) -> bytes:
        if record != name:
            return data
        table = json.loads(data)
        change(table)
        return json.dumps(table).encode()

    return apply


def loaded(data: bytes, path: Path) -> Program:
    path.write_bytes(data)
    return Program(str(path), hashlib.sha256(data).hexdigest())


def torch_pickle(value: object) -> bytes:
    written = io.BytesIO()
    torch.save(value, written)
    return written.getvalue()


def test_sample_inputs_are_never_unpickled(classifier: Loaded, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    evil = torch_pickle(((Trap(trap),), {}))
    data = rewritten(
        classifier.path.read_bytes(), lambda name, old: evil if name.startswith("data/sample_inputs/") else old
    )
    program = loaded(data, tmp_path / "evil.pt2")
    assert program.parameters == ["linear.weight", "linear.bias"]
    assert not trap.exists()
    torch.load(io.BytesIO(evil), weights_only=False)
    assert trap.exists(), "the trap is one"


@pytest.mark.parametrize("kind", ["weights", "constants", "object"])
def test_pickled_weights_and_objects_are_refused_unread(classifier: Loaded, tmp_path: Path, kind: str) -> None:
    trap = tmp_path / "sprung"
    record, path = {
        "weights": ("data/weights/model_weights_config.json", "weight_9"),
        "constants": ("data/constants/model_constants_config.json", "tensor_0"),
        "object": ("data/constants/model_constants_config.json", "opaque_obj_0"),
    }[kind]
    entry = {"path_name": path, "is_param": False, "use_pickle": kind != "object", "tensor_meta": None}
    evil = pickle.dumps(Trap(trap)) if kind == "object" else torch_pickle(Trap(trap))
    data = rewritten(
        classifier.path.read_bytes(),
        changed_json(record, lambda table: table["config"].update({"x": entry})),
        {f"{record.rpartition('/')[0]}/{path}": evil},
    )
    with pytest.raises(InputError, match="names a pickle or an object"):
        loaded(data, tmp_path / "evil.pt2")
    assert not trap.exists()


def nodes(table: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table["graph_module"]["graph"]["nodes"]
    return found


def expressions(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "expr_str" in value:
            yield value
        for item in value.values():
            yield from expressions(item)
    elif isinstance(value, list):
        for item in value:
            yield from expressions(item)


def calls(table: dict[str, Any]) -> None:
    nodes(table)[0]["target"] = "torch.os.system"


def evaluates(table: dict[str, Any]) -> None:
    next(expressions(table))["expr_str"] = "__import__('pathlib').Path('sprung').touch()"


def names_code(table: dict[str, Any]) -> None:
    nodes(table)[0]["outputs"][0]["as_tensor"]["name"] = "x\n    import os"


@pytest.mark.parametrize(
    ("change", "said"),
    [(calls, "calls 'torch.os.system'"), (evaluates, "is no arithmetic"), (names_code, "is no identifier")],
)
def test_a_graph_that_leads_to_code_is_refused(
    classifier: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    data = rewritten(classifier.path.read_bytes(), changed_json("models/model.json", change))
    with pytest.raises(InputError, match=said):
        loaded(data, tmp_path / "evil.pt2")
    assert not Path("sprung").exists()


def test_guards_in_python_are_left_out(classifier: Loaded) -> None:
    data = rewritten(
        classifier.path.read_bytes(),
        changed_json("models/model.json", lambda table: table.update({"guards_code": ["open('sprung', 'w')"]})),
    )
    with zipfile.ZipFile(cleaned(data)) as archive:
        (name,) = [one for one in archive.namelist() if one.endswith("models/model.json")]
        assert json.loads(archive.read(name))["guards_code"] == []


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"x" * 100, pickle.dumps([1, 2])])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InputError, match="the program is not taken"):
        loaded(data, tmp_path / "no.pt2")


def test_an_archive_cut_off_anywhere_is_refused(classifier: Loaded, tmp_path: Path) -> None:
    data = classifier.path.read_bytes()
    for length in range(0, len(data), 997):
        with pytest.raises(InputError):
            loaded(data[:length], tmp_path / "cut.pt2")


def test_records_that_come_twice_or_are_compressed_are_refused(classifier: Loaded, tmp_path: Path) -> None:
    data = classifier.path.read_bytes()
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = rewritten(data, lambda name, old: old, {"models/model.json": b"{}"})
    with pytest.raises(InputError, match="comes twice"):
        loaded(twice, tmp_path / "twice.pt2")
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(InputError, match="compressed"):
        loaded(packed.getvalue(), tmp_path / "packed.pt2")


def test_a_program_of_another_digest_is_not_loaded(classifier: Loaded) -> None:
    with pytest.raises(MismatchError, match="It is not loaded"):
        Program(str(classifier.path), "00" * 32)


def test_a_program_in_training_mode_is_refused(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)).train()
    torch.export.save(torch.export.export(module, (torch.zeros(2, 2),)), tmp_path / "train.pt2")
    with pytest.raises(InputError, match=r"evaluation mode \(module\.eval\(\)\)"):
        loaded((tmp_path / "train.pt2").read_bytes(), tmp_path / "train.pt2")


@pytest.mark.parametrize(
    "data", [b"\xff" * 8, (1 << 40).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]", b"\x10"]
)
def test_messages_that_are_none_are_refused(data: bytes) -> None:
    if len(data) < 8:
        assert receive(io.BytesIO(data)) is None
        return
    with pytest.raises(InputError):
        receive(io.BytesIO(data))


def test_messages_arrive_as_they_were_sent() -> None:
    written = io.BytesIO()
    tensors = {"a": normal(1, 3, 4), "b": torch.arange(5), "c": torch.zeros(0, 3, dtype=torch.bfloat16)}
    send(written, {"do": "x", "n": [1, None]}, tensors)
    found = receive(io.BytesIO(written.getvalue()))
    assert found is not None
    assert found[0] == {"do": "x", "n": [1, None]}
    assert all(torch.equal(found[1][name], x) and found[1][name].dtype == x.dtype for name, x in tensors.items())
    assert receive(io.BytesIO(written.getvalue()[:-1])) is None


def test_one_process_runs_many_jobs_and_says_what_is_wrong(classifier: Loaded) -> None:
    """The same numbers as in this process; errors keep their kind; after one it goes on; a death has last words."""
    data = {"inputs": normal(5, 10, 4), "labels": torch.tensor([0, 1, 2, 1, 0, 0, 2, 2, 1, 0])}
    here = classifier.run("fisher", data, {"model": classifier.state}).tensors
    with Runner(classifier.path, classifier.digest) as runner:
        runner.keep("data", data)
        for name, x in classifier.state.items():
            runner.keep("model", {name: x}, anew=name == "linear.weight")
        steps: list[tuple[int, int]] = []
        found = runner.run("fisher", {}, ["model"], progress=lambda *done: steps.append(done)).tensors
        assert all(torch.equal(found[name], x) for name, x in here.items())
        assert steps == [(n, 10) for n in range(1, 11)]
        with pytest.raises(NeedsError, match=r"needs '.*labels'|each number"):
            runner.run("fitness", {"metric": "squared_error"}, ["model"])
        assert runner.run("fitness", {"metric": "loss"}, ["model"]).values
        os.kill(runner.pid, signal.SIGSEGV)
        with pytest.raises(InputError, match="ended by signal 11; its last words"):
            runner.run("fitness", {"metric": "loss"}, ["model"])


PARENT = """
import sys
from pathlib import Path
from crdtmerge.programs.runner import Runner
runner = Runner(Path(sys.argv[1]), bytes.fromhex(sys.argv[2]))
print(runner.pid, flush=True)
runner._answer()
"""


def test_the_process_ends_with_its_parent_whatever_kills_it(classifier: Loaded) -> None:
    command = [sys.executable, "-c", PARENT, str(classifier.path), classifier.digest.hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
    assert gone_within(child, 10)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


def test_a_plan_that_was_killed_goes_on_and_is_the_same(classifier: Loaded, tmp_path: Path) -> None:
    """With steps as many as take a while; what was killed leaves a state, and the same command ends sooner."""
    write(classifier.state, tmp_path / "base.safetensors")
    for name, seed in (("a", 30), ("b", 40)):
        write(around(classifier.state, seed), tmp_path / f"{name}.safetensors")
    write({"inputs": normal(5, 40, 4)}, tmp_path / "data.safetensors")

    def command(out: str, steps: int = 1500) -> list[str]:
        models = ["a.safetensors", "b.safetensors", "--base", "base.safetensors", "--strategy", "ada_merging"]
        inputs = ["--input", f"program={classifier.path}", "--input", "data=data.safetensors"]
        program = [sys.executable, "-m", "crdtmerge", "plan"]
        return [*program, *models, *inputs, "--set", f"steps={steps}", "-o", out, "--json"]

    steps = tmp_path / "killed.plan.steps"
    with subprocess.Popen(command("killed.plan"), cwd=tmp_path, stdout=subprocess.PIPE) as first:
        until = time.monotonic() + 60
        while not steps.exists() and first.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        first.kill()
    assert steps.exists()
    assert not (tmp_path / "killed.plan").exists()
    read = receive(io.BytesIO(steps.read_bytes()))
    assert read is not None
    assert 0 < read[0]["step"] < 1500
    for out in ("killed.plan", "whole.plan"):
        subprocess.run(command(out), cwd=tmp_path, check=True, stdout=subprocess.PIPE)
    assert (tmp_path / "killed.plan").read_bytes() == (tmp_path / "whole.plan").read_bytes()
    assert not list(tmp_path.glob("*.steps"))
    program = [sys.executable, "-m", "crdtmerge", "merge", "a.safetensors", "b.safetensors", "--json"]
    asked = ["--base", "base.safetensors", "--strategy", "ada_merging", "--set", "steps=1500"]
    done = subprocess.run([*program, *asked, "--plan", "whole.plan"], cwd=tmp_path, check=True, stdout=subprocess.PIPE)
    assert json.loads(done.stdout)["class"] == "E", "with a plan that is named neither program nor data is needed"
    other = [*program, *asked[:-1], "steps=1499", "--plan", "whole.plan"]
    refused = subprocess.run(other, cwd=tmp_path, check=False, capture_output=True)
    assert refused.returncode == 2
    assert b"is the plan of merge" in refused.stdout


def test_statistics_are_written_beside_a_model_and_replaced(classifier: Loaded, tmp_path: Path) -> None:
    write(classifier.state, tmp_path / "a.safetensors")
    write(around(classifier.state, 3), tmp_path / "o.safetensors")
    data = {"inputs": normal(5, 6, 4), "labels": torch.tensor([0, 1, 2, 1, 0, 0])}
    write(data, tmp_path / "data.safetensors")
    files = ["--program", str(classifier.path), "--data", str(tmp_path / "data.safetensors"), "--json"]
    command = ["stats", "importance", str(tmp_path / "a.safetensors"), "--base", str(tmp_path / "o.safetensors")]
    for _ in range(2):
        done = CliRunner().invoke(app, [*command, *files])
        assert done.exit_code == 0, done.output
        one, other = json.loads(done.stdout)["statistics"]
        assert [one["name"], other["name"]] == ["importance", "importance_base"]
        path = tmp_path / "a.importance.safetensors"
        assert one["path"] == str(path)
        assert one["digest"] == hashlib.sha256(path.read_bytes()).hexdigest()
    here = classifier.run("importance", data, {"model": classifier.state}).tensors
    assert all(torch.equal(load_file(path)[name], x) for name, x in here.items())
    assert (tmp_path / "a.importance_base.safetensors").exists()
    (tmp_path / "a.fisher.safetensors").write_bytes(b"mine")
    refused = CliRunner().invoke(app, ["stats", "fisher", command[2], *files])
    assert isinstance(refused.exception, OutputError)
    assert (tmp_path / "a.fisher.safetensors").read_bytes() == b"mine"

"""``crdtmerge stats``: what a model does with data, computed by running it and stored beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdtmerge.cli.console import emit, say, tell
from crdtmerge.cli.replica_options import AsJson

if TYPE_CHECKING:
    from torch import Tensor

    from crdtmerge.programs.runner import Runner
    from crdtmerge.resolve.sources import FileSource

KINDS = ("fisher", "gram", "importance", "activations")

FORMAT = "crdtmerge/statistic/1"


def stats(
    kind: Annotated[str, typer.Argument(metavar="fisher|gram|importance|activations", help="What is computed.")],
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint: a .safetensors file or a folder.")],
    program: Annotated[
        Path, typer.Option(metavar="FILE", help="The model as a program of torch.export, with the checkpoint's names.")
    ],
    data: Annotated[
        Path,
        typer.Option(metavar="FILE", help="A safetensors file with 'inputs' [n, ...] and, if needed, 'labels' [n]."),
    ],
    base: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="For importance: compute importance_base of this model too.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="By default MODEL.KIND.safetensors beside it.")
    ] = None,
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Labels drawn an example for fisher, of more than 64 classes.")
    ] = 1,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the program runs.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Compute a statistic of a model on data, for strategies that weigh parameters by it.

    The program runs in a process of its own. Results are the same with the same build of torch. A program can hold
    code: give only one that you made or trust.
    """
    from crdtmerge.cli.merging import check_device
    from crdtmerge.errors import UsageError
    from crdtmerge.programs.runner import Runner
    from crdtmerge.resolve.beside import file_digest
    from crdtmerge.resolve.inner import batches_of

    if kind not in KINDS:
        raise UsageError(f"statistics are {', '.join(KINDS)}; {kind!a:.40} is none of them.")
    if base is not None and kind != "importance":
        raise UsageError(f"--base is for importance alone; {kind} is of one model.")
    check_device(device)
    wanted = [(kind, model, out or beside(model, kind))]
    if base is not None:
        wanted.append(
            (f"{kind}_base", base, _sibling(wanted[0][2], f"{kind}_base") if out else beside(model, f"{kind}_base"))
        )
    begin = time.perf_counter()
    names = {name: file_digest(path, f"the {name}") for name, path in (("program", program), ("data", data))}
    reports = []
    with counting(quiet=as_json) as show, Runner(program, names["program"], device=device) as runner:
        runner.keep("data", batches_of(data, names["data"]))
        for name, source, target in wanted:
            reports.append(_computed(kind, name, source, target, runner, names, samples, show))
    seconds = round(time.perf_counter() - begin, 6)
    if as_json:
        emit({"statistics": reports, "seconds": seconds})
        return
    for report in reports:
        tell(f"{report['name']} of {report['model']}, {report['tensors']} tensors -> {report['path']}")
        tell(f"  digest {report['digest']}")
    given = " ".join(f"--stats {report['name']}={report['path']}" for report in reports)
    tell(f"  in {seconds:.2f} s; give it with {given}")


def beside(model: Path, kind: str) -> Path:
    """Where a model's statistic lies by default.

    >>> beside(Path("ft/a.safetensors"), "fisher").as_posix(), beside(Path("ft-a/"), "gram").as_posix()
    ('ft/a.fisher.safetensors', 'ft-a.gram.safetensors')
    """
    model = model if model.name else model.resolve()
    return model.with_name(f"{model.name.removesuffix('.safetensors')}.{kind}.safetensors")


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.{kind}.safetensors")


def _computed(
    kind: str,
    name: str,
    model: Path,
    target: Path,
    runner: Runner,
    inputs: Mapping[str, bytes],
    samples: int,
    show: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Compute and write one statistic; what is told of it."""
    from crdtmerge.numerics.workers import Workers
    from crdtmerge.resolve.gather import known
    from crdtmerge.resolve.inner import whole
    from crdtmerge.resolve.sources import FileSource
    from crdtmerge.weights.cache import DigestCache
    from crdtmerge.weights.facts import refuse_nonfinite

    with closing(FileSource(model)) as source:
        with Workers() as workers:
            found = known(source, workers, DigestCache(), lambda read: None)
        refuse_nonfinite(found.facts, lambda name: False, source.where, "mend it first")
        for at, tensor in enumerate(source.entries):
            runner.keep("model", {tensor: whole(source, tensor)}, anew=at == 0)
        source.check_unchanged()
        ran = runner.run(
            kind, {"samples": samples}, ["model"], progress=lambda done, total: show(f"{name} of {model}", done, total)
        )
        digest = _written(target, ran.tensors, {"kind": name, "model": found.id.hex()}, inputs)
        _tell_left_out(name, source, ran.tensors)
    return {
        "name": name,
        "model": str(model),
        "id": found.id.hex(),
        "path": str(target),
        "digest": digest,
        "tensors": len(ran.tensors),
    }


def _tell_left_out(name: str, source: FileSource, tensors: Mapping[str, Tensor]) -> None:
    from crdtmerge.errors import some

    lacking = [one for one, entry in source.entries.items() if entry.dtype.floating and one not in tensors]
    if lacking and name != "gram" and name != "activations":
        say(f"note: no {name} of {some(lacking)}: the program has no such parameter")


def _written(path: Path, tensors: Mapping[str, Tensor], said: Mapping[str, str], inputs: Mapping[str, bytes]) -> str:
    """Write a statistic with what it was made of; its digest. Raises OutputError."""
    from crdtmerge.errors import InputError, OutputError
    from crdtmerge.resolve.beside import file_digest
    from crdtmerge.resolve.receipt import json_bytes
    from crdtmerge.resolve.sources import MemorySource
    from crdtmerge.weights.layout import plan_output
    from crdtmerge.weights.writer import RECEIPT_NAME, Output

    if path.suffix != ".safetensors":
        raise OutputError(f"{path}: a statistic's name ends in .safetensors.")
    if not tensors:
        raise InputError(f"{path}: the program has no layer or parameter with a name of the checkpoint.")
    source = MemorySource({name: x.contiguous() for name, x in tensors.items()}, str(path))
    table = [(entry.name, entry.dtype, entry.shape) for entry in source.entries.values()]
    made = {"format": FORMAT, **said, "inputs": {name: digest.hex() for name, digest in inputs.items()}}
    with Output(path, plan_output(table, single_file=path.name), folder=False) as output:
        for name in source.entries:
            output.write(name, 0, source.raw(name))
        output.add(f"{path.name}.{RECEIPT_NAME}", json_bytes(made))
        output.commit()
    return file_digest(path, "the statistic").hex()


@contextmanager
def counting(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for (stage, steps done, steps in all), where stderr is a terminal."""
    import sys

    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance

"""``crdtmerge symmetry``: what of a program's parameters may be reordered together, found and tried, as a file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdtmerge.cli.console import emit, say, tell
from crdtmerge.cli.replica_options import AsJson

if TYPE_CHECKING:
    from crdtmerge.symmetry.groups import Axis, Group, Symmetry

SEED = bytes(32)
"""Of the made-up inputs."""

EXAMPLES = 3

AXES_SHOWN = 3


def symmetry(
    program: Annotated[
        Path, typer.Option(metavar="FILE", help="The model as a program of torch.export, with the checkpoint's names.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Write the symmetry there, as JSON.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the groups of parameters that may be reordered together without changing what a program computes.

    They are derived from the program's graph and tried: all are reordered at random, and the results compared, on
    made-up inputs. Operators that are not understood only cost groups. The file is what aligned merges need of the
    architecture; as symmetry.json in a checkpoint's folder it travels with it. The program runs in a process of its
    own; give only one that you made or trust. Exit code 1 where reordering changes a result: nothing is written then.
    """
    from crdtmerge.programs.runner import Runner
    from crdtmerge.resolve import plan_file
    from crdtmerge.resolve.beside import file_digest
    from crdtmerge.symmetry.groups import decode

    begin = time.perf_counter()
    if out is not None:
        _check_place(out)
    digest = file_digest(program, "the program")
    with Runner(program, digest) as runner:
        asked = {"probe": "noise", "seed": SEED.hex(), "examples": EXAMPLES}
        values = runner.run("symmetry", asked, []).values
    text = str(values["symmetry"]).encode()
    found = decode(text, f"the groups of {program}")
    wrong = [int(i) for i in values["failing"]]
    if out is not None and not wrong:
        plan_file.put(out, text)
    seconds = round(time.perf_counter() - begin, 6)
    if as_json:
        emit(_report(found, values, wrong, None if wrong else out, seconds))
    else:
        _show(found, values, wrong, None if wrong else out, seconds)
    if wrong:
        say("error: reordering changes what the program computes; nothing was written. Do not align with these groups.")
        raise typer.Exit(1)


def _check_place(path: Path) -> None:
    """Raise OutputError unless a symmetry may be written there: nothing stands there, or a symmetry."""
    from crdtmerge.errors import OutputError
    from crdtmerge.symmetry.groups import FORMAT

    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist; create it first.")
    head = f'{{"format":"{FORMAT}"'.encode()
    if os.path.lexists(path):
        try:
            with path.open("rb") as file:
                ours = path.is_file() and file.read(len(head)) == head
        except OSError:
            ours = False
        if not ours:
            raise OutputError(f"{path}: exists and is no symmetry; choose another -o or remove it.")


def _report(
    found: Symmetry, values: Mapping[str, Any], wrong: list[int], out: Path | None, seconds: float
) -> dict[str, Any]:
    return {
        "digest": found.digest.hex(),
        "groups": [
            {"size": group.size, "axes": [[name, at, int(consumes)] for name, at, consumes in group.axes]}
            for group in found.groups
        ],
        "tied": [list(names) for names in found.tied],
        "not_understood": list(values["frozen"]),
        "change": values["change"],
        "failing": wrong,
        "out": str(out) if out else None,
        "seconds": seconds,
    }


def _show(found: Symmetry, values: Mapping[str, Any], wrong: list[int], out: Path | None, seconds: float) -> None:
    rows = [("group", "size", "made by", "consumed by")]
    for i, group in enumerate(found.groups):
        rows.append((f"{i}{' CHANGES' if i in wrong else ''}", str(group.size), *_sides(found, group)))
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        tell("  ".join([row[0].ljust(wide[0]), row[1].rjust(wide[1]), row[2].ljust(wide[2]), row[3]]).rstrip())
    change = values["change"]
    tell(
        f"{len(found.groups)} groups; random permutations change results by at most "
        f"{'something infinite' if change is None else f'{float(change):.1e}'}; in {seconds:.2f} s"
    )
    for names in found.tied:
        tell(f"tied: {', '.join(names)}")
    for name in values["frozen"]:
        tell(f"not understood, so not reordered: what {name!s} is given and gives")
    tell(f"digest {found.digest.hex()}" + (f" -> {out}" if out else ""))


def _sides(found: Symmetry, group: Group) -> tuple[str, str]:
    """The axes that make or scale a group's units, and those that consume them."""
    return tuple(  # type: ignore[return-value]
        _listed(found, [axis for axis in group.axes if axis.consumes == consumes]) for consumes in (False, True)
    )


def _listed(found: Symmetry, axes: list[Axis]) -> str:
    shown = ", ".join(_named(found, axis) for axis in axes[:AXES_SHOWN])
    return shown + (f" and {len(axes) - AXES_SHOWN} more" if len(axes) > AXES_SHOWN else "") or "-"


def _named(found: Symmetry, axis: Axis) -> str:
    """A tensor with its dimension, and the factor of it where it has several: ``q.weight[0.1]``."""
    at = axis.position
    for dimension, factors in enumerate(found.tensors[axis.tensor]):
        if at < len(factors):
            return f"{axis.tensor}[{dimension}{f'.{at}' if len(factors) > 1 else ''}]"
        at -= len(factors)
    raise AssertionError("an axis is one of its tensor's factors")

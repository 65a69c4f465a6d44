"""``crdtmerge add``, ``remove`` and ``retract``: what a pool's set holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdtmerge.cli.console import emit, progress, quoted, say, tell
from crdtmerge.cli.replica_options import (
    HERE,
    AsJson,
    ContentId,
    PoolFolder,
    Reason,
    Statistics,
    Threads,
    named_paths,
    short,
    size,
)

if TYPE_CHECKING:
    from crdtmerge.pool.replica import Ended


def add(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint: a .safetensors file or a folder.")],
    weight: Annotated[str | None, typer.Option(metavar="W", help="Its weight; an exact decimal, 1 by default.")] = None,
    role: Annotated[str | None, typer.Option(metavar="R", help="task, forget, unlearned or safety.")] = None,
    task: Annotated[str | None, typer.Option(metavar="T", help="The name of its task.")] = None,
    note: Annotated[str | None, typer.Option(metavar="TEXT", help="A line that everyone in the pool will see.")] = None,
    replaces: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="A contribution of yours that this one takes the place of.")
    ] = None,
    stats: Statistics = None,
    pool: PoolFolder = HERE,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Add a model to the pool's set.

    It is read once, hashed and copied in one pass; tensors that are here already are not stored again. What is left
    out is unsaid: adding it again without a weight leaves its weight as it is.
    """
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica, progress(quiet=as_json) as show:
        gone = [replica.find_content(prefix) for prefix in replaces or []]
        added = replica.add(
            model,
            weight=weight,
            role=role,
            task=task,
            stats=named_paths("--stats", stats),
            note=note,
            replaces=gone,
            threads=threads,
            progress=show,
        )
    for line in added.notes:
        say(f"note: {line}")
    entry = added.entry
    if as_json:
        emit(
            {
                "id": added.id.hex(),
                "op": added.op.hex(),
                "weight": str(entry.weight) if entry else None,
                "role": entry.role if entry else None,
                "visible": entry is not None,
                "bytes": added.nbytes,
                "new_bytes": added.new_bytes,
            }
        )
        return
    tell(f"added {added.id.hex()}")
    if entry is None:
        tell("  hidden all the same: it is retracted; `crdtmerge log` says by whom and why")
    else:
        tell(
            f"  weight {entry.weight}, role {entry.role}"
            + (f", task {quoted(entry.claim.task)}" if entry.claim.task else "")
        )
        for name, found in entry.claim.stats.items():
            tell(f"  {name} {short(found)}")
    tell(f"  {size(added.nbytes)}, {size(added.new_bytes)} of it new here")


def remove(content: ContentId, reason: Reason = None, pool: PoolFolder = HERE, as_json: AsJson = False) -> None:
    """Remove a contribution from the pool's set.

    A curator ends everyone's ADDs of it that are known here, others their own. Whoever adds it again, or did so at the
    same time elsewhere, brings it back: `crdtmerge retract` hides it for good.
    """
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica:
        ended = replica.remove(replica.find_content(content), reason)
    _report("removed", ended, as_json)


def retract(
    content: ContentId,
    reason: Reason = None,
    undo: Annotated[bool, typer.Option("--undo", help="End the retractions that are known here instead.")] = False,
    pool: PoolFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Hide a contribution for good, also where others add it at the same time or later: for poisoned models.

    A curator hides everyone's, others their own. ID may also be a full id that was not seen here yet.
    """
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica:
        found = _full(content) or replica.find_content(content)
        ended = replica.unretract(found, reason) if undo else replica.retract(found, reason)
    _report("no longer retracted:" if undo else "retracted", ended, as_json, undone=undo)


def _full(content: str) -> bytes | None:
    """An id that is written out: it may be retracted before it is seen."""
    try:
        return bytes.fromhex(content) if len(content) == 64 else None
    except ValueError:
        return None


def _report(done: str, ended: Ended, as_json: bool, *, undone: bool = False) -> None:
    if as_json:
        report: dict[str, Any] = {"id": ended.id.hex(), "ops": [op.hex() for op in ended.ops]}
        emit(report | {"visible": bool(ended.stays), "adders": [key.hex() for key in ended.stays]})
        return
    tell(f"{done} {ended.id.hex()}")
    if ended.stays:
        visible = "visible again" if undone else "it stays visible"
        tell(f"  {visible}: added by {', '.join(map(short, ended.stays))}")

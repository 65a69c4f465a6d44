"""``crdtmerge fsck`` and ``gc``: is everything there, and what is no longer needed."""

from __future__ import annotations

from typing import Annotated

import typer

from crdtmerge.cli.console import emit, progress, tell
from crdtmerge.cli.replica_options import HERE, AsJson, PoolFolder, counted, short, size


def fsck(
    mend: Annotated[
        bool, typer.Option("--mend", help="Rebuild what follows from the operations; let go of damaged tensors.")
    ] = False,
    pool: PoolFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Check every operation and every byte of a replica. Exit code 0: all is well. 1: something is not."""
    from crdtmerge.errors import DatabaseError, some
    from crdtmerge.pool.replica import Replica
    from crdtmerge.store.check import Report

    try:
        with Replica.open(pool) as replica, progress(quiet=as_json) as show:
            report = replica.fsck(mending=mend, progress=show)
    except DatabaseError as damage:
        report = Report(faults=[str(damage)])
    if as_json:
        emit(
            {
                "clean": report.clean,
                "ops": report.ops,
                "blobs": report.blobs,
                "bytes": report.nbytes,
                "faults": report.faults,
                "lost": [{"id": content.hex(), "tensors": names} for content, names in report.lost.items()],
            }
        )
    else:
        tell(f"{report.ops} operations, {report.blobs} blobs, {size(report.nbytes)}")
        for fault in report.faults:
            tell(f"  {fault}")
        for content, names in report.lost.items():
            tell(
                f"  contribution {short(content)} lacks {some(names)}: import it, fetch it from a peer, or add it again"
            )
        tell("clean" if report.clean else "not clean" + (", mended as far as can be; run fsck again" if mend else ""))
    raise typer.Exit(0 if report.clean else 1)


def gc(
    grace: Annotated[
        float, typer.Option(metavar="HOURS", min=0, help="How long what nobody needs is kept, before each phase.")
    ] = 24.0,
    pool: PoolFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Collect tensors that no contribution needs.

    In two phases: what is not needed for a while becomes trash, and is removed by a collection as long after.
    """
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica:
        done = replica.gc(grace * 3600)
    if as_json:
        emit(vars(done))
        return
    tell(f"{counted(done.trashed, 'blob')} ({size(done.trashed_bytes)}) became trash")
    strays = counted(done.strays, "leftover")
    tell(f"{counted(done.removed, 'blob')} ({size(done.removed_bytes)}) removed, and {strays} of crashes")

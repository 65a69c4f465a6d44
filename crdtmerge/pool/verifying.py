"""Verification of outputs whose inputs lie in checkpoints or in replicas."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

from crdtmerge.pool.room import Room, silent
from crdtmerge.resolve.sources import Source
from crdtmerge.resolve.statistic import Kept
from crdtmerge.resolve.verify import Verdict, find_file, open_checkpoint
from crdtmerge.resolve.verify import verify as verify_with
from crdtmerge.store.database import NAME
from crdtmerge.store.disk import Disk


def verify(
    out: str | Path,
    against: Sequence[str | Path] = (),
    *,
    threads: int | None = None,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] = silent,
) -> Verdict:
    """Merge again from the inputs and compare every byte with an output.

    Args:
        out: what was written, with its receipt beside it.
        against: where everything is now that was read: checkpoints, replicas, statistics, a plan, in any order; by
            default as ``inputs.json`` has it.
        threads, device, progress: how it runs; never what it answers.

    Returns:
        ``same``, ``different`` or ``unknown``, with the reason and the receipt.
    """
    paths = [Path(path) for path in against]
    return verify_with(
        Path(out), paths, threads=threads, device=device, progress=progress, opener=_opened, finder=_kept
    )


def _is_replica(path: Path) -> bool:
    return os.path.isfile(path / NAME)  # noqa: PTH113 (never raises)


def _kept(path: Path, wanted: Set[bytes]) -> Mapping[bytes, Path | Kept]:
    """The statistics that are wanted of a replica's, or the file itself."""
    if not _is_replica(path):
        return find_file(path, wanted)
    named = {digest.hex(): digest for digest in wanted}
    return {kept.digest: kept for kept in Room.opened(path, Disk()).statistics(named).values()}


def _opened(path: Path, wanted: Set[bytes]) -> Sequence[Source]:
    """The contents that are wanted of a replica's, or a checkpoint."""
    if not _is_replica(path):
        return open_checkpoint(path, wanted)
    room = Room.opened(path, Disk())
    files = {entry.id: entry.files for entry in room.opset.visible()}
    if room.genesis.base is not None:
        files[room.genesis.base] = room.genesis.files
    return [room.source(content, files.get(content, {})) for content in sorted(wanted) if room.is_ready(content)]

"""fsck: is everything that a replica acknowledged still there, to the bit? What is lost, and what brings it back.

RULES
1. The database passes SQLite's own check. Every operation hashes to its id, bears its author's signature and is taken
   again by an op set that begins with nothing; every table of that set is equal to the one in the database.
2. Every blob is read whole and hashes to its name; every content that is marked ready has all of its blobs.
3. Operations and manifests are few and small and on every replica of the pool; a tensor is named with the contents
   that need it. ``mend`` rebuilds the tables from the operations and lets go of damaged blobs, so that they are fetched
   or added again; it never drops an operation that is sound: those that build on a damaged one wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from crdtmerge.errors import CrdtMergeError, InputError, OpError
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import Op
from crdtmerge.replica.opset import OpSet
from crdtmerge.replica.tables import NAMES, MemoryTables
from crdtmerge.store.blobs import Blobs, fault_in
from crdtmerge.store.database import Database, SqliteTables
from crdtmerge.store.disk import failing


@dataclass
class Report:
    """What was checked and what was found."""

    ops: int = 0
    blobs: int = 0
    nbytes: int = 0
    faults: list[str] = field(default_factory=list)
    damaged: list[bytes] = field(default_factory=list)
    lost: dict[bytes, list[str]] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults and not self.lost


def check(
    genesis: Genesis,
    database: Database,
    blobs: Blobs,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Report:
    """Check a whole replica. Raises ReplicaError where the database cannot be read at all."""
    report = Report()
    for (said,) in database.rows("PRAGMA integrity_check"):
        if said != "ok":
            report.faults.append(f"the database: {said}")
    for table, count in database.misfits().items():
        report.faults.append(f"{count} rows of the table {table} do not hold what is declared")
    manifests = dict(_manifests(database, report))
    held = _check_ops(genesis, database, manifests, report, progress)
    _check_blobs(blobs, report, progress)
    _check_contents(genesis, database, manifests, held, report)
    return report


def mend(genesis: Genesis, database: Database, blobs: Blobs, report: Report) -> None:
    """Rebuild what follows from the operations, and let go of damaged rows and blobs. Within a transaction."""
    database.drop_misfits()
    ops = list(_ops(database, Report()))
    manifests = dict(_manifests(database, Report()))
    for name in NAMES:
        database.run(f"DELETE FROM set_{name}")
    joined = OpSet(genesis, SqliteTables(database)).join(ops, manifests)
    for op, _ in joined.waiting:
        database.run("INSERT OR REPLACE INTO waiting VALUES (?, ?)", (op.id, op.wire))
    for (content,) in database.rows("SELECT content FROM manifests"):
        if content not in manifests:
            database.run("DELETE FROM manifests WHERE content = ?", (content,))
    with failing(blobs.folder):
        for digest in report.damaged:
            database.run("DELETE FROM blobs WHERE digest = ?", (digest,))
            blobs.disk.remove(blobs.path(digest))
    database.run("DELETE FROM ready")
    here = _blobs_here(database)
    ready = [(one,) for one, manifest in manifests.items() if all(row.digest in here for row in manifest.rows)]
    database.run_all("INSERT INTO ready VALUES (?)", ready)


def _manifests(database: Database, report: Report) -> Iterator[tuple[bytes, Manifest]]:
    for content, data in database.sound("content, manifest", "manifests"):
        try:
            manifest = Manifest.from_bytes(data)
            if manifest.id != content:
                raise InputError("it is that of another content")
        except InputError as fault:
            report.faults.append(f"manifest {content.hex()}: {fault}")
        else:
            yield content, manifest


def _ops(database: Database, report: Report) -> Iterator[Op]:
    for identity, wire in database.sound("key, value", "set_ops"):
        try:
            op = Op.from_wire(wire)
            if op.id != identity:
                raise OpError("it is kept under another id")
        except OpError as fault:
            report.faults.append(f"operation {identity.hex()}: {fault} A peer that holds it can give it again.")
        else:
            yield op


def _check_ops(
    genesis: Genesis,
    database: Database,
    manifests: dict[bytes, Manifest],
    report: Report,
    progress: Callable[[str, int, int], None],
) -> list[bytes]:
    """Every operation by itself, then all of them again from nothing, then table by table; the contents they hold."""
    row = database.one("SELECT count(*) FROM set_ops")
    total = row[0] if row else 0
    ops = []
    for op in _ops(database, report):
        ops.append(op)
        progress("operations", len(ops), total)
    report.ops = total
    again, here = OpSet(genesis, MemoryTables()), SqliteTables(database)
    joined = again.join(ops, manifests)
    report.faults += [f"operation {op.id.hex()} is not one that this pool takes: {why}" for op, why in joined.refused]
    report.faults += [
        f"operation {op.id.hex()} builds on what is not here; a peer that holds it can give it again"
        for op, _ in joined.waiting
    ]
    for name in NAMES:
        try:
            same = list(again.tables.every(name)) == list(here.every(name))
        except (CrdtMergeError, ValueError):
            same = False
        if not same:
            report.faults.append(f"the table {name} is not what follows from the operations")
    return again.held()


def _check_blobs(blobs: Blobs, report: Report, progress: Callable[[str, int, int], None]) -> None:
    total = blobs.used()
    for digest, blob, state in blobs.every():
        fault = fault_in(blobs, blob) if blob else "is not described as it was"
        report.blobs += 1
        report.nbytes += blob.nbytes if blob else 0
        progress("blobs", report.nbytes, total)
        if fault is not None and state == "ready":
            report.damaged.append(digest)
            report.faults.append(f"blob {digest.hex()} {fault}")


def _check_contents(
    genesis: Genesis, database: Database, manifests: dict[bytes, Manifest], held: list[bytes], report: Report
) -> None:
    """Which contents lack tensors that this replica had."""
    here = _blobs_here(database) - set(report.damaged)
    ready = {row[0] for row in database.sound("content", "ready")}
    for content in held:
        manifest = manifests.get(content)
        if content not in ready and manifest is not None and all(row.digest in here for row in manifest.rows):
            report.faults.append(f"contribution {content.hex()} is here, but not marked as ready")
    for content in sorted({*ready, *([genesis.base] if genesis.base else [])}):
        manifest = manifests.get(content)
        if manifest is None:
            report.lost[content] = ["its manifest"]
            continue
        lacks = [row.name for row in manifest.rows if row.digest not in here]
        if lacks:
            report.lost[content] = lacks


def _blobs_here(database: Database) -> set[bytes]:
    return {digest for digest, state in database.sound("digest, state", "blobs") if state == "ready"}

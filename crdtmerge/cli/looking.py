"""``crdtmerge status`` and ``show``: what is in a pool's set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdtmerge.cli.console import emit, many_values, quoted, tell
from crdtmerge.cli.history import line_of, tell_line
from crdtmerge.cli.replica_options import HERE, AsJson, PoolFolder, counted, short, size

if TYPE_CHECKING:
    from crdtmerge.pool.replica import Replica
    from crdtmerge.replica.entry import Entry

SHOWN_MAX = 50
"""Lines of each list that a person is shown; --json has all of them."""


def status(pool: PoolFolder = HERE, as_json: AsJson = False) -> None:
    """Print what the pool's set holds: what is visible, and what is hidden and why."""
    from crdtmerge.pool.replica import Replica

    with many_values(), Replica.open(pool) as replica, replica.snapshot():
        report = _status(replica)
        if as_json:
            emit(report, compact=True)
        else:
            _print_status(replica, report)


def _status(replica: Replica) -> dict[str, Any]:
    opset, ready, visible = replica.opset, replica.ready(), replica.visible
    gone = opset.hidden()
    hidden = [{"id": one.id.hex(), "why": one.why, "by": one.by.hex()} for one in gone]
    for content in sorted({*opset.retracted()}.difference((one.id for one in visible), (one.id for one in gone))):
        by = max(opset.retractions(content), key=lambda op: op.order)
        hidden.append({"id": content.hex(), "why": "retracted", "by": by.id.hex()})
    forks = [(fork.one.author, [fork.one.id, fork.other.id]) for fork in opset.forks()]
    return {
        "pool": replica.pool_id.hex(),
        "actor": replica.author.hex(),
        "root": replica.root.hex(),
        "state_root": replica.state_root.hex(),
        "recipe": replica.recipe.canonical(),
        "ops": len(opset),
        "visible": [_entry(entry, entry.id in ready) for entry in visible],
        "hidden": sorted(hidden, key=lambda one: one["id"]),
        "forks": [{"key": key.hex(), "ops": [op.hex() for op in ops]} for key, ops in forks],
    }


def _entry(entry: Entry, ready: bool) -> dict[str, Any]:
    claim = entry.claim
    return {
        "id": entry.id.hex(),
        "weight": str(claim.weight),
        "role": claim.role,
        "task": claim.task,
        "kind": entry.kind,
        "adders": [key.hex() for key in entry.adders],
        "note": entry.note,
        "ready": ready,
    }


def _print_status(replica: Replica, report: dict[str, Any]) -> None:
    own, recipe, visible = report["actor"], report["recipe"], report["visible"]
    params = "".join(f" {name}={value}" for name, value in recipe["params"].items())
    tell(f"pool   {report['pool']}")
    tell(f"root   {report['root']}  ({counted(len(visible), 'contribution')}, {counted(report['ops'], 'operation')})")
    tell(f"recipe {recipe['strategy']}{params}")
    for one in visible[:SHOWN_MAX]:
        tell("  " + "  ".join(_words(one, own)))
    _tell_more(len(visible))
    worth = [one for one in report["hidden"] if one["why"] in ("retracted", "revoked")]
    for one in worth[:SHOWN_MAX]:
        by = replica.opset.op(bytes.fromhex(one["by"]))
        if one["why"] == "revoked":  # it names the ADD that is void; what voided it says who and why
            by = next(iter(replica.opset.revoked_by(by)), by)
        reason = getattr(by.payload, "reason", None)
        why = f" because {quoted(reason)}" if reason else ""
        tell(f"  {one['id'][:12]}  hidden: {one['why']} by {_who(by.author.hex(), own)}{why}")
    _tell_more(len(worth))
    if len(report["hidden"]) > len(worth):
        tell(f"  {len(report['hidden']) - len(worth)} removed or replaced; `crdtmerge log` tells of them")
    for fork in report["forks"]:
        ops = " and ".join(op[:12] for op in fork["ops"])
        tell(f"  WARNING: key {fork['key'][:12]} signed two operations for one place: {ops}")


def _words(one: dict[str, Any], own: str) -> list[str]:
    """A visible contribution in words."""
    words = [one["id"][:12], f"weight {one['weight']}"]
    words += [f"role {one['role']}"] if one["role"] != "task" else []
    words += [f"task {quoted(one['task'])}"] if one["task"] else []
    words += [f"by {', '.join(_who(key, own) for key in one['adders'])}"]
    words += [quoted(one["note"])] if one["note"] else []
    return words + ([] if one["ready"] else ["(announced: its tensors are not here yet)"])


def _who(key: str, own: str) -> str:
    return "you" if key == own else key[:12]


def _tell_more(count: int) -> None:
    if count > SHOWN_MAX:
        tell(f"  and {count - SHOWN_MAX} more (--json has all)")


def show(
    identity: Annotated[
        str, typer.Argument(metavar="ID", help="A contribution's or operation's id, or its first digits.")
    ],
    pool: PoolFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Print all that is known of a contribution or an operation."""
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica, replica.snapshot():
        found, own = replica.find(identity), replica.author.hex()
        report = line_of(replica, replica.opset.op(found)) if found in replica.opset else _content(replica, found)
    if as_json:
        emit(report)
        return
    for name, value in report.items():
        if name == "history":
            tell("history")
            for line in value:
                tell_line(line, own, indent="  ")
        elif value not in (None, [], {}):
            tell(f"{name:<12} {_plain(name, value)}")


def _plain(name: str, value: Any) -> str:
    if name == "bytes":
        return size(value)
    if name in ("note", "task", "reason"):
        return quoted(value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {quoted(item) if key in ('note', 'task') else item}" for key, item in value.items())
    return str(value)


def _content(replica: Replica, content: bytes) -> dict[str, Any]:
    """A contribution as a JSON value."""
    manifest, entry = replica.manifest(content), replica.opset.entry(content)
    hidden = replica.opset.why_hidden(content)
    dtypes = sorted({row.dtype for row in manifest.rows}) if manifest else []
    return {
        "id": content.hex(),
        **(
            {name: value for name, value in _entry(entry, True).items() if name not in ("id", "ready")} if entry else {}
        ),
        "hidden": f"{hidden.why} by operation {short(hidden.by)}" if hidden else None,
        "ready": replica.is_ready(content),
        "tensors": len(manifest.rows) if manifest else None,
        "bytes": replica.bytes_of(content),
        "dtypes": dtypes,
        "files": sorted(entry.files) if entry else [],
        "history": [line_of(replica, op) for op in replica.opset.history(content)],
    }

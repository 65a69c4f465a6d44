"""``crdtmerge status``, ``log`` and ``show``: what is in a pool's set, and how it came about."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdtmerge.cli.console import emit, tell
from crdtmerge.cli.replica_options import HERE, AsJson, PoolFolder, short, size

if TYPE_CHECKING:
    from crdtmerge.pool.replica import Replica
    from crdtmerge.replica.entry import Entry
    from crdtmerge.replica.op import Op

SHOWN_MAX = 50
"""Lines of each list that a person is shown; --json has all of them."""


def status(pool: PoolFolder = HERE, as_json: AsJson = False) -> None:
    """Print what the pool's set holds: what is visible, and what is hidden and why."""
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica, replica.snapshot():
        report = _status(replica)
    if as_json:
        emit(report, compact=True)
    else:
        _print_status(report)


def _status(replica: Replica) -> dict[str, Any]:
    opset, ready = replica.opset, replica.ready()
    return {
        "pool": replica.pool_id.hex(),
        "actor": replica.author.hex(),
        "root": replica.root.hex(),
        "state_root": replica.state_root.hex(),
        "recipe": replica.recipe.canonical(),
        "ops": len(opset),
        "visible": [_entry(entry) | {"ready": entry.id in ready} for entry in replica.visible],
        "hidden": [{"id": one.id.hex(), "why": one.why, "by": one.by.hex()} for one in opset.hidden()],
        "forks": [{"key": fork.one.author.hex(), "ops": [fork.one.id.hex(), fork.other.id.hex()]} for fork in opset.forks()],
    }


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.id.hex(),
        "weight": str(entry.weight),
        "role": entry.role,
        "task": entry.claim.task,
        "kind": entry.kind,
        "adders": [key.hex() for key in entry.adders],
        "note": entry.note,
    }


def _print_status(report: dict[str, Any]) -> None:
    recipe = report["recipe"]
    said = "".join(f" {name}={value}" for name, value in recipe["params"].items())
    tell(f"pool   {report['pool']}")
    tell(f"root   {report['root']}  ({len(report['visible'])} contributions, {report['ops']} operations)")
    tell(f"recipe {recipe['strategy']}{said}")
    for one in report["visible"][:SHOWN_MAX]:
        adders = ", ".join("you" if key == report["actor"] else key[:12] for key in one["adders"])
        more = "".join(f"  {name} {one[name]}" for name in ("role", "task") if one[name] not in (None, "task"))
        note = f'  "{one["note"]}"' if one["note"] else ""
        tell(f"  {one['id'][:12]}  weight {one['weight']}{more}  by {adders}{note}{'' if one['ready'] else '  (announced)'}")
    _more(len(report["visible"]))
    worth = [one for one in report["hidden"] if one["why"] in ("retracted", "revoked")]
    for one in worth[:SHOWN_MAX]:
        tell(f"  {one['id'][:12]}  hidden: {one['why']} ({one['by'][:12]})")
    _more(len(worth))
    if len(report["hidden"]) > len(worth):
        tell(f"  {len(report['hidden']) - len(worth)} removed or replaced; `crdtmerge log` tells of them")
    for fork in report["forks"]:
        tell(f"  WARNING: key {fork['key'][:12]} signed two operations for one place: {', '.join(o[:12] for o in fork['ops'])}")


def _more(count: int) -> None:
    if count > SHOWN_MAX:
        tell(f"  and {count - SHOWN_MAX} more (--json has all)")


def log(
    last: Annotated[int | None, typer.Option("-n", "--last", metavar="N", min=1, help="Only the last N.")] = None,
    pool: PoolFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Print the pool's history: who did what and why, causes before effects, and when it was seen here."""
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica, replica.snapshot():
        lines = [_line(replica, op) for op in replica.last_ops(last)]
        own = replica.author.hex()
    if as_json:
        emit(lines)
        return
    for line in lines:
        who = "you" if line["author"] == own else line["author"][:12]
        tell(f"{line['id'][:12]}  {line['seen'] or '?':<19}  {who:<12}  {_said(line)}")
        if line["void"]:
            tell(f"{'':<14}void: {line['void']}")


def _line(replica: Replica, op: Op) -> dict[str, Any]:
    """An operation as a JSON value."""
    seen = replica.seen(op.id)
    void = replica.opset.is_void(op.id)
    by = [revoke.author.hex()[:12] for revoke in replica.opset.revoked_by(op)] if void else []
    return {
        "id": op.id.hex(),
        "seen": datetime.fromtimestamp(seen, UTC).strftime("%Y-%m-%d %H:%M:%S") if seen else None,
        "author": op.author.hex(),
        "incarnation": op.incarnation.hex(),
        "seq": op.seq,
        "height": op.height,
        "kind": op.kind,
        **_told(replica, op),
        "void": f"its key was revoked by {', '.join(by)}" if by else "its right was revoked" if void else None,
    }


def _told(replica: Replica, op: Op) -> dict[str, Any]:
    """What an operation says, by kind."""
    from crdtmerge.replica.op import Add, Grant, Remove, Retract, Revoke, SetRecipe

    payload = op.payload
    told: dict[str, Any] = {}
    if isinstance(payload, Add):
        says = {name: value for name, value in payload.says.value.items() if name in ("weight", "role", "task", "note")}
        why = next((one.why for one in [replica.opset.why_hidden(payload.content)] if one), None)
        told = {"content": payload.content.hex(), "says": says, "hidden": why}
        told["replaces"] = [one.hex() for one in payload.replaces]
    elif isinstance(payload, Retract):
        told = {"content": payload.content.hex(), "reason": payload.reason}
    elif isinstance(payload, Remove):
        contents = {replica.opset.op(one).payload.content.hex() for one in payload.targets}  # type: ignore[union-attr]
        told = {"contents": sorted(contents), "targets": [one.hex() for one in payload.targets], "reason": payload.reason}
    elif isinstance(payload, Grant):
        told = {"key": payload.key.hex(), "role": payload.role}
    elif isinstance(payload, Revoke):
        told = {"key": payload.key.hex(), "heads": [one.hex() for one in payload.heads], "reason": payload.reason}
    elif isinstance(payload, SetRecipe):
        told = {"recipe": dict(payload.recipe)}
    return told


def _said(line: dict[str, Any]) -> str:
    """A line of the history in words."""
    kind, words = line["kind"], []
    if kind == "add":
        words = [line["content"][:12], *(f"{name} {value}" for name, value in line["says"].items() if name != "note")]
        words += [f'"{line["says"]["note"]}"'] if "note" in line["says"] else []
        words += [f"in place of {len(line['replaces'])} of its own"] if line["replaces"] else []
        words += [f"(now {line['hidden']})"] if line["hidden"] else []
    elif kind in ("remove", "unretract"):
        count = len(line["targets"])
        words = [*(content[:12] for content in line["contents"]), f"({count} seen)" if count > 1 else ""]
    elif kind == "retract":
        words = [line["content"][:12]]
    elif kind == "grant":
        words = [line["key"][:12], line["role"]]
    elif kind == "revoke":
        words = [line["key"][:12], f"(what it did up to {len(line['heads'])} last operations still counts)"]
    elif kind == "recipe":
        words = [line["recipe"]["strategy"], *(f"{name}={value}" for name, value in line["recipe"]["params"].items())]
    reason = f'  because "{line["reason"]}"' if line.get("reason") else ""
    return f"{kind:<9} {'  '.join(word for word in words if word)}{reason}"


def show(
    identity: Annotated[str, typer.Argument(metavar="ID", help="A contribution's or operation's id, or its first digits.")],
    pool: PoolFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Print all that is known of a contribution or an operation."""
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica, replica.snapshot():
        found = replica.find(identity)
        report = _line(replica, replica.opset.op(found)) if found in replica.opset else _content(replica, found)
    if as_json:
        emit(report)
        return
    for name, value in report.items():
        if name == "history":
            tell("history")
            for line in value:
                tell(f"  {line['id'][:12]}  {line['seen'] or '?'}  {line['author'][:12]}  {_said(line)}")
        elif value not in (None, [], {}):
            tell(f"{name:<12} {_plain(name, value)}")


def _plain(name: str, value: Any) -> str:
    if name == "bytes":
        return size(value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def _content(replica: Replica, content: bytes) -> dict[str, Any]:
    """A contribution as a JSON value."""
    manifest, entry = replica.manifest(content), replica.opset.entry(content)
    hidden = replica.opset.why_hidden(content)
    dtypes = sorted({row.dtype for row in manifest.rows}) if manifest else []
    return {
        "id": content.hex(),
        **({name: value for name, value in _entry(entry).items() if name != "id"} if entry else {}),
        "hidden": f"{hidden.why} by operation {short(hidden.by)}" if hidden else None,
        "ready": replica.is_ready(content),
        "tensors": len(manifest.rows) if manifest else None,
        "bytes": replica.bytes_of(content),
        "dtypes": dtypes,
        "files": sorted(entry.files) if entry else [],
        "history": [_line(replica, op) for op in replica.opset.history(content)],
    }

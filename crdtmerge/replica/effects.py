"""What follows from operations: live dots and RETRACTs, the visible set, both tries. RULES 6 to 8 of ``opset``.

Taking one operation costs a few lookups and one path in each trie. Only a REVOKE looks at more: at all of the
operations of the keys whose rights it changes.
"""

from __future__ import annotations

from typing import Any

from crdtmerge.canonical import digest
from crdtmerge.replica.entry import spoken_of
from crdtmerge.replica.log import Log
from crdtmerge.replica.op import Add, Grant, Op, Remove, Retract, Revoke, SetRecipe


class Effects:
    """Keeps in the tables what follows from the operations in them."""

    def __init__(self, log: Log) -> None:
        self._log, self._tables = log, log.tables

    def record(self, op: Op, kind: str | None) -> None:
        """Take an operation that passed the door; ``kind`` is its content's, if that comes for the first time."""
        tables, past = self._tables, self._log.past_of(op)
        if isinstance(op.payload, Add):
            tables.put("adds", op.payload.content, op.id, kind or self._log.kind(op.payload.content))
        self._log.keep_past(op, past)
        tables.put("ops", op.id, value=op.wire)
        self._log.meet(op)
        tables.put("order", op.height.to_bytes(8, "big"), op.id)
        for parent in op.parents:
            tables.drop("heads", parent)
        tables.put("heads", op.id)
        for target in op.payload.targets if not isinstance(op.payload, Revoke) else ():
            tables.put("killers", target, op.id)
        if isinstance(op.payload, SetRecipe):
            tables.put("recipes", op.id)
        self._keep_place(op)
        if isinstance(op.payload, Grant | Revoke):
            tables.put("members", op.id)
        if self._log.loses(op):
            tables.put("void", op.id)
        self._act(op)
        if isinstance(op.payload, Revoke):
            self._reconsider(op.payload.key)

    def _keep_place(self, op: Op) -> None:
        """The operation's place in its chain, and evidence if another was there."""
        actor = op.author + op.incarnation
        dot = actor + op.seq.to_bytes(8, "big")
        self._tables.put("dots", dot, op.id)
        if len(self._tables.members("dots", dot)) > 1:
            self._tables.put("forks", dot)
        tip = self._tables.get("tips", actor)
        if tip is None or (op.seq, op.id) > tuple(tip):
            self._tables.put("tips", actor, value=(op.seq, op.id))

    def _act(self, op: Op) -> None:
        """Bring live dots, RETRACTs and the visible set up to date after an operation came or changed its standing."""
        payload = op.payload
        if isinstance(payload, Add | Retract):
            self._revive(op)
            self._refresh(payload.content)
        for target in payload.targets if isinstance(payload, Add | Remove) else ():
            acted_on = self._log.op(target)
            self._revive(acted_on)
            assert isinstance(acted_on.payload, Add | Retract), "targets were checked"
            if isinstance(acted_on.payload, Add):
                self._blame(acted_on.payload.content, op)
            self._refresh(acted_on.payload.content)

    def _revive(self, op: Op) -> None:
        """Keep an ADD or RETRACT among the live ones, or not, as it now is."""
        assert isinstance(op.payload, Add | Retract), "only these live"
        table = "live" if isinstance(op.payload, Add) else "retracts"
        killed = any(not self._log.is_void(one) for one, _ in self._tables.members("killers", op.id))
        if killed or self._log.is_void(op.id):
            self._tables.drop(table, op.payload.content, op.id)
        elif not self._tables.has(table, op.payload.content, op.id):
            everyone = isinstance(op.payload, Retract) and self._log.retracts_all(op)
            self._tables.put(table, op.payload.content, op.id, (op.author, everyone))

    def _blame(self, content: bytes, op: Op) -> None:
        """Keep the greatest operation that ended a dot of a content, to say why it is hidden."""
        found = self._tables.get("removed", content)
        if not self._log.is_void(op.id):
            if found is None or op.order > tuple(found):
                self._tables.put("removed", content, value=op.order)
        elif found is not None and found[1] == op.id:
            dots = [dot for dot, _ in self._tables.members("adds", content)]
            killers = {one for dot in dots for one, _ in self._tables.members("killers", dot)}
            killers = {one for one in killers if not self._log.is_void(one)}
            self._tables.drop("removed", content)
            if killers:
                self._tables.put("removed", content, value=max(self._log.op(one).order for one in killers))

    def _refresh(self, content: bytes) -> None:
        """Decide anew whether and how a content is visible, and keep both tries."""
        tables = self._tables
        live, retracts = tables.members("live", content), tables.members("retracts", content)
        shown = [dot for dot, (author, _) in live if not any(every or by == author for _, (by, every) in retracts)]
        entry = None
        if shown:
            entry = spoken_of(content, self._log.kind(content) or "", map(self._log.op, shown))
            tables.put("visible", content, value=entry.value)
            tables.drop("hidden", content)
        else:
            tables.drop("visible", content)
            self._hide(content, live, retracts)
        counts = [[one for one, _ in live], [one for one, _ in retracts]]
        state = digest("state-leaf", counts) if live or retracts else None
        self._log.tries.put(content, entry.leaf if entry else None, state)

    def _hide(self, content: bytes, live: list[tuple[bytes, Any]], retracts: list[tuple[bytes, Any]]) -> None:
        """Say why a content is not visible, if it was ever added."""
        authors = {author for _, (author, _) in live}
        hiding = [one for one, (by, everyones) in retracts if everyones or by in authors]
        removed = self._tables.get("removed", content)
        if self._log.kind(content) is None:
            return
        if hiding:
            self._keep_reason(content, "retracted", max(self._log.op(one).order for one in hiding)[1])
        elif removed is not None:
            why = "replaced" if isinstance(self._log.op(removed[1]).payload, Add) else "removed"
            self._keep_reason(content, why, removed[1])
        else:
            void = max(self._log.op(dot).order for dot, _ in self._tables.members("adds", content))
            self._keep_reason(content, "revoked", void[1])

    def _keep_reason(self, content: bytes, why: str, by: bytes) -> None:
        self._tables.put("hidden", content, value=(why, by))

    def _reconsider(self, revoked: bytes) -> None:
        """Judge again all operations of a revoked key; of a founder's, also of the keys that it granted or revoked."""
        concerned = {revoked}
        if self._log.genesis.curators != "any" and revoked in self._log.genesis.curators:
            for one, _, _ in self._tables.every("members"):
                payload = self._log.op(one).payload
                assert isinstance(payload, Grant | Revoke), "the table of members holds these"
                concerned.add(payload.key)
        for key in sorted(concerned):
            for _, one, _ in self._tables.every("dots", key):
                op = self._log.op(one)
                loses = self._log.loses(op)
                if loses != self._log.is_void(one):
                    (self._tables.put if loses else self._tables.drop)("void", one)
                    self._act(op)

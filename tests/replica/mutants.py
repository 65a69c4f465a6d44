"""Faults, put into the product one at a time: every one must be caught by the histories, or they prove nothing.

python -m tests.replica.mutants [NAME...]      how many histories each fault survives
"""

from __future__ import annotations

import sys
from decimal import Decimal
from typing import Any, NamedTuple
from unittest import mock

from crdtmerge.replica import door, effects, entry, op, opset
from crdtmerge.replica.contribution import Claim
from crdtmerge.replica.effects import Effects
from crdtmerge.replica.log import Log
from crdtmerge.replica.members import Members, Rank
from crdtmerge.replica.op import Add, Op, Remove, Retract
from crdtmerge.replica.opset import OpSet
from crdtmerge.replica.trie import Tries
from tests.replica.histories import check

SEEDS = 1000


class Mutant(NamedTuple):
    """A name that is replaced, and what by."""

    where: Any
    name: str
    by: Any


def _takes_any_height(log: Log, one: Op) -> None:
    """Take the height as it is said."""
    _check(_Lenient(log, one), one)


_check: Any = door.check


class _Lenient:
    """A log in whose eyes the parents of one operation have just the height, or the place, that it needs."""

    def __init__(self, log: Log, one: Op) -> None:
        self._log, self._one = log, one

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def op(self, identity: bytes) -> Any:
        """An operation, with another height."""
        return _Changed(self._log.op(identity), height=self._one.height - 1)


class _Placed(_Lenient):
    def op(self, identity: bytes) -> Any:
        """An operation, where the next of the chain wants it."""
        found = self._log.op(identity)
        if identity != self._one.prev:
            return found
        return _Changed(found, author=self._one.author, incarnation=self._one.incarnation, seq=self._one.seq - 1)


class _Changed:
    def __init__(self, one: Op, **other: Any) -> None:
        self._op, self._other = one, other

    def __getattr__(self, name: str) -> Any:
        return self._other[name] if name in self._other else getattr(self._op, name)


_join, _record, _act, _loses = OpSet.join, Effects.record, Effects._act, Log.loses
_revive, _refresh, _spoken_of, _rank = Effects._revive, Effects._refresh, entry.spoken_of, Members.rank
_parsed, _kept_by, _keep_place, _put = op._parsed, Members._kept_by, Effects._keep_place, Tries.put


def _drops_a_dot(self: OpSet, ops: Any, manifests: Any = None) -> Any:
    """Of two ADDs of one content that come together, one is lost."""
    one_each = {getattr(each.payload, "content", each.id) if each.kind == "add" else each.id: each for each in ops}
    return _join(self, one_each.values(), manifests)


def _adds_weights_up(content: bytes, kind: str, adds: Any) -> Any:
    dots = list(adds)
    found = _spoken_of(content, kind, dots)
    said = [dot.payload.says.weight or Decimal(1) for dot in dots]
    claim = found.claim
    return entry.Entry(
        content,
        Claim(sum(said, Decimal(0)), claim.role, claim.task, claim.stats),
        kind,
        found.adders,
        found.files,
        found.note,
    )


def _by_id_only(content: bytes, kind: str, adds: Any) -> Any:
    class Tied:
        def __init__(self, one: Op) -> None:
            self.payload, self.author, self.order = one.payload, one.author, one.id

    return _by_any_order(content, kind, map(Tied, adds))


def _by_any_order(content: bytes, kind: str, adds: Any) -> Any:
    """Merge what is said without looking whether it is an operation."""
    ordered = sorted(adds, key=lambda one: one.order)
    stats = {name: value for one in ordered for name, value in one.payload.says.stats.items()}
    said: dict[str, Any] = {}
    for one in ordered:
        said |= {name: value for name, value in vars(one.payload.says).items() if value is not None}
    claim = Claim(
        said.get("weight", Decimal(1)), said.get("role", "task"), said.get("task"), dict(sorted(stats.items()))
    )
    adders = tuple(sorted({one.author for one in ordered}))
    return entry.Entry(content, claim, kind, adders, said.get("files", {}), said.get("note"))


def _kills_the_content(self: Effects, one: Op, kind: str | None) -> None:
    """A REMOVE ends every dot of the contents of its targets, also those that it has not seen."""
    _record(self, one, kind)
    if type(one.payload) is Remove:
        for target in one.payload.targets:
            content = self._log.op(target).payload.content  # type: ignore[union-attr]
            for dot, _ in self._tables.members("adds", content):
                self._tables.put("killers", dot, one.id)
                self._revive(self._log.op(dot))
            self._refresh(content)


def _hides_what_is_there(self: Effects, one: Op, kind: str | None) -> None:
    """A RETRACT hides the dots of now: each later ADD clears it."""
    _record(self, one, kind)
    if isinstance(one.payload, Add):
        for retract, _ in self._tables.members("retracts", one.payload.content):
            self._tables.drop("retracts", one.payload.content, retract)
        self._refresh(one.payload.content)


def _ignores_concurrent(self: Members, author: bytes, identity: bytes, past: Any, *, at_the_door: bool) -> Rank:
    return _rank(self, author, identity, past, at_the_door=True)


def _keeps_the_claim(self: Effects, content: bytes) -> None:
    """A content that is visible stays in its trie as it was."""
    was = self._log.tables.get("visible", content)
    leaf = entry.Entry.of_value(content, was).leaf if was else None

    def put(tries: Tries, identity: bytes, visible: bytes | None, state: bytes | None) -> None:
        _put(tries, identity, leaf if leaf and visible else visible, state)

    with mock.patch.object(Tries, "put", put):
        _refresh(self, content)


def _forgets_forks(self: Effects, one: Op) -> None:
    _keep_place(self, one)
    self._tables.drop("forks", one.author + one.incarnation + one.seq.to_bytes(8, "big"))


def _hides_everyone(self: Effects, one: Op) -> None:
    _revive(self, one)
    if isinstance(one.payload, Retract) and self._tables.has("retracts", one.payload.content, one.id):
        self._tables.put("retracts", one.payload.content, one.id, (one.author, True))


def _revives_the_removed(self: Effects, one: Op) -> None:
    """A second ADD of a content brings its dead dots back."""
    _act(self, one)
    if isinstance(one.payload, Add):
        for dot, _ in self._tables.members("adds", one.payload.content):
            self._tables.put("live", one.payload.content, dot, (self._log.op(dot).author, False))
        self._refresh(one.payload.content)


def _never(*_: Any, **__: Any) -> None:
    return None


def _recipe_of_the_first(self: OpSet) -> bytes | None:
    found = [self.op(one).order for one, _, _ in self.tables.every("recipes") if not self.is_void(one)]
    return min(found)[1] if found else None


def _voids_what_it_keeps(self: Members, revoke: bytes) -> Any:
    return frozenset()


def _keeps_only_the_head(self: Members, revoke: bytes) -> Any:
    return frozenset(self._ops[revoke].payload.targets)


def _any_past(self: Members, author: bytes, identity: bytes, past: Any, *, at_the_door: bool) -> Rank:
    """GRANTs count that an operation had not seen."""
    return _rank(self, author, identity, frozenset(self._ops), at_the_door=False)


def _lets_all_in(self: Log, one: Op) -> Rank:
    return Rank.NOBODY


def _delta_of_heads(self: OpSet, heads: Any) -> list[Op]:
    """What one lacks, but for the parents of what one knows."""
    known = set(heads)
    return [one for one in self.ops() if one.id not in known]


def _all_are_heads(self: OpSet) -> tuple[bytes, ...]:
    """Heads, the parents of others among them."""
    return tuple(key for key, _, _ in self.tables.every("ops"))


def _reconsiders_the_key_only(self: Effects, revoked: bytes) -> None:
    for _, one, _ in self._tables.every("dots", revoked):
        found = self._log.op(one)
        loses = self._log.loses(found)
        if loses != self._log.is_void(one):
            (self._tables.put if loses else self._tables.drop)("void", one)
            self._act(found)


MUTANTS: dict[str, Mutant] = {
    "a dot is dropped on join": Mutant(OpSet, "join", _drops_a_dot),
    "weights of dots add up": Mutant(effects, "spoken_of", _adds_weights_up),
    "ties fall by id alone": Mutant(effects, "spoken_of", _by_id_only),
    "statistics are replaced as a whole": Mutant(
        effects, "spoken_of", lambda content, kind, adds: _by_any_order(content, kind, list(adds)[-1:])
    ),
    "signatures are not checked": Mutant(op, "verify", lambda *_: True),
    "REMOVE ends the content": Mutant(Effects, "record", _kills_the_content),
    "RETRACT hides what is there now": Mutant(Effects, "record", _hides_what_is_there),
    "a member's RETRACT hides every dot": Mutant(Effects, "_revive", _hides_everyone),
    "an ADD revives dead dots": Mutant(Effects, "_act", _revives_the_removed),
    "REVOKE spares what is concurrent": Mutant(Members, "rank", _ignores_concurrent),
    "REVOKE voids what it keeps": Mutant(Members, "_kept_by", _voids_what_it_keeps),
    "REVOKE keeps the heads without their chains": Mutant(Members, "_kept_by", _keeps_only_the_head),
    "REVOKE looks not back": Mutant(Effects, "_reconsider", _never),
    "REVOKE of a founder leaves its GRANTs": Mutant(Effects, "_reconsider", _reconsiders_the_key_only),
    "GRANTs need not be in the past": Mutant(Members, "rank", _any_past),
    "the order of founders is not kept": Mutant(Members, "may_revoke", lambda *_: True),
    "everyone may do everything": Mutant(Log, "needed", _lets_all_in),
    "the trie keeps old claims": Mutant(Effects, "_refresh", _keeps_the_claim),
    "forks are not recorded": Mutant(Effects, "_keep_place", _forgets_forks),
    "heights are not checked": Mutant(opset, "check", _takes_any_height),
    "predecessors are not checked": Mutant(opset, "check", lambda log, one: _check(_Placed(log, one), one)),
    "targets are not checked": Mutant(door, "_check_targets", _never),
    "manifests are not checked": Mutant(opset, "check_manifest", _never),
    "the least recipe is in force": Mutant(OpSet, "_recipe_op", _recipe_of_the_first),
    "a delta forgets the past of heads": Mutant(OpSet, "delta", _delta_of_heads),
    "heads have children": Mutant(OpSet, "heads", _all_are_heads),
}

QUICK = ("weights of dots add up", "REMOVE ends the content", "REVOKE spares what is concurrent")


def survived(mutant: Mutant, seeds: int = SEEDS) -> int | None:
    """How many histories a fault survives until it is caught, None if it is not."""
    assert hasattr(mutant.where, mutant.name), f"the product has no {mutant.name} any more"
    op._stored.cache_clear()
    try:
        with mock.patch.object(mutant.where, mutant.name, mutant.by):
            for seed in range(seeds):
                try:
                    check(seed)
                except Exception:  # noqa: BLE001 - any failure of a history is a catch
                    return seed
    finally:
        op._stored.cache_clear()
    return None


def main(asked: list[str]) -> None:
    """Print how long each fault survives."""
    for name in asked or MUTANTS:
        sys.stdout.write(f"{survived(MUTANTS[name])!s:>5} {name}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])

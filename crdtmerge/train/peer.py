"""One peer of decentralised training: it trains, contributes, gossips, merges what is there and goes on.

    round k:   theta <- train(theta);   contribute theta in the place of its own last;   gossip;
               theta <- merge of the contributions that are there, weighed;   repair

RULES
1. There is no barrier. A round takes whoever is there: who is late counts by its last contribution, weighed by how far
   it is behind; who is behind by more than ``patience`` rounds, not at all.
2. What is merged is in the pool: a merge is a function of contributions, shares and recipe, and equal ones give equal
   bytes on every machine. Training and repair are the peer's own affair.
3. Only contributions in the peer's own order of units (``basis``) are merged.
4. A peer that stops goes on from its last contribution.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from crdtmerge.canonical import digest
from crdtmerge.errors import UsageError
from crdtmerge.numerics.reduction import dot
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Claim
from crdtmerge.resolve.beside import Beside
from crdtmerge.resolve.merge import Merged, into_memory
from crdtmerge.resolve.merging import Options
from crdtmerge.train.aligning import Alignment
from crdtmerge.train.facts import Facts
from crdtmerge.train.pool import Contribution, Pool, State, content_of, history, load, own, seen, shared
from crdtmerge.train.rules import Rule, everyone
from crdtmerge.train.topology import decimals
from crdtmerge.train.trainer import Training, trainer
from crdtmerge.train.weighing import Weighing, gap

if TYPE_CHECKING:
    from torch import Tensor

Repair = Callable[[State, Sequence[State], Sequence[float]], State]
"""A merged model, the models that it was merged of and their shares -> the model with its statistics mended."""

STARTS_MAX = 8
"""Merges that a peer remembers, to tell how far it went since another one started from them."""


def _nothing() -> None:
    return None


class Peer:
    """A peer, at round 0 until it has trained.

    Args:
        pool: a ``Replica``, or an ``InMemory``.
        model: where it starts; None to go on from its last contribution in the pool.
        train: a ``Trainer``, or any function of a state dict that gives the trained one.
        rule: whose contributions it merges, in what shares (``rules``): everyone's alike by default.
        recipe: how it merges: the pool's by default, or a function of the content id of its own contribution (NNA's
            pivot, DIMAT's reference).
        inputs: what else the recipe reads, by name: a symmetry, a program.
        weighing: what else weighs a contribution.
        patience: rounds that a contribution may be behind to count at all; None for any number.
        alignment: how units are matched, where models did not start from one.
        repair: what mends a merged model before it is used.
        covers: globs of the tensors that it contributes: its experts, say. The recipe must have ``missing="skip"``.
        gossip: what brings its pool and others' together; nothing where a ``Node`` runs beside it.
    """

    def __init__(
        self,
        pool: Pool,
        model: State | None,
        train: Training,
        *,
        rule: Rule = everyone,
        recipe: Recipe | Callable[[bytes], Recipe] | None = None,
        inputs: Mapping[str, Any] | None = None,
        weighing: Weighing = Weighing(),  # noqa: B008 (a frozen value)
        patience: int | None = None,
        alignment: Alignment | None = None,
        repair: Repair | None = None,
        covers: Sequence[str] = ("*",),
        gossip: Callable[[], object] = _nothing,
    ) -> None:
        self.pool, self.trainer, self.rule, self.weighing = pool, trainer(train), rule, weighing
        self.patience, self.alignment, self.repair = patience, alignment, repair
        self.recipe, self.inputs, self.covers, self._gossip = recipe, dict(inputs or {}), tuple(covers), gossip
        self._starts: OrderedDict[bytes, State] = OrderedDict()
        self.facts = Facts(examples=self.trainer.examples)
        if model is None:
            last = seen(pool).get(pool.author)
            if last is None:
                raise UsageError("this key has contributed nothing to training yet: give the model to start from.")
            self.facts, model = last.facts, load(pool, last.content)
        self.model: dict[str, Tensor] = {name: x.detach().clone() for name, x in model.items()}

    # ---- a round

    def round(self) -> Merged | None:
        """Train, contribute, gossip, align where that is due, merge, and go on from there."""
        self.step()
        self._gossip()
        if self.align():
            self._gossip()
        return self.mix()

    def step(self) -> None:
        """Train, and contribute what came out."""
        self.model = dict(self.trainer(self.model, self.facts.round + 1))
        self.facts = replace(self.facts, round=self.facts.round + 1, steps=self.trainer.steps)
        self.contribute()

    def contribute(self) -> None:
        """Put the model in the place of one's own last contribution, in one operation."""
        model = shared(self.model, self.covers)
        self.pool.add(model, note=self.facts.encode(), replaces=own(self.pool))

    def mix(self) -> Merged | None:
        """Merge what is there and go on from it; None where that is nobody's but one's own."""
        there = self.there()
        shares = self.shares(there)
        if not {there[author].content for author in shares} - {there[self.pool.author].content}:
            return None
        models = self._models(there, shares)
        merged = self._merged(there, shares, models)
        found: State = merged
        if self.repair is not None:
            loaded = {a: models.get(a) or load(self.pool, there[a].content) for a in shares}
            whole = sum(shares.values(), Fraction(0))
            endpoints = [{**self.model, **loaded[author]} for author in shares]
            found = self.repair({**self.model, **merged}, endpoints, [float(s / whole) for s in shares.values()])
        self.adopt(found)
        self._remember(merged.receipt.output_digest)
        return merged

    def adopt(self, model: State) -> None:
        """Go on from these tensors; those that are not among them stay."""
        self.model |= {name: x.detach().clone() for name, x in model.items()}

    def final_merge(self) -> Merged:
        """One merge of everyone's last contributions: a function of the set, the same on every peer that has it.

        Contributions in another order of units than most are left out; where units are matched at every merge, all are
        brought together first. Staleness counts from the median of the rounds. Raises InputError or ReplicaError where
        a contribution is announced and its tensors are not here yet.

        Source: "On the Surprising Effectiveness of a Single Global Merging in Decentralized Learning",
        arXiv:2507.06542.
        """
        found = seen(self.pool, announced=True)
        basis = _basis(found)
        there = self._within({author: one for author, one in found.items() if one.facts.basis == basis}, None)
        if not there:
            raise UsageError("nobody has contributed to training yet.")
        rounds = sorted(one.facts.round for one in there.values())
        now = rounds[len(rounds) // 2]
        shares = self._weighed(everyone(self.pool.author, there, now), there, now, {})
        turned: dict[bytes, State] = {}
        if self.alignment is not None and self.alignment.when == "every":
            ordered = sorted(there, key=lambda author: (there[author].content, author))
            models = [load(self.pool, there[author].content) for author in ordered]
            for author, model, order in zip(ordered, models, self.alignment.together(models), strict=True):
                turned[author] = self.alignment.turned(model, order)
        return self._merged(there, shares, turned)

    # ---- one order of units

    def align(self) -> bool:
        """Bring the own model into the order of units that all share, and contribute it so; whether that changed it.

        All first contributions are matched together. Where others are aligned already, in one's own or another order,
        the own model follows the order that most have, by the mean of those. Nobody is aligned alone.
        """
        alignment = self.alignment
        if alignment is None or alignment.when != "once":
            return False
        found = seen(self.pool)
        target = _basis(found)
        if len(found) < 2 or (target is not None and target == self.facts.basis):
            return False
        if target is not None:
            members, asked = self._of_basis(target), self.pool.opset.recipe
            mean = Recipe("weight_average", dtype=asked.dtype, missing=asked.missing, exclude=asked.exclude)
            merged = self._merged(members, everyone(self.pool.author, members, 0), {}, mean)
            permutations = alignment.onto(merged, self.model)
        else:
            contents = sorted({one.content for one in found.values()})
            mine = found[self.pool.author].content
            permutations = alignment.together([load(self.pool, content) for content in contents])[contents.index(mine)]
            target = digest("basis", [alignment.symmetry.digest, contents])
        self.model = alignment.turned(self.model, permutations)
        self.facts = replace(self.facts, basis=target)
        self.trainer.forget()
        self.contribute()
        return True

    # ---- who is there, and what it counts

    def there(self) -> dict[bytes, Contribution]:
        """The contributions that can be merged with one's own. Raises UsageError before the first is made."""
        found = self._within(self._of_basis(self.facts.basis), self.facts.round)
        if self.pool.author not in found:
            raise UsageError("the own model is not among the contributions: call contribute() first.")
        return found

    def shares(self, there: Mapping[bytes, Contribution]) -> dict[bytes, Fraction]:
        """What each counts at this peer, in the order of keys; those that count nothing are left out."""
        row = self.rule(self.pool.author, there, self.facts.round)
        gaps = self._gaps(there) if self.weighing.gap else {}
        return self._weighed(row, there, self.facts.round, gaps) or {self.pool.author: Fraction(1)}

    def _weighed(
        self,
        row: Mapping[bytes, Fraction],
        there: Mapping[bytes, Contribution],
        now: int,
        gaps: Mapping[bytes, Fraction],
    ) -> dict[bytes, Fraction]:
        rounds = history(self.pool) if self.weighing.participation is not None else {}
        facts = {author: one.facts for author, one in there.items()}
        factors = self.weighing.weights(facts, now=now, history=rounds, gaps=gaps)
        found = {author: row.get(author, Fraction(0)) * factors[author] for author in factors}
        return {author: share for author, share in found.items() if share > 0}

    def _of_basis(self, basis: bytes | None) -> dict[bytes, Contribution]:
        return {author: one for author, one in seen(self.pool).items() if one.facts.basis == basis}

    def _within(self, found: dict[bytes, Contribution], now: int | None) -> dict[bytes, Contribution]:
        """Without those that are too far behind: by default of the furthest but one in two."""
        if self.patience is None or not found:
            return found
        rounds = sorted(one.facts.round for one in found.values())
        since = (rounds[len(rounds) // 2] if now is None else now) - self.patience
        return {author: one for author, one in found.items() if one.facts.round >= since}

    def _gaps(self, there: Mapping[bytes, Contribution]) -> dict[bytes, Fraction]:
        """How far this peer went since the merge that others started from, by how far they went, where it knows."""
        found = {}
        for author, one in there.items():
            start = self._starts.get(one.facts.start or b"")
            if start is not None and author != self.pool.author:
                theirs = load(self.pool, one.content)
                found[author] = gap(distance(self.model, start), distance(theirs, start))
        return found

    def _remember(self, merge: bytes) -> None:
        self.facts = replace(self.facts, start=merge)
        if self.weighing.gap:
            self._starts[merge] = dict(self.model)
            while len(self._starts) > STARTS_MAX:
                self._starts.popitem(last=False)

    # ---- the merge itself

    def _models(self, there: Mapping[bytes, Contribution], shares: Mapping[bytes, Fraction]) -> dict[bytes, State]:
        """The contributions of others in one's own order of units, where each merge matches anew."""
        if self.alignment is None or self.alignment.when != "every":
            return {}
        mine = load(self.pool, there[self.pool.author].content)
        found: dict[bytes, State] = {}
        for author in shares:
            if author != self.pool.author:
                model = load(self.pool, there[author].content)
                found[author] = self.alignment.turned(model, self.alignment.onto(mine, model))
        return found

    def _merged(
        self,
        there: Mapping[bytes, Contribution],
        shares: Mapping[bytes, Fraction],
        turned: Mapping[bytes, State],
        recipe: Recipe | None = None,
    ) -> Merged:
        """Merge contributions, or what they were turned to; one content from two authors counts once, for both."""
        mass: dict[bytes, Fraction] = {}
        model: dict[bytes, tuple[Any, Claim]] = {}
        for author, share in shares.items():
            one = there[author]
            content = content_of(turned[author]) if author in turned else one.content
            mass[content] = mass.get(content, Fraction(0)) + share
            model[content] = turned.get(author) or self.pool.source(content, one.files), one.claim
        contents = sorted(mass)
        weighed = zip(contents, decimals([mass[content] for content in contents]), strict=True)
        models = [
            (model[content][0], replace(model[content][1], weight=weight, stats={}))
            for content, weight in weighed
            if weight
        ]
        asked = recipe or self._asked(there)
        genesis = self.pool.genesis
        base = self.pool.source(genesis.base, genesis.files) if genesis.base else None
        inputs = self.inputs if recipe is None else {}
        return into_memory(models, asked, base, Options(rehash=True), Beside(inputs=inputs))

    def _asked(self, there: Mapping[bytes, Contribution]) -> Recipe:
        if callable(self.recipe):
            mine = there.get(self.pool.author)
            if mine is None:
                raise UsageError("the recipe is a function of the own contribution, and there is none.")
            return self.recipe(mine.content)
        return self.recipe or self.pool.opset.recipe


def _basis(found: Mapping[bytes, Contribution]) -> bytes | None:
    """The order of units that most keys share, the least of equal ones; None where nobody is aligned.

    In a pool that is open to any key, keys cost nothing: where peers are not trusted, let members only contribute.
    """
    counts = Counter(one.facts.basis for one in found.values() if one.facts.basis is not None)
    return min(counts, key=lambda basis: (-counts[basis], basis), default=None)


def distance(a: State, b: State) -> float:
    """|a - b| over the tensors of floats that both have, in float64."""
    total = 0.0
    for name in sorted(a.keys() & b.keys()):
        if a[name].is_floating_point():
            x = a[name].double().cpu() - b[name].double().cpu()
            total += dot(x, x)
    return float(total**0.5)

"""How much a contribution counts: one function of what is known of it, in exact numbers.

    w_i  ~  n_i^a  s_i^c  (1 + staleness_i)^-b  FedAU_i  reputation_i / (1 + Lambda_i)

n_i are its examples, s_i its local steps, staleness_i how many rounds it is behind, FedAU_i the mean interval between
its author's contributions, Lambda_i the staleness gap. Each factor is 1 unless it is asked for.

RULES
1. A pure function of the facts: equal sets and rounds give equal weights on every machine. A power with a whole
   exponent is exact; another is the float64 next to exp(e log x), each of the two rounded once.
2. Facts are claims. Who lies about them gains at most what the exponents give: leave factors out, or weigh by a
   reputation, where peers are not trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction

from crdtmerge.canonical import decimal
from crdtmerge.errors import UsageError
from crdtmerge.numerics.scalars import exp, log, nearest
from crdtmerge.train.facts import Facts

EXPONENT_MAX = 4


@dataclass(frozen=True)
class Weighing:
    """The exponents of the factors, and which others count.

    Args:
        examples: a of n_i^a; 1 is federated averaging (McMahan et al. 2017, arXiv:1602.05629).
        steps: c of s_i^c.
        staleness: b of (1 + staleness_i)^-b (FedCompass, Li et al., ICLR 2024, arXiv:2309.14675).
        participation: the cutoff K of FedAU (Wang and Ji, ICLR 2024, arXiv:2306.03401); None leaves it out.
        gap: whether to divide by 1 + Lambda_i (after CO2, Sun et al., ICLR 2024, arXiv:2401.16265).
        reputation: a number of at least 0 for some authors, by their keys; 1 for all others.

    Raises:
        UsageError: an exponent that is no number or beyond 4, a cutoff below 1, a reputation below 0.

    >>> rule = Weighing(examples=1, staleness=2)
    >>> rule.weights({b"a": Facts(5, 30), b"b": Facts(3, 90)}, now=5)
    {b'a': Fraction(30, 1), b'b': Fraction(10, 1)}
    """

    examples: object = 0
    steps: object = 0
    staleness: object = 0
    participation: int | None = None
    gap: bool = False
    reputation: Mapping[bytes, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what in ("examples", "steps", "staleness"):
            if not 0 <= _said(getattr(self, what), what) <= EXPONENT_MAX:
                raise UsageError(f"{what} = {getattr(self, what)!r}: an exponent from 0 to {EXPONENT_MAX} is needed.")
        if self.participation is not None and (type(self.participation) is not int or self.participation < 1):
            raise UsageError(f"participation = {self.participation!r}: the cutoff is a number of rounds from 1 on.")
        for author, value in self.reputation.items():
            if _said(value, "reputation") < 0:
                raise UsageError(f"reputation of {author.hex()[:16]} = {value!r}: must be at least 0.")

    def weights(
        self,
        facts: Mapping[bytes, Facts],
        *,
        now: int,
        history: Mapping[bytes, Iterable[int]] | None = None,
        gaps: Mapping[bytes, Fraction] | None = None,
    ) -> dict[bytes, Fraction]:
        """The weight of each author's contribution, not normalised, in the order of keys.

        ``now`` is the round that staleness is counted from; ``history`` the rounds in which each contributed;
        ``gaps`` those Lambda_i that are known, 0 for others.
        """
        found = {}
        for author in sorted(facts):
            one = facts[author]
            weight = power(one.examples, self.examples) * power(max(one.steps, 1), self.steps)
            weight /= power(1 + max(0, now - one.round), self.staleness)
            if self.participation is not None:
                weight *= participation((history or {}).get(author, [one.round]), now, self.participation)
            if self.gap:
                weight /= 1 + (gaps or {}).get(author, Fraction(0))
            found[author] = weight * Fraction(_said(self.reputation.get(author, 1), "reputation"))
        return found


def participation(rounds: Iterable[int], now: int, cutoff: int) -> Fraction:
    """The mean observed interval between participations up to round ``now``; an interval ends at the cutoff at latest.

    With S the rounds since the last end, an interval of S is recorded when the peer takes part or S = K, and S begins
    anew; the weight is the mean of what is recorded, 1 where nothing is. It tends to one over the probability of taking
    part, so that who rarely does counts more when it does.

    >>> participation([0, 3], 3, 50), participation([0, 3], 3, 2)
    (Fraction(2, 1), Fraction(4, 3))

    Source: Wang and Ji, "A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging"
    (FedAU), ICLR 2024, arXiv:2306.03401, algorithm 2.
    """
    times = sorted({number + 1 for number in rounds if 0 <= number <= now})
    last = times[-1] if times else 0
    missed = (now + 1 - last) // cutoff
    count, total = missed, last + missed * cutoff
    for before, after in zip([0, *times], times, strict=False):
        count += -((before - after) // cutoff)
    return Fraction(total, count) if count else Fraction(1)


def gap(now: float, moved: float) -> Fraction:
    """The staleness gap Lambda = |theta_now - theta_start| / |delta|: how far others went while this was on its way.

    ``now`` is the distance from where training started to where the receiver is, ``moved`` the length of what was
    learnt; a contribution that did not move has none.
    """
    return Fraction(now) / Fraction(moved) if moved > 0 else Fraction(0)


def power(x: int, exponent: object) -> Fraction:
    """x^e of a whole number x >= 1: exact for whole e, else the float64 next to exp(e log x).

    >>> power(3, 2), power(4, "0.5")
    (Fraction(9, 1), Fraction(2, 1))
    """
    e = _said(exponent, "exponent")
    if e == e.to_integral_value():
        return Fraction(x) ** int(e)
    return Fraction(exp(nearest(e) * log(float(x))))


def _said(value: object, what: str) -> Decimal:
    try:
        return decimal(value)
    except ValueError as fault:
        raise UsageError(f"{what}: {fault}.") from None

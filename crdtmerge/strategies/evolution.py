"""Searches that maximise a function of a few numbers: covariance matrix adaptation and a genetic algorithm.

Everything but the function is the same bits on every machine: random words by counters, scalar functions rounded
correctly, sums from left to right, eigenvalues by Jacobi rotations. Points are whole multiples of 1/65536 in [0, 1];
NaN is the worst value; of equal values the earlier candidate is the better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crdtmerge.numerics import philox
from crdtmerge.numerics.decompositions import eigh
from crdtmerge.numerics.elementary import sqrt as rooted
from crdtmerge.numerics.scalars import cos, exp, left_sum, log, sin

Vector = NDArray[np.float64]
Genome = tuple[int, ...]

GRID = 1 << 16
"""Genes are whole numbers from 0 to GRID."""

AHEAD = 1024
"""Random words that are drawn at a time."""

EIGENVALUE_MIN = 1e-14
"""Relative to the largest: below it a covariance has lost a direction to rounding."""

Evaluate = Callable[[Genome], float]


def quantised(x: Vector) -> Genome:
    """A point as genes, clamped to [0, 1]."""
    return tuple(min(max(math.floor(v * GRID + 0.5), 0), GRID) if v == v else 0 for v in x.tolist())


def point(genome: Genome) -> Vector:
    """Genes as a point."""
    return np.array(genome, np.float64) / GRID


def better(one: float, other: float) -> bool:
    """Whether a value is strictly better than another; NaN is worse than every number."""
    return one == one and (other != other or one > other)


def ranked(values: Sequence[float]) -> list[int]:
    """Indices from the best value to the worst, ties by index."""
    return sorted(
        range(len(values)), key=lambda i: (values[i] != values[i], -values[i] if values[i] == values[i] else 0, i)
    )


class Draws:
    """Random numbers in an order, from a stream: number i is what it is whoever asks."""

    def __init__(self, stream: philox.Stream) -> None:
        self._stream, self._at = stream, 0
        self._words: list[int] = []

    def uniforms(self, count: int) -> list[float]:
        """Numbers in (0, 1), odd multiples of 2^-33."""
        while len(self._words) < count:
            self._words += philox.words(self._stream, self._at, self._at + AHEAD).tolist()
            self._at += AHEAD
        words, self._words = self._words[:count], self._words[count:]
        return [(2 * word + 1) / (1 << 33) for word in words]

    def normals(self, count: int) -> Vector:
        """Standard normal numbers by Box and Muller's transform, each function rounded correctly."""
        pairs = -(-count // 2)
        u = self.uniforms(2 * pairs)
        found = []
        for one, other in zip(u[:pairs], u[pairs:], strict=True):
            radius, angle = math.sqrt(-2.0 * log(one)), 2.0 * math.pi * other
            found += [radius * cos(angle), radius * sin(angle)]
        return np.array(found[:count])

    def below(self, bound: int) -> int:
        """A whole number from 0 to bound - 1."""
        return min(int(self.uniforms(1)[0] * bound), bound - 1)


@dataclass(frozen=True)
class Found:
    """The best candidate, its value, and the best value after each generation (the beginning's first)."""

    genome: Genome
    value: float
    history: list[float]


@dataclass
class _Best:
    genome: Genome
    value: float

    def offer(self, genome: Genome, value: float) -> None:
        if better(value, self.value):
            self.genome, self.value = genome, value


def population_of(genes: int) -> int:
    """The usual number of candidates of a generation: 4 + floor(3 ln n)."""
    return 4 + math.floor(3 * log(genes)) if genes > 1 else 4


def cma_es(
    start: Genome, evaluate: Evaluate, draws: Draws, *, generations: int, population: int | None, sigma: float
) -> Found:
    """CMA-ES: sample from N(m, sigma^2 C), move m to the best half, adapt C and sigma.

        x_k = m + sigma B D z_k                       m <- m + sum_i w_i (x_(i) - m)
        p_s <- (1 - c_s) p_s + sqrt(c_s (2 - c_s) mu_w) C^(-1/2) y_w,   y_w = (m' - m) / sigma
        p_c <- (1 - c_c) p_c + h sqrt(c_c (2 - c_c) mu_w) y_w
        C   <- (1 - c_1 - c_mu) C + c_1 p_c p_c^T + c_mu sum_i w_i y_(i) y_(i)^T
        sigma <- sigma exp((c_s / d_s) (|p_s| / E|N(0, 1)| - 1))

    Candidates outside [0, 1] are brought back to its edge and rounded to the grid before they are evaluated, and that
    is what the distribution learns from. The beginning is evaluated too, and the best of all is returned.

    Source: Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv:1604.00772.
    """
    n = len(start)
    best = _Best(start, evaluate(start))
    history = [best.value]
    if n == 0 or generations == 0:
        return Found(best.genome, best.value, history)
    lam = population or population_of(n)
    mu = max(lam // 2, 1)
    raw = [log((lam + 1) / 2) - log(i + 1) for i in range(mu)]
    w = [one / left_sum(raw) for one in raw] if mu > 1 else [1.0]
    mu_w = 1 / left_sum(one * one for one in w)
    c_s = (mu_w + 2) / (n + mu_w + 5)
    d_s = 1 + 2 * max(0.0, math.sqrt((mu_w - 1) / (n + 1)) - 1) + c_s
    c_c = (4 + mu_w / n) / (n + 4 + 2 * mu_w / n)
    c_1 = 2 / ((n + 1.3) * (n + 1.3) + mu_w)
    c_mu = min(1 - c_1, 2 * (mu_w - 2 + 1 / mu_w) / ((n + 2) * (n + 2) + mu_w))
    expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
    m, p_s, p_c, c = point(start), np.zeros(n), np.zeros(n), np.eye(n)
    for generation in range(generations):
        values, b = eigh(c)
        d = rooted(np.where(values > values[-1] * EIGENVALUE_MIN, values, values[-1] * EIGENVALUE_MIN))
        genomes = [quantised(m + sigma * _times(b, d * draws.normals(n))) for _ in range(lam)]
        scores = [evaluate(genome) for genome in genomes]
        for genome, score in zip(genomes, scores, strict=True):
            best.offer(genome, score)
        history.append(best.value)
        ys = [(point(genomes[i]) - m) / sigma for i in ranked(scores)[:mu]]
        y_w = np.zeros(n)
        for one, y in zip(w, ys, strict=True):
            y_w = y_w + one * y
        m = m + sigma * y_w
        whitened = _times(b, _times(b.T, y_w) / d)
        p_s = (1 - c_s) * p_s + math.sqrt(c_s * (2 - c_s) * mu_w) * whitened
        length = math.sqrt(left_sum((p_s * p_s).tolist()))
        settled = 1 - exp(2 * (generation + 1) * log(1 - c_s))
        h = 1.0 if length / math.sqrt(settled) < (1.4 + 2 / (n + 1)) * expected else 0.0
        p_c = (1 - c_c) * p_c + h * math.sqrt(c_c * (2 - c_c) * mu_w) * y_w
        c = (1 - c_1 - c_mu + (1 - h) * c_1 * c_c * (2 - c_c)) * c + c_1 * (p_c[:, None] * p_c[None, :])
        for one, y in zip(w, ys, strict=True):
            c = c + c_mu * one * (y[:, None] * y[None, :])
        sigma = sigma * exp(min((c_s / d_s) * (length / expected - 1), 1.0))
    return Found(best.genome, best.value, history)


def _times(matrix: Vector, x: Vector) -> Vector:
    """A matrix times a vector, each sum from left to right."""
    total = np.zeros(len(matrix))
    for j in range(matrix.shape[1]):
        total = total + matrix[:, j] * x[j]
    return total


@dataclass(frozen=True)
class Breeding:
    """How a genetic algorithm breeds: indices of crossover and mutation, their probabilities, levels of a gene."""

    population: int
    crossover: float = 0.9
    crossover_eta: float = 15.0
    mutation: float | None = None
    mutation_eta: float = 20.0
    levels: int | None = None

    def on_levels(self, x: Vector) -> Genome:
        """A point as genes, on the levels that genes may have."""
        if self.levels is None:
            return quantised(x)
        stepped = np.floor(np.where(x < 0, 0.0, np.where(x > 1, 1.0, x)) * self.levels + 0.5) / self.levels
        return quantised(stepped)


def genetic(start: Genome, evaluate: Evaluate, draws: Draws, breeding: Breeding, *, generations: int) -> Found:
    """A genetic algorithm: tournaments of two, simulated binary crossover, polynomial mutation, the best survive.

    The first population is the beginning and uniform random points. Children that equal one another or a parent are
    not evaluated. Of parents and children the best survive, so the best is never lost.

    Source: Deb and Agrawal, Complex Systems 9, 1995; Deb and Goyal 1996; as in Mergenetic, arXiv:2505.11427.
    """
    n = len(start)
    people = [start]
    if generations and n:
        people += [breeding.on_levels(np.array(draws.uniforms(n))) for _ in range(breeding.population - 1)]
    people = list(dict.fromkeys(people))
    scores = [evaluate(genome) for genome in people]
    history = [scores[ranked(scores)[0]]]
    for _ in range(generations if n else 0):
        children: list[Genome] = []
        while len(children) < breeding.population:
            mother, father = (point(people[_winner(scores, draws)]) for _ in range(2))
            pair = _crossed(mother, father, draws, breeding)
            children += [breeding.on_levels(_mutated(child, draws, breeding)) for child in pair]
        known = set(people)
        fresh = [child for child in dict.fromkeys(children[: breeding.population]) if child not in known]
        people, scores = people + fresh, scores + [evaluate(child) for child in fresh]
        kept = sorted(ranked(scores)[: breeding.population])
        people, scores = [people[i] for i in kept], [scores[i] for i in kept]
        history.append(scores[ranked(scores)[0]])
    first = ranked(scores)[0]
    return Found(people[first], scores[first], history)


def _winner(scores: Sequence[float], draws: Draws) -> int:
    one, other = sorted((draws.below(len(scores)), draws.below(len(scores))))
    return other if better(scores[other], scores[one]) else one


def _power(x: float, exponent: float) -> float:
    """x to a power, for x > 0; log and exp rounded correctly."""
    return exp(exponent * log(x))


def _crossed(mother: Vector, father: Vector, draws: Draws, breeding: Breeding) -> tuple[Vector, Vector]:
    """Simulated binary crossover: children as far apart as parents on the average."""
    n = len(mother)
    u = draws.uniforms(2 * n + 1)
    if u[2 * n] >= breeding.crossover:
        return mother, father
    power = 1 / (breeding.crossover_eta + 1)
    beta = np.array([_power(2 * v, power) if v < 0.5 else _power(1 / (2 * (1 - v)), power) for v in u[:n]])
    beta = np.where(np.array(u[n : 2 * n]) < 0.5, beta, 1.0)  # each gene is crossed with probability one half
    middle, half = (mother + father) / 2, (mother - father) / 2
    return middle + beta * half, middle - beta * half


def _mutated(x: Vector, draws: Draws, breeding: Breeding) -> Vector:
    """Polynomial mutation of each gene with a probability of 1/n, or the one that is given."""
    n = len(x)
    u = draws.uniforms(2 * n)
    probability = breeding.mutation if breeding.mutation is not None else 1 / n
    power = 1 / (breeding.mutation_eta + 1)
    moved = x.copy()
    for i in range(n):
        if u[n + i] < probability:
            v = u[i]
            moved[i] += _power(2 * v, power) - 1 if v < 0.5 else 1 - _power(2 * (1 - v), power)
    return moved

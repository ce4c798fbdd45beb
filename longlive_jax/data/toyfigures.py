"""Figures of an evaluation: percentages with 95 % intervals, measured quantities, paired losses."""

import math
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """One figure. ``low``, ``high``: 95 % interval, None where there is none; ``n`` streams gave ``readings``."""

    group: str
    measure: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    n: int = 0
    readings: int = 0
    target: float | None = None
    at_most: bool = False

    @property
    def met(self):
        """Whether the target is met; None without one."""
        return None if self.target is None else (self.value <= self.target if self.at_most else self.value >= self.target)


def wilson(share, n, z=1.96):
    """95 % interval of a share seen in ``n`` independent trials."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(group, measure, outcomes, target=None):
    """The Row of a percentage; ``outcomes``: one sequence of bool a stream, an empty one counts for nothing.

    The Wilson interval takes the number of readings over the design effect (variance by streams over that of independent readings); where all
    are right, or none, the number of streams.
    """
    pairs = np.array([(np.sum(row), np.size(row)) for row in outcomes if np.size(row)], float).reshape(-1, 2)
    streams, of = len(pairs), pairs[:, 1].sum()
    if not streams:
        return Row(group, measure, math.nan, "%", None, None, 0, 0, target)
    share = pairs[:, 0].sum() / of
    plain = share * (1 - share) / of
    effective = streams
    if plain and streams > 1:
        spread = streams / (streams - 1) * ((pairs[:, 0] - share * pairs[:, 1]) ** 2).sum() / of**2
        effective = of / max(1.0, spread / plain)
    low, high = wilson(share, max(1.0, effective))
    return Row(group, measure, 100 * share, "%", 100 * low, 100 * high, streams, int(of), target)


def loss_bound(before, after, readings=1, seed=0):
    """Mean of ``before - after`` (percentages, one value a stream of ``readings``) and its upper 95 % bound.

    The bound is the largest of the normal one, the bootstrap's and, where no stream differs, the rule of three over all readings.
    """
    loss = np.asarray(before, float) - np.asarray(after, float)
    n = len(loss)
    if not loss.any():
        return 0.0, 100 * min(1.0, 3 / (n * readings))
    means = loss[np.random.default_rng(seed).integers(0, n, (10_000, n))].mean(1)
    normal = loss.mean() + 1.645 * loss.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return float(loss.mean()), float(max(normal, np.quantile(means, 0.95)))


def quantity(group, measure, values, unit, target=None):
    """Rows of median, 95th percentile and maximum; the target is for the 95th percentile."""
    values = np.asarray(values, float)
    pick = {"median": np.median, "95th percentile": lambda v: np.quantile(v, 0.95), "maximum": np.max}
    return [
        Row(group, f"{measure}, {name}", float(f(values)) if len(values) else math.nan, unit, n=len(values), readings=len(values),
            target=target if name == "95th percentile" else None, at_most=True)
        for name, f in pick.items()
    ]  # fmt: skip


__all__ = ["Row", "loss_bound", "quantity", "rate", "wilson"]

"""Which rows come next when k domains are mixed: decided from the current proportions alone, without a table of what was decided before.

A plan of n rows costs O(n + k), however large the data set. A domain is walked in a keyed permutation of its rows, a new one each time it has
been through, so its position is one integer and no row comes up twice before every row of the domain has come up once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Subset

from dataflex.errors import ComponentError, ConfigError, Problem, ResumeError, listing, nearest
from dataflex.functional.mixing import interleave, proportions, quotas
from dataflex.utils.logging import logger
from dataflex.utils.permutation import RepeatedPermutation

SampleRule = Literal["mixture", "stratified", "uniform"]
MixtureUnit = Literal["sample", "token"]


class MixtureManager:
    """The mixture and each domain's position in it. Mixers read `names`, `k`, `sizes`, `proportions`, `initial_proportions`, `sources`.

    Attributes:
        names: names of the domains.
        k: how many there are.
        sizes: rows of each, int64 (k,).
        sample_rule: `mixture` follows `proportions`; `stratified` goes by size, so that every pass over the data holds each row exactly once,
            however it is split into plans; `uniform` gives every domain the same.
        mixture_unit: whether proportions count samples or tokens.
        initial_proportions: the proportions at the start (k,).
        proportions: the current ones (k,).
        drawn: rows drawn from each domain so far, int64 (k,): position drawn % size of pass drawn // size.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int] | None = None,
        *,
        domain_ids: np.ndarray | None = None,
        sample_rule: SampleRule = "mixture",
        initial_proportions: ArrayLike | None = None,
        mixture_unit: MixtureUnit = "sample",
        mean_tokens: ArrayLike | None = None,
        dataset: Any = None,
        seed: int = 0,
    ):
        """
        Args:
            sizes: rows of each domain, if the data set is the domains one after the other.
            domain_ids: otherwise the domain, 0 to k - 1, of every row.
            initial_proportions: of rule `mixture`; equal when not given.
            mean_tokens: mean tokens of a sample of each domain (k,), for unit `token`.
            dataset: what the rows are of, for `sources`.

        Raises:
            ConfigError: one of these is not as described, or a domain has no rows.
        """
        self.names, self.k, self.seed, self.dataset = list(names), len(names), int(seed), dataset
        self.sample_rule = _choice("mixture_sample_rule", sample_rule, SampleRule)
        self.mixture_unit = _choice("mixture_unit", mixture_unit, MixtureUnit)
        self.sizes, self._table = self._layout(sizes, domain_ids)
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._mean_tokens = self._read_mean_tokens(mean_tokens)
        self.initial_proportions = self._read_proportions(initial_proportions)
        self.proportions = self.initial_proportions
        self.drawn = np.zeros(self.k, dtype=np.int64)
        self._owed = np.zeros(self.k)  # rows by which each domain is behind its share; below 0, ahead
        self._orders = [RepeatedPermutation(size, self.seed, "mixture", name) for size, name in zip(self.sizes, self.names, strict=True)]
        self._warned = False

    def _layout(self, sizes: Sequence[int] | None, domain_ids: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """The sizes, and the rows domain by domain unless the data set has them in that order."""
        if (sizes is None) == (domain_ids is None):
            raise TypeError("MixtureManager takes either sizes or domain_ids")
        if domain_ids is None:
            counts = np.array(sizes, dtype=np.int64)
            if counts.shape != (self.k,):
                raise _problem("sizes", f"has {counts.size} numbers for {self.k} domains ({listing(self.names)})")
        else:
            ids = np.asarray(domain_ids)
            if len(ids) and (ids.min() < 0 or ids.max() >= self.k):
                raise _problem("domain_id", f"must be from 0 to {self.k - 1}, one for each of the domains {listing(self.names)}")
            counts = np.bincount(ids, minlength=self.k)
        empty = [name for name, size in zip(self.names, counts, strict=True) if size <= 0]
        if empty or not self.k:
            raise _problem("dataset", f"the mixture has domains without rows: {listing(empty)}; leave them out")
        if domain_ids is None or (ids[1:] >= ids[:-1]).all():
            return counts, None
        order = ids.astype(np.min_scalar_type(self.k)).argsort(kind="stable")  # NumPy sorts numbers of 8 and 16 bits in linear time
        return counts, order.astype(np.int32 if len(ids) < 2**31 else np.int64)

    def _read_mean_tokens(self, mean_tokens: ArrayLike | None) -> np.ndarray:
        if self.mixture_unit == "sample":
            return np.ones(self.k)
        tokens = np.array([] if mean_tokens is None else mean_tokens, dtype=np.float64)
        if tokens.shape != (self.k,) or not (np.isfinite(tokens) & (tokens > 0)).all():
            raise _problem("mixture_unit", f"'token' needs the mean tokens per sample of each of the {self.k} domains, each above 0")
        return tokens

    def _read_proportions(self, given: ArrayLike | None) -> np.ndarray:
        if self.sample_rule == "stratified":
            return proportions(self.sizes * self._mean_tokens, self.k)
        try:
            return proportions(np.ones(self.k) if given is None or self.sample_rule == "uniform" else given, self.k)
        except ValueError as error:
            raise _problem("init_mixture_proportions", f"{error}; the domains are {', '.join(self.names)}") from None

    @property
    def probs(self) -> np.ndarray:
        """Another name of `proportions`."""
        return self.proportions

    @property
    def sample_proportions(self) -> np.ndarray:
        """Each domain's share (k,) of the samples, whatever the unit of `proportions`."""
        return proportions(self.proportions / self._mean_tokens, self.k)

    def from_samples(self, shares: ArrayLike) -> np.ndarray:
        """Shares (k,) of the samples as proportions in the manager's unit."""
        return proportions(np.asarray(shares) * self._mean_tokens, self.k)

    def set_proportions(self, values: ArrayLike) -> None:
        """Mix by `values` (k,), scaled to sum to 1, from the next plan on. Without effect unless the rule is `mixture`.

        Raises:
            ComponentError: they are not k numbers, finite and not negative, with one above 0.
        """
        try:
            new = proportions(values, self.k)
        except (TypeError, ValueError) as error:
            raise ComponentError(f"the mixture of {', '.join(self.names)} cannot be changed: {error}") from None
        if self.sample_rule == "mixture":
            self.proportions = new
        elif not self._warned:
            logger.warning("mixture_sample_rule: %s fixes the mixture, so what the mixer decides is not used; set it to mixture", self.sample_rule)
            self._warned = True

    def domain_indices(self, domain: int) -> np.ndarray:
        """All rows of a domain, ascending."""
        start, stop = int(self._starts[domain]), int(self._starts[domain] + self.sizes[domain])
        return np.arange(start, stop) if self._table is None else self._table[start:stop].astype(np.int64)

    @cached_property
    def sources(self) -> dict[str, Any]:
        """Each domain's rows as a data set of its own, by name: a view, not a copy."""
        rows = {name: self.domain_indices(domain) for domain, name in enumerate(self.names)}
        if hasattr(self.dataset, "select"):
            return {name: self.dataset.select(part) for name, part in rows.items()}
        return {name: Subset(self.dataset, part.tolist()) for name, part in rows.items()}

    def plan(self, n: int) -> np.ndarray:
        """The next n rows of the data set, int64 (n,), in the order of training. Moves the position.

        Domains alternate evenly instead of being shuffled: a batch then holds each domain's share to about one row, where shuffling would
        leave a random error of sqrt(batch * share * (1 - share)) rows in every batch, and so in every gradient and per-domain loss.
        """
        parts = [self._draw(length) for length in self._stretches(n)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _stretches(self, n: int) -> Iterator[int]:
        """n in parts that do not reach across the end of a pass, where `stratified` must have drawn every row."""
        total = int(self.sizes.sum())
        while n > 0:
            length = min(n, total - int(self.drawn.sum()) % total) if self.sample_rule == "stratified" else n
            yield length
            n -= length

    def _draw(self, n: int) -> np.ndarray:
        counts = self._counts(n)
        rows = np.concatenate([self._take(domain, int(counts[domain])) for domain in np.flatnonzero(counts).tolist()])
        return rows[interleave(counts)]

    def _counts(self, n: int) -> np.ndarray:
        """Rows (k,) of each domain among the next n. What rounding withholds stays owed, so a small domain gets its share in the long run."""
        shares = self.sample_proportions
        self._owed += n * shares
        # A domain far ahead waits, but one with a share takes part if all are ahead; one without a share gets nothing, whatever it is owed.
        due = np.where(shares > 0, np.maximum(self._owed, 1e-12 * shares), 0.0)
        counts = quotas(due, n)
        self._owed -= counts
        return counts

    def _take(self, domain: int, count: int) -> np.ndarray:
        """The next `count` rows of a domain."""
        places = self._starts[domain] + self._orders[domain].span(int(self.drawn[domain]), count)
        self.drawn[domain] += count
        return places if self._table is None else self._table[places].astype(np.int64)

    def state_dict(self) -> dict[str, Any]:
        """JSON values: 3 * k numbers."""
        return {"drawn": self.drawn.tolist(), "owed": self._owed.tolist(), "proportions": self.proportions.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; the next plan is then the one that would have come next.

        Raises:
            ResumeError: it is of another number of domains.
        """
        if len(state["drawn"]) != self.k:
            raise ResumeError(f"the checkpoint mixes {len(state['drawn'])} domains, this run {self.k} ({', '.join(self.names)})")
        self.drawn = np.array(state["drawn"], dtype=np.int64)
        self._owed = np.array(state["owed"], dtype=np.float64)
        self.proportions = np.array(state["proportions"], dtype=np.float64)


def _problem(key: str, message: str) -> ConfigError:
    return ConfigError(Problem("", key, message))


def _choice(key: str, value: Any, allowed: Any) -> Any:
    names = get_args(allowed)
    if value not in names:
        raise _problem(key, f"{value!r} is not one of {listing(names)}.{nearest(value, names)}")
    return value

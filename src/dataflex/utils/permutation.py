"""Random orders that are never written out: any stretch of a permutation of ten million rows, without the other rows."""

from __future__ import annotations

import math

import numpy as np

from dataflex.utils.seeding import derive_seed

ROUNDS = 8  # four make a Feistel network with random round functions look random; more cost little and help the smallest sizes
SORTED_SIZE = 1024  # up to this many elements, sorting random numbers is cheaper than a network, and exactly uniform


class KeyedPermutation:
    """A permutation of 0, ..., size - 1 that depends on `key` alone; O(sqrt(size)) time and memory to make, O(1) per element to read.

    A number is a pair (left, right) with left < a, right < b and a * b >= size. Each round adds a random function of one half to the other
    half, which can be undone, so the rounds together permute the pairs (Luby and Rackoff; Black and Rogaway, CT-RSA 2002, for a != b).
    The fewer than a pairs beyond `size` are walked through: the network is applied again until it leads back inside.
    """

    def __init__(self, size: int, *key: object):
        self.size = int(size)
        self._rows = math.isqrt(max(self.size - 1, 0)) + 1
        self._columns = -(-self.size // self._rows)
        rng = np.random.default_rng(derive_seed("permutation", self.size, *key))
        self._shifts = [(rng.integers(self._rows, size=self._columns), rng.integers(self._columns, size=self._rows)) for _ in range(ROUNDS // 2)]

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The elements (n,) int64 at `positions` (n,), each from 0 to size - 1."""
        elements = self._network(positions)
        outside = np.flatnonzero(elements >= self.size)
        while len(outside):
            elements[outside] = self._network(elements[outside])
            outside = outside[elements[outside] >= self.size]
        return elements

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        left, right = np.divmod(numbers.astype(np.int64, copy=False), self._columns)
        for of_right, of_left in self._shifts:
            left += of_right[right]
            left -= self._rows * (left >= self._rows)
            right += of_left[left]
            right -= self._columns * (right >= self._columns)
        return left * self._columns + right


class RepeatedPermutation:
    """An endless order: element p is element p % size of a permutation made for pass p // size, so every pass holds each element once."""

    def __init__(self, size: int, *key: object):
        self.size, self._key = int(size), key
        self._current: tuple[int, KeyedPermutation] | None = None

    def span(self, start: int, count: int) -> np.ndarray:
        """Elements (count,) int64 from position `start` on. Nothing is remembered: the same span always holds the same elements."""
        return self._sorted(start, count) if self.size <= SORTED_SIZE else self._walked(start, count)

    def _sorted(self, start: int, count: int) -> np.ndarray:
        """All passes of a small size at once: a pass is the order of its random numbers, which a counter finds without those before."""
        first, passes = start // self.size, -(-(start % self.size + count) // self.size)
        blocks = -(-self.size // 4)  # Philox makes four numbers per value of its counter
        generator = np.random.Philox(key=derive_seed("passes", self.size, *self._key), counter=first * blocks)
        numbers = generator.random_raw(passes * blocks * 4).reshape(passes, blocks * 4)[:, : self.size]
        return numbers.argsort(axis=1, kind="stable").ravel()[start % self.size :][:count].astype(np.int64, copy=False)

    def _walked(self, start: int, count: int) -> np.ndarray:
        elements = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            number, within = divmod(start + filled, self.size)
            length = min(count - filled, self.size - within)
            elements[filled : filled + length] = self._pass(number).at(np.arange(within, within + length))
            filled += length
        return elements

    def _pass(self, number: int) -> KeyedPermutation:
        if self._current is None or self._current[0] != number:
            self._current = number, KeyedPermutation(self.size, *self._key, number)
        return self._current[1]

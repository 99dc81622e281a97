"""Randomness keyed by (seed, purpose, counter): it neither reads nor moves the global generators."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derive_seed(*key: object) -> int:
    """A 63-bit seed that depends on every part of `key` and on nothing else (not on PYTHONHASHSEED)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


@contextlib.contextmanager
def isolated_rng(*key: object) -> Iterator[None]:
    """Run a block under generators seeded from `key`; afterwards the global ones are as they were.

    Exact resume needs this for everything that runs between two optimizer steps: the Trainer restores the global
    generators either before or after that point, depending on where in the epoch the checkpoint lies.
    """
    seed = derive_seed(*key)
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    use_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    cuda_states = torch.cuda.get_rng_state_all() if use_cuda else []
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if use_cuda:
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if use_cuda:
            torch.cuda.set_rng_state_all(cuda_states)

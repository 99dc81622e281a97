"""`validate` answers in words, whatever it is given: no traceback, and nothing that takes long. 2000 files in `make test-all`, 100 in `make test`."""

from __future__ import annotations

import signal
from contextlib import contextmanager

import pytest
from fuzz import make_files
from workspace import make_workspace, run_cli

from dataflex.core.registry import REGISTRY

SECONDS = 10


class TookTooLong(BaseException):
    """Not an Exception: nothing may take it for one of its own."""


@contextmanager
def at_most(seconds: float):
    """Of computing; waiting may take longer, since other tests run beside this one."""

    def stop(*_):
        raise TookTooLong

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 6 * seconds))
    before = [signal.signal(number, stop) for number, _, _ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def trouble(folder, seed: int) -> str:
    """What is wrong with the answer to the files of `seed`."""
    overrides = make_files(folder, seed)
    try:
        with at_most(SECONDS):
            result = run_cli("validate", "config.yaml", *overrides)
    except TookTooLong:
        return f"took more than {SECONDS} s"
    if result.exit_code not in (0, 2) or not isinstance(result.exception, SystemExit | None):
        return f"exit {result.exit_code}, {result.exception!r}"
    if result.exit_code == 2 and not result.stderr.startswith(("dataflex-cli: ", "Usage: ")):
        return f"no words: {result.stderr!r}"
    text = result.stdout + result.stderr
    if "cannot be checked" in text or "cannot be planned" in text:
        return text
    return "" if all(letter == "\n" or letter.isprintable() for letter in text) else f"not printable: {text!r}"


PARTS = 20


@pytest.mark.parametrize(
    "seeds",
    [range(0, 100), *(pytest.param(range(100 + 95 * k, 195 + 95 * k), marks=pytest.mark.long) for k in range(PARTS))],
    ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}",
)
def test_any_file_is_answered_in_words(tmp_path, seeds):
    assert set(REGISTRY.names("weighter")) >= set()
    make_workspace(tmp_path)
    found = {seed: problem for seed in seeds if (problem := trouble(tmp_path, seed))}
    assert not found, "\n".join(f"seed {seed}: {problem}" for seed, problem in found.items())

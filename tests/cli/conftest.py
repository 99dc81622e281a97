"""Shared by the command line's tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _fresh_logger():
    """The command line attaches a handler to whatever stderr is at the time."""
    import datasets

    from dataflex.utils.logging import logger

    datasets.disable_progress_bars()
    yield
    logger.handlers.clear()
    logger.propagate = True

"""The package's logger. Importing adds no handler, so a library user's logging set-up is left alone."""

from __future__ import annotations

import logging
import os
from functools import cache

logger = logging.getLogger("dataflex")


def _main_process_only(record: logging.LogRecord) -> bool:
    """Every process reports errors; notes and warnings come from rank 0 alone."""
    return record.levelno >= logging.ERROR or int(os.environ.get("RANK", "0")) == 0


logger.addFilter(_main_process_only)


@cache
def warn_once(message: str) -> None:
    """A warning that would otherwise come with every row or every look at a file."""
    logger.warning("%s", message)


def show_logs(level: int = logging.INFO) -> None:
    """Print DataFlex's log lines on stderr; called by the command line, never on import."""
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s dataflex: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level)

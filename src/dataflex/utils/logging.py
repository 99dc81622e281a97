"""The package's logger. Importing adds no handler, so a library user's logging set-up is left alone."""

from __future__ import annotations

import logging
import os
from functools import cache

from dataflex.configs.secrets import redacted
from dataflex.utils.printable import one_line

logger = logging.getLogger("dataflex")


def _main_process_only(record: logging.LogRecord) -> bool:
    """Every process reports errors; notes and warnings come from rank 0 alone."""
    return record.levelno >= logging.ERROR or int(os.environ.get("RANK", "0")) == 0


logger.addFilter(_main_process_only)


class _Formatter(logging.Formatter):
    """Names of rows, domains and files may hold anything; a line of the log stays one line, without control sequences and credentials."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(redacted(super().formatMessage(record)))


@cache
def warn_once(message: str) -> None:
    """A warning that would otherwise come with every row or every look at a file."""
    logger.warning("%s", message)


def show_logs(level: int = logging.INFO) -> None:
    """Print DataFlex's log lines on stderr; called by the command line, never on import."""
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter("%(levelname)s dataflex: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level)

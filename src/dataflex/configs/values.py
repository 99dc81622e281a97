"""Wording of a value that pydantic refuses. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

from pydantic_core import ErrorDetails

from dataflex.errors import nearest
from dataflex.utils.printable import shortened

# Of keys that every Trainer has.
MAXIMUM = {"num_train_epochs": 10**9, "max_steps": 10**12}
_LARGEST = 2**63 - 1


def number_problem(number: float, minimum: float | None = None, maximum: float | None = None) -> str:
    """What is wrong with a number, an infinite one or one that no library can hold included; an empty string if nothing is."""
    if not abs(number) <= _LARGEST:
        return f"{shortened(_shown(number), 80)} is not valid: must be a number of at most 64 bits"
    if minimum is not None and number < minimum:
        return f"{number} is not valid: must be at least {minimum}"
    return f"{number} is not valid: must be at most {maximum}" if maximum is not None and number > maximum else ""


def wording(detail: ErrorDetails) -> str:
    """`'x' is not valid: <why>.`, with the nearest valid name where there is a list of them."""
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be").replace("a valid dictionary", "a mapping")
    hint = ""
    if detail["type"] == "literal_error":
        hint = nearest(str(detail["input"]), [choice.strip(" '") for choice in detail["ctx"]["expected"].replace(" or ", ", ").split(",")])
    return f"{shortened(_shown(detail['input']))} is not valid: {message}{f'.{hint}' if hint else ''}"


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"

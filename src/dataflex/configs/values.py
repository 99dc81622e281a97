"""Wording of a value that pydantic refuses. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

from pydantic_core import ErrorDetails

from dataflex.errors import nearest
from dataflex.utils.printable import shortened


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

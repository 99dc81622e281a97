"""Wording of a value that pydantic refuses. Imports nothing heavy."""

from __future__ import annotations

from pydantic_core import ErrorDetails

from dataflex.errors import nearest


def wording(detail: ErrorDetails) -> str:
    """`'x' is not valid: <why>.`, with the nearest valid name where there is a list of them."""
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be").replace("a valid dictionary", "a mapping")
    hint = ""
    if detail["type"] == "literal_error":
        hint = nearest(str(detail["input"]), [choice.strip(" '") for choice in detail["ctx"]["expected"].replace(" or ", ", ").split(",")])
    return f"{detail['input']!r} is not valid: {message}{f'.{hint}' if hint else ''}"

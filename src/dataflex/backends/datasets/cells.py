"""Single values of a row."""

from __future__ import annotations

from typing import Any


def text_or_none(value: Any, what: str) -> str | None:
    return None if value is None else text_of(value, what)


def text_of(value: Any, what: str) -> str:
    """Text as it is, numbers written out.

    Raises:
        ValueError: anything else, or text that no tokenizer can read.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{what} is {kind_of(value)}, not text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{what} holds half of a surrogate pair, which is no character") from None
    return value


def kind_of(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    names = {dict: "an object", list: "a list", bool: "a true/false value", type(None): "null", str: "text", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")

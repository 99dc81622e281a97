"""Single values of a row."""

from __future__ import annotations

import json
import math
from typing import Any


def is_missing(value: Any) -> bool:
    """Null, or NaN, which pandas and Python's json write for a missing value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_or_none(value: Any, what: str) -> str | None:
    return None if is_missing(value) else text_of(value, what)


def text_of(value: Any, what: str) -> str:
    """Text as it is, numbers written out.

    Raises:
        ValueError: anything else, a number that is not finite, or text that no tokenizer can read.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{what} is {'NaN' if math.isnan(value) else 'Infinity'}, not text")
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{what} is {kind_of(value)}, not text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{what} holds half of a surrogate pair, which is no character") from None
    return value


def content_or_none(value: Any, what: str) -> str | None:
    """What a message says. A list of parts, as OpenAI's API writes it, is read if all parts are text.

    Raises:
        ValueError: a part that is no text, such as an image, or as `text_of`.
    """
    if not isinstance(value, list):
        return text_or_none(value, what)
    for part in value:
        if not (isinstance(part, dict) and part.get("type", "text") == "text" and "text" in part):
            kind = f"of type {part['type']!r}" if isinstance(part, dict) and "type" in part else kind_of(part)
            raise ValueError(f"{what} is a list, not text: only parts of type 'text' are read, and one is {kind}")
    return "".join(text_of(part["text"], f"{what}: a part") for part in value)


def json_of(value: Any, what: str) -> str:
    """A nested value as JSON text, so that every row has the same type.

    Raises:
        ValueError: it holds something that JSON cannot write: NaN, Infinity, bytes, half of a surrogate pair, ...
    """
    try:
        return text_of(json.dumps(value, ensure_ascii=False, allow_nan=False), what)
    except TypeError as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{what} holds NaN or Infinity" if "JSON compliant" in str(error) else str(error)) from None


def kind_of(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    names = {dict: "an object", list: "a list", bool: "a true/false value", type(None): "null", str: "text", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")

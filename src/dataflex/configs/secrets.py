"""What must not be written or printed: credentials, and values that came from the environment.

A credential is a text under a key that is named like one (`hub_token`, `api_key`, `db_password`). In `run.yaml` references stay as they were
written, and a credential given as plain text becomes a reference to a variable named like its key, which whoever replays the run has to set.
Messages, log lines and recorded commands go through `redacted`. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_NAMED = re.compile(r"token|secret|passw|passphrase|credential|(api|access|private|auth|hub|service|account|license|encryption|signing)_?key", re.I)
_KEY = re.compile(r"(^|_)key(_|$)", re.I)
_HARMLESS = re.compile(r"tokeni[sz]|tokens|(^|_)(pad|eos|bos|unk|sep|cls|mask|image|video|audio)_token|_(column|name|field|path|dir|url)$", re.I)
_SPECIAL_TOKEN = re.compile(r"<.*>|\[.*\]")  # `<eos>`, `[SEP]`: of a tokenizer
_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w\-./+=]{16,}")  # what a key looks like that is no name of a column
_VARIABLE = re.compile(r"\$\{oc\.env:\s*(\w+)\s*(,[^}]*)?\}")
_REFERENCE = re.compile(r"(?<!\\)\$\{")
_REFERENCES = re.compile(r"(\$\{[^{}]*\})+")

# Texts to be replaced, and what stands for them. Filled by `remember`, as files are read.
_credentials: dict[str, str] = {}
_environment: dict[str, str] = {}


class Credential(str):
    """A credential in use. Pickled (transformers keeps the arguments in training_args.bin) or shown by `repr`, it is `placeholder` instead."""

    placeholder: str

    def __new__(cls, value: str, placeholder: str) -> Credential:
        made = super().__new__(cls, value)
        made.placeholder = placeholder
        return made

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.placeholder,)

    def __reduce_ex__(self, protocol: object) -> tuple[type[str], tuple[str]]:
        return self.__reduce__()

    def __copy__(self) -> Credential:
        return self

    def __deepcopy__(self, memo: object) -> Credential:
        return self

    def __repr__(self) -> str:
        return repr(self.placeholder)


def is_credential(key: str, value: Any) -> bool:
    """Whether `value` is a credential, by the name of its key; numbers count only where nothing else can be meant."""
    name = key.split(".")[-1]
    if _HARMLESS.search(name) or value is None or isinstance(value, bool):
        return False
    if isinstance(value, int | float):
        return re.search(r"(^|_)(hub_token|password|passwd|secret|api_key)$", name, re.I) is not None
    if not isinstance(value, str) or not value or _SPECIAL_TOKEN.fullmatch(value):
        return False
    return _NAMED.search(name) is not None or (_KEY.search(name) is not None and _RANDOM.fullmatch(value) is not None)


def placeholder(key: str) -> str:
    """What stands for a credential that was given as plain text."""
    return f"${{oc.env:{re.sub(r'[^A-Z0-9]+', '_', key.split('.')[-1].upper().strip('-'))}}}"


def protected(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with credentials as `Credential`, for keys that a library keeps or prints."""
    hidden = {key for key, value in values.items() if isinstance(value, str) and is_credential(key, value)}
    return {key: Credential(value, placeholder(key)) if key in hidden else value for key, value in values.items()}


def remember(written: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Note what `redacted` is to replace.

    Args:
        written: a file's values with references as they stand.
        values: the same, resolved.
    """
    for key, text, value in _leaves(written, values):
        plain = str(value)
        reference = _refers(text)
        if is_credential(key, value):
            _credentials[plain] = text if reference and _REFERENCES.fullmatch(text) and "," not in text else placeholder(key)
        elif reference and "oc.env" in text:
            _environment[plain] = _VARIABLE.sub(r"${oc.env:\1}", text)


def forget() -> None:
    """Start anew, as a command does."""
    _credentials.clear()
    _environment.clear()


def _leaves(written: Any, values: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, text as written, value) of everything that is no collection."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _leaves(written.get(name) if isinstance(written, Mapping) else written, value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from _leaves(written[number] if isinstance(written, list) and number < len(written) else written, value, key)
    else:
        yield key, written, values


def _refers(written: Any) -> bool:
    return isinstance(written, str) and _REFERENCE.search(written) is not None


def redacted(text: str) -> str:
    """`text` without credentials, and without values of the environment where they stand alone."""
    for value in sorted(_credentials, key=len, reverse=True):
        if len(value) > 3 or f"'{value}'" in text:
            text = text.replace(value, _credentials[value])
    for value in sorted(_environment, key=len, reverse=True):
        if len(value) > 5:
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", _environment[value].replace("\\", r"\\"), text)
        elif value:
            text = text.replace(f"'{value}'", f"'{_environment[value]}'")
    return text


def recorded(key: str, written: Any, value: Any) -> Any:
    """`value` as `run.yaml` keeps it.

    Args:
        key: dotted.
        written: the value with references as they stand in the file.
    """
    if isinstance(value, Mapping):
        inside = written if isinstance(written, Mapping) else {}
        return {name: recorded(f"{key}.{name}", inside.get(name, part), part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        parts = written if isinstance(written, list) and len(written) == len(value) else value
        return [recorded(key, text, part) for text, part in zip(parts, value, strict=True)]
    refers = _refers(written)
    if is_credential(key, value):
        whole = refers and _REFERENCES.fullmatch(_VARIABLE.sub(r"${oc.env:\1}", written))
        return _VARIABLE.sub(r"${oc.env:\1}", written) if whole else placeholder(key)
    if not isinstance(value, str):
        return written if refers and "oc.env" in written else value
    if refers and ("oc.env" in written or redacted(value) != value):
        return written
    return redacted(value.replace("${", "\\${")) if not refers else value


def recorded_argument(argument: str) -> str:
    """An argument of a command line: a credential in `key=value` becomes its placeholder."""
    key, equals, value = argument.partition("=")
    if equals and "${" not in value and is_credential(key, value):
        return f"{key}={placeholder(key)}"
    return redacted(argument)

"""Text from data, paths and settings, made safe to show: it may hold anything, line breaks and control sequences of a terminal included."""

from __future__ import annotations

import shlex
import unicodedata
from html import escape

_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def printable(text: str) -> str:
    """`text` with what could upset a terminal or a page written as escapes: control characters other than newline and tab, halves of
    surrogate pairs, and marks that turn the direction of what follows. Right-to-left letters stay."""
    return "".join(map(_printable, text.replace("\r\n", "\n")))


def one_line(text: str) -> str:
    """As `printable`, with line breaks and tabs as escapes too: for messages, log lines, names of metrics and comments in YAML."""
    return "".join(_escaped(letter) if letter in "\n\t\u2028\u2029" else _printable(letter) for letter in text)


def html_text(text: str) -> str:
    """`text` for a page."""
    return escape(printable(text))


def shell_word(text: str) -> str:
    """`text` as one word of a command that stands on one line; bash reads the escapes that control characters need."""
    if one_line(text) == text:
        return shlex.quote(text)
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{''.join(_shell_escaped(letter) for letter in quoted)}'"


def shortened(text: str, most: int = 300) -> str:
    """`text` without its middle if it is longer than `most`."""
    return text if len(text) <= most else f"{text[: most - 60]}... ({len(text):,} characters) ...{text[-20:]}"


def _printable(letter: str) -> str:
    if letter in "\n\t" or (letter.isprintable() and not _is_noncharacter(letter)):
        return letter
    harmless = unicodedata.category(letter) not in ("Cc", "Cs") and unicodedata.bidirectional(letter) not in _TURNS
    return letter if harmless and not _is_noncharacter(letter) else _escaped(letter)


def _is_noncharacter(letter: str) -> bool:
    return ord(letter) & 0xFFFE == 0xFFFE  # YAML does not allow them


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def _shell_escaped(letter: str) -> str:
    if one_line(letter) == letter:
        return letter
    return "".join(f"\\x{byte:02x}" for byte in letter.encode("utf-8", "surrogateescape"))

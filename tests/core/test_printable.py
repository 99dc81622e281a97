"""Whatever a name holds, it is shown on one line, without control sequences."""

import subprocess

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.utils.printable import html_text, one_line, printable, shell_word, shortened

NASTY = "\x1b]0;pwned\x07\x1b[31mRED\r\n\x00\x85\u2028\u2029\u202e\ud800\ufffe\x9b"


def test_one_line():
    assert one_line(NASTY) == r"\x1b]0;pwned\x07\x1b[31mRED\r\n\x00\x85\u2028\u2029\u202e\ud800\ufffe\x9b"
    assert one_line("数据, مرحبا, naïve, 😀 [x] 'y'") == "数据, مرحبا, naïve, 😀 [x] 'y'"
    assert printable("a\tb\r\nc") == "a\tb\nc" and one_line("a\tb") == "a\\tb"


@settings(deadline=None)
@given(st.text())
def test_a_comment_in_yaml_stays_a_comment(name):
    assert yaml.safe_load(f"# {one_line(name)}\na: 1\n") == {"a": 1}
    assert one_line(name).isprintable() or not name.isprintable()


def test_html():
    assert html_text("<b>&\x1b") == "&lt;b&gt;&amp;\\x1b"


@pytest.mark.parametrize("word", ["a", "a b", "a'b\n", "\x1b[31m", "\\n\n", "$x\n`ls`", "ä\u2028", '"\t"'])
def test_a_word_of_a_command(word):
    assert "\n" not in shell_word(word)
    assert subprocess.run(["bash", "-c", f"printf %s {shell_word(word)}"], capture_output=True, check=True).stdout == word.encode()


def test_shortened():
    assert shortened("a" * 300) == "a" * 300 and len(shortened("a" * 10_000)) < 310 and "10,000 characters" in shortened("a" * 10_000)

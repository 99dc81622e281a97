"""What a tokenizer's chat template makes of a conversation: which of its parts it writes, and how it ends an answer.

A template is a program, so nothing is read from its text: small conversations are rendered with and without a part, once per template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_QUESTION, _ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
_MARK = "dataflexmark"  # a word that no template writes by itself
_CALL_ID = "abcDEF123"  # nine letters and digits, which Mistral's templates insist on


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """The format that the tokenizer's present template gives; what was found out about it is kept."""
    return _chat_format(tokenizer, str(tokenizer.chat_template), tokenizer.eos_token_id)


@lru_cache(maxsize=8)
def _chat_format(tokenizer: PreTrainedTokenizerBase, template: str, eos: int | None) -> ChatFormat:
    return ChatFormat(tokenizer)


class ChatFormat:
    """A tokenizer's chat template as conversations need it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._written: dict[tuple[str, ...], bool] = {}
        self._control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id} - {None}
        self._blank: dict[int, bool] = {}

    def tokens(self, messages: Sequence[Message], *, prompt: bool = False, **settings: Any) -> list[int]:
        rendered: Any = self.tokenizer.apply_chat_template(list(messages), tokenize=True, add_generation_prompt=prompt, return_dict=False, **settings)
        return list(rendered)

    def _text(self, *messages: Message, **settings: Any) -> str | None:
        """A conversation as text; None if the template refuses it."""
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **settings))
        except Exception:  # a template is a program of its own, and what it may raise is not known
            return None

    # What the template writes.

    @cached_property
    def call_arguments(self) -> str | None:
        """How `tool_calls` are written: with arguments as an `object`, as `text` (some templates join it to strings), or not at all (None)."""
        for form, arguments in (("object", {f"{_MARK}key": f"{_MARK}value"}), ("text", f'{{"{_MARK}key": "{_MARK}value"}}')):
            call = _call_message(arguments)
            result = {"role": "tool", "name": f"{_MARK}name", "tool_call_id": _CALL_ID, "content": "R"}
            for messages in ((_QUESTION, call, result, _ANSWER), (_QUESTION, call)):
                text = self._text(*messages) or ""
                if all(f"{_MARK}{part}" in text for part in ("name", "key", "value")):
                    return form
        return None

    def writes_tools(self) -> bool:
        """Whether the tools that a row declares reach the model."""
        parameters = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}
        tool = {"type": "function", "function": {"name": _MARK, "description": "x", "parameters": parameters}}
        return self._once(("tools",), lambda: _MARK in (self._text(_QUESTION, _ANSWER, tools=[tool]) or ""))

    def writes_setting(self, name: str, value: Any) -> bool:
        """Whether a setting of `chat_template_kwargs` changes anything."""
        messages = (_QUESTION, {**_ANSWER, "reasoning_content": "T"})

        def changes(prompt: bool) -> bool:
            return self._text(*messages, add_generation_prompt=prompt, **{name: value}) != self._text(*messages, add_generation_prompt=prompt)

        return self._once(("setting", name, repr(value)), lambda: changes(False) or changes(True))

    def writes_role(self, role: str) -> bool:
        """Whether what a turn of this role says is written. A template that refuses the role says so itself when a row is rendered."""
        if role in ("user", "assistant"):
            return True
        return self._once(("role", role), lambda: _MARK in (self._text(*self._around(role, {"content": _MARK})) or _MARK))

    def writes_field(self, role: str, name: str, *, followed: bool, calls: bool = False) -> bool:
        """Whether a further field of a message, such as `reasoning_content`, is written.

        Args:
            followed: a turn of the user comes after it; some templates leave out earlier thoughts.
            calls: the message also calls a tool; some templates write thoughts only then.
        """
        if name == "tool_calls" and role == "assistant":
            return self.call_arguments is not None
        after = (_QUESTION, _ANSWER) if followed else ()

        def changes() -> bool:
            without, with_field = (self._text(*self._around(role, fields, calls=calls), *after) for fields in ({}, {name: _MARK}))
            return with_field not in (None, without)

        return self._once(("field", role, name, str(followed), str(calls)), changes)

    def _around(self, role: str, fields: Mapping[str, Any], *, calls: bool = False) -> tuple[Message, ...]:
        """A conversation with a message of this role, where templates expect it."""
        call = _call_message({"x": "y"} if self.call_arguments == "object" else '{"x": "y"}') if self.call_arguments else _ANSWER
        result = {"role": "tool", "name": "f", "tool_call_id": _CALL_ID, "content": "R"}
        if role == "assistant":
            return (_QUESTION, {**call, **fields}, result, _ANSWER) if calls else (_QUESTION, {**_ANSWER, **fields})
        if role == "tool":
            return _QUESTION, call, {**result, **fields}, _ANSWER
        return ({"role": role, "content": "S", **fields}, *((_QUESTION,) if role != "user" else ()), _ANSWER)

    def _once(self, key: tuple[str, ...], test: Callable[[], bool]) -> bool:
        if key not in self._written:
            self._written[key] = test()
        return self._written[key]

    # How the template begins and ends an answer.

    @cached_property
    def header(self) -> list[int]:
        """The tokens that ask for an answer."""
        try:
            without = self.tokens([_QUESTION])
            asked = self.tokens([_QUESTION], prompt=True)
        except Exception:
            return []
        return asked[len(without) :] if asked[: len(without)] == without else []

    @cached_property
    def ending(self) -> str | None:
        """What is written after the last answer, without white space around it; None if that cannot be told."""
        text = self._text(_QUESTION, {**_ANSWER, "content": _MARK})
        return text.rpartition(_MARK)[2].strip() if text and _MARK in text else None

    @cached_property
    def end_problem(self) -> str:
        """Why a model that is trained with this template would not learn to stop, or an empty text."""
        if self.ending and not self._controls(self.ending):
            what = f"with {self.ending!r}, which is no special token of the tokenizer"
        elif not self.ending and self.tokenizer.eos_token_id is None:
            what = "with no token, and there is no eos token"
        else:
            return ""
        return f"the chat template ends answers {what}: the model will not learn to stop. Make their end a special token, and the eos token"

    @cached_property
    def next_marker(self) -> int | None:
        """The special token that follows an answer when another question comes, such as GLM's `<|user|>`."""
        text = self._text(_QUESTION, {**_ANSWER, "content": _MARK}, _QUESTION)
        return self._first_control(text.rpartition(_MARK)[2]) if text and _MARK in text else None

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the template's own, and the tokenizer's eos token."""
        eos = self.tokenizer.eos_token_id
        own = self._controls(self.ending)[:1] if self.ending else [self.next_marker]
        return [token for token in dict.fromkeys((eos, *([] if eos in self._controls(self.ending or "") else own))) if token is not None]

    def _controls(self, text: str) -> list[int]:
        """The special tokens in a piece of what a template writes."""
        return [token for token in self.tokenizer(text, add_special_tokens=False)["input_ids"] if self.is_control(token)]

    def _first_control(self, text: str) -> int | None:
        """The special token that a piece of what a template writes begins with."""
        tokens = self.tokenizer(text.lstrip(), add_special_tokens=False)["input_ids"]
        return tokens[0] if tokens and self.is_control(tokens[0]) else None

    def is_control(self, token: int | None) -> bool:
        """Whether a token is one of its own, which no ordinary text gives, and not merely the one that begins a text."""
        return token in self._control and (token != self.tokenizer.bos_token_id or token == self.tokenizer.eos_token_id)

    def is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = token not in self._control and not str(self.tokenizer.decode([token])).strip()
        return self._blank[token]

    def stops(self, tokens: Sequence[int]) -> bool:
        """Whether an answer ends with a token of its own; white space after it does not count."""
        last = next((token for token in reversed(tokens) if not self.is_blank(token)), None)
        return last is not None and self.is_control(last)


def _call_message(arguments: Any) -> Message:
    call = {"type": "function", "id": _CALL_ID, "function": {"name": f"{_MARK}name", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}

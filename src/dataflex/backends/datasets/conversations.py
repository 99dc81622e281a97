"""A row as a conversation, and a conversation as tokens of the chat template with labels on the assistant's turns.

Nothing that a row says is lost without a word: what the chat template cannot write is a reason to leave the row out, or, for a field that says
nothing to the model (an id), a warning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dataflex.backends.datasets.cells import text_of, text_or_none
from dataflex.backends.datasets.rendering import ChatFormat, Message, chat_format
from dataflex.backends.datasets.spec import FIELDS, IGNORED, DatasetSpec
from dataflex.errors import listing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MALFORMED, NO_REPLY, NO_TEMPLATE = "malformed", "no assistant turn", "chat template failed"
NO_TARGET = "no target tokens within cutoff_len"
ALL_WEIGHTS_ZERO = "every answer has weight 0"
UNWRITTEN = "the chat template does not write"

# Fields of a message that say something to or by the model. Of others (ids, names, dates) it is enough to know that they are not used.
SAYING_FIELDS = {
    *("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal", "documents", "citations"),
    *("images", "image", "videos", "video", "audios", "audio"),
}
_CALL = re.compile(r"\s*(?P<thoughts><think>.*?</think>\s*)?(?P<call>.*)", re.DOTALL)


@dataclass
class Turn:
    """What one message says.

    Attributes:
        fields: what it holds beside role and content, for the chat template.
        weight: 0: the assistant's turn is no target.
        is_prompt: it belongs to the prompt of TRL's prompt-completion format; only the completion is a target.
        is_call: a `function_call` turn of LLaMA-Factory's format, whose content is the call as JSON.
    """

    role: str
    content: str
    fields: dict[str, Any] = field(default_factory=dict)
    weight: int = 1
    is_prompt: bool = False
    is_call: bool = False

    @property
    def message(self) -> Message:
        return {"role": self.role, "content": self.content, **self.fields}

    @property
    def is_answer(self) -> bool:
        return self.role == "assistant"

    @property
    def is_target(self) -> bool:
        return self.is_answer and self.weight == 1 and not self.is_prompt

    @property
    def is_empty(self) -> bool:
        return not self.content.strip() and not self.fields.keys() & SAYING_FIELDS


@dataclass
class Conversation:
    """A row as the chat template takes it."""

    turns: list[Turn]
    settings: dict[str, Any]  # `tools`, and what the row's chat_template_kwargs hold

    @property
    def messages(self) -> list[Message]:
        return [turn.message for turn in self.turns]


NOTES: dict[str, None] = {}
"""What rows gave reason to say, each once: read after a batch, since rows are tokenised in other processes and kept for later runs."""


def _note(message: str) -> None:
    NOTES[message] = None


def to_messages(row: Mapping[str, Any], spec: DatasetSpec, default_system: str | None = None) -> list[Message]:
    """The conversation in a row, as chat templates take it: `[{"role": ..., "content": ...}, ...]`.

    Args:
        default_system: system prompt of a conversation that has none of its own.

    Raises:
        ValueError: an unknown role, a conversation without turns, or content that is missing or no text.
    """
    return to_conversation(row, spec, default_system).messages


def to_conversation(row: Mapping[str, Any], spec: DatasetSpec, default_system: str | None = None) -> Conversation:
    """The conversation in a row; as `to_messages`."""
    if spec.formatting == "alpaca":
        turns = _alpaca_turns(row, spec.columns)
    elif spec.formatting == "prompt_completion":
        turns = [*_turns(row, spec.columns["prompt"], spec.tags, is_prompt=True), *_turns(row, spec.columns["completion"], spec.tags)]
    else:
        turns = _turns(row, spec.columns["messages"], spec.tags)
    column = spec.columns.get("system")
    system = (text_or_none(row.get(column), f"column '{column}'") if column else None) or default_system
    if system and turns[0].role != "system":
        turns.insert(0, Turn("system", system))
    return Conversation(turns, _settings(row, spec.columns))


def _settings(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if text := row.get(columns.get("chat_template_kwargs", "")):
        found |= json.loads(text)
    if text := row.get(columns.get("tools", "")):
        found["tools"] = json.loads(text)
    return found


def _alpaca_turns(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Turn]:
    pairs = (row.get(columns["history"]) if "history" in columns else None) or []
    turns = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"column '{columns['history']}' must hold [prompt, response] pairs")
        turns += [Turn(role, text_of(text, "history")) for role, text in zip(("user", "assistant"), pair, strict=True)]
    prompt = text_of(row.get(columns["prompt"]), f"column '{columns['prompt']}'")
    query = text_or_none(row.get(columns["query"]), f"column '{columns['query']}'") if "query" in columns else None
    response = text_of(row.get(columns["response"]), f"column '{columns['response']}'")
    user = "\n".join(part for part in (prompt, query) if part)
    return [*turns, Turn("user", user), Turn("assistant", response)]


def _turns(row: Mapping[str, Any], column: str, tags: Mapping[str, str], *, is_prompt: bool = False) -> list[Turn]:
    """Turns with the roles of chat templates: `observation` becomes `tool`, and a `function_call` is what the assistant says."""
    roles = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system"}
    roles = {tags["observation_tag"]: "tool", tags["function_tag"]: "assistant", **roles}
    messages = row.get(column)
    if not messages:
        raise ValueError(f"column '{column}' holds no conversation")
    turns = []
    for message in messages:
        tag, content = message.get(tags["role_tag"]), message.get(tags["content_tag"])
        if tag not in roles:
            raise ValueError(f"'{tags['role_tag']}' is {tag!r}; known: {listing(roles)}")
        fields = json.loads(message[FIELDS]) if message.get(FIELDS) else {}
        weight = int(fields.pop("weight", 1))
        if content is None and fields.keys() & SAYING_FIELDS:  # what OpenAI's API gives beside tool calls
            content = ""
        content = text_of(content, f"'{tags['content_tag']}' of a message")
        turns.append(Turn(roles[tag], content, fields, weight, is_prompt, is_call=tag == tags["function_tag"] != tags["assistant_tag"]))
    return turns


def left_out(domain_id: int, trouble: str) -> dict[str, Any]:
    return {"input_ids": [], "labels": [], "domain_id": domain_id, "trouble": trouble}


def encode_conversation(
    row: Mapping[str, Any],
    *,
    spec: DatasetSpec,
    domain_id: int,
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int,
    train_on_prompt: bool,
    mask_history: bool,
    default_system: str | None,
) -> dict[str, Any]:
    """One row of `encode_sft`; `trouble` is empty, or `reason` or `reason: detail` for a row to leave out."""
    try:
        if spec.formatting == "prompt_completion" and not spec.tags:
            tokens, labels = _encoded_text(row, spec, tokenizer, train_on_prompt=train_on_prompt)
        else:
            conversation = to_conversation(row, spec, default_system)
            tokens, labels = _encoded_turns(conversation, chat_format(tokenizer), train_on_prompt=train_on_prompt, last_only=mask_history)
    except _LeftOut as reason:
        return left_out(domain_id, str(reason))
    except ValueError as error:
        return left_out(domain_id, f"{MALFORMED}: {error}")
    tokens, labels = tokens[:cutoff_len], labels[:cutoff_len]
    # The first label has no token before it that could predict it.
    if all(label == IGNORED for label in labels[1:]):
        return left_out(domain_id, NO_TARGET)
    return {"input_ids": tokens, "labels": labels, "domain_id": domain_id, "trouble": ""}


class _LeftOut(Exception):
    """Why a row cannot be trained on."""


def _encoded_text(row: Mapping[str, Any], spec: DatasetSpec, tokenizer: Any, *, train_on_prompt: bool) -> tuple[list[int], list[int]]:
    """TRL's prompt and completion as plain text, without a chat template and with an end-of-text token, as SFTTrainer reads them."""
    prompt, completion = (text_of(row.get(column), f"column '{column}'") for column in (spec.columns["prompt"], spec.columns["completion"]))
    for role in ("tools", "chat_template_kwargs"):
        if row.get(spec.columns.get(role, "")):
            raise ValueError(f"column '{spec.columns[role]}' is for a chat template, and prompt and completion are plain text")
    if not completion.strip():
        raise ValueError(f"column '{spec.columns['completion']}' is empty")
    end = tokenizer.eos_token or ""
    if not end:
        _note("the tokenizer has no end-of-text token: the model will not learn to stop")
    tokens = tokenizer(prompt + (completion if end and completion.endswith(end) else completion + end))["input_ids"]
    start = 0 if train_on_prompt else _common(tokens, tokenizer(prompt)["input_ids"])
    return tokens, [IGNORED] * start + tokens[start:]


def _encoded_turns(conversation: Conversation, style: ChatFormat, *, train_on_prompt: bool, last_only: bool) -> tuple[list[int], list[int]]:
    """Tokens and labels.

    Raises:
        _LeftOut: what the row holds cannot be trained on, or not without losing a part of it.
        ValueError: the row is malformed.
    """
    turns = conversation.turns
    while turns and not turns[-1].is_answer:
        turns.pop()
    if not turns:
        raise _LeftOut(NO_REPLY)
    targets = [number for number, turn in enumerate(turns) if turn.is_target and (not last_only or number + 1 == len(turns))]
    if not targets:
        raise _LeftOut(ALL_WEIGHTS_ZERO)
    if any(turns[number].is_empty for number in targets):
        raise ValueError("an answer of the assistant is empty")
    _write_calls(turns, style)
    for part in _unwritten(conversation, style, targets):
        raise _LeftOut(f"{UNWRITTEN} {part}")
    try:
        tokens, spans = _spans(conversation, style, targets)
        silent = (
            [] if not train_on_prompt else _spans(conversation, style, [n for n, turn in enumerate(turns) if not turn.weight and turn.is_answer])[1]
        )
    except Exception as error:  # a template is a program of its own, and what it may raise is not known
        raise _LeftOut(f"{NO_TEMPLATE}: {error}") from None
    labels = list(tokens) if train_on_prompt else [IGNORED] * len(tokens)
    for start, end in spans:
        labels[start:end] = tokens[start:end]
    for start, end in silent:
        labels[start:end] = [IGNORED] * (end - start)
    return tokens, labels


def _write_calls(turns: Sequence[Turn], style: ChatFormat) -> None:
    """Calls of tools as the template takes them. A `function_call` turn that it does not take, or that holds no JSON, stays text."""
    for turn in turns:
        if turn.is_call and style.call_arguments and (found := _parsed_call(turn.content)):
            turn.content, turn.fields = found[0], {**turn.fields, "tool_calls": found[1]}
        if turn.is_answer and "tool_calls" in turn.fields:
            calls = turn.fields["tool_calls"]
            turn.fields["tool_calls"] = [_normal_call(call, style) for call in (calls if isinstance(calls, list) else [calls])]


def _parsed_call(text: str) -> tuple[str, list[dict[str, Any]]] | None:
    """Thoughts in front of calls, and the calls; LLaMA-Factory writes one call or a list of them as JSON."""
    found = _CALL.fullmatch(text)
    assert found is not None  # the pattern takes any text
    with suppress(ValueError, RecursionError):
        calls = json.loads(found["call"])
        calls = calls if isinstance(calls, list) else [calls]
        if calls and all(isinstance(call, dict) and "name" in call and "arguments" in call for call in calls):
            return found["thoughts"] or "", calls
    return None


def _normal_call(call: Any, style: ChatFormat) -> dict[str, Any]:
    """A call as `{"type": "function", "function": {"name": ..., "arguments": ...}}`, with arguments in the form that the template takes."""
    if isinstance(call, dict) and "function" not in call and "name" in call:
        call = {"type": "function", "function": call}
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict) or not call["function"].get("name"):
        raise ValueError("'tool_calls' of a message holds something that is no call of a function with a name")
    arguments = call["function"].get("arguments", {})
    if style.call_arguments == "object" and isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            parsed = json.loads(arguments) if arguments.strip() else {}
            arguments = parsed if isinstance(parsed, dict) else arguments
    elif style.call_arguments == "text" and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", **call, "function": {**call["function"], "arguments": arguments}}


def _unwritten(conversation: Conversation, style: ChatFormat, targets: Sequence[int]) -> Iterator[str]:
    """What the template would leave out of this conversation."""
    turns = conversation.turns
    for name, value in conversation.settings.items():
        if not (style.writes_tools() if name == "tools" else style.writes_setting(name, value)):
            yield f"{name} (of the row)" if name == "tools" else f"'{name}' of chat_template_kwargs"
    last_question = max((number for number, turn in enumerate(turns) if turn.role == "user"), default=-1)
    for number, turn in enumerate(turns):
        if not style.writes_role(turn.role):
            yield f"turns of role {turn.role}"
        for name in turn.fields:
            calls = "tool_calls" in turn.fields
            if style.writes_field(turn.role, name, followed=number < last_question, calls=calls):
                continue
            earlier = number < last_question and style.writes_field(turn.role, name, followed=False, calls=calls)
            if name not in SAYING_FIELDS:
                _note(f"'{name}' of messages of role {turn.role} is not read: the chat template does not write it")
            elif not earlier:
                yield name
            elif number in targets:  # earlier thoughts may be left out of the prompt, where generation leaves them out too, but not of a target
                yield f"{name} of earlier answers; mask_history true trains on the last one only"


def _spans(conversation: Conversation, style: ChatFormat, targets: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of a conversation, and (start, end) of each target: from after its header to after the token that ends it."""
    messages, settings = conversation.messages, conversation.settings
    tokens = style.tokens(messages, **settings)
    last = len(messages) - 1
    if not style.stops(tokens):
        tokens = _with_end(tokens, style)
    spans = []
    for turn in targets:
        start = _common(tokens, style.tokens(messages[:turn], prompt=True, **settings)) if turn else _first_start(tokens, style, messages, settings)
        end = len(tokens) if turn == last else _turn_end(tokens, style.tokens(messages[: turn + 1], **settings), start)
        spans.append((start, end if turn == last else _with_marker(tokens, start, end, style)))
    return tokens, spans


def _with_end(tokens: list[int], style: ChatFormat) -> list[int]:
    """The tokens of a conversation whose last answer ends with no token of its own: as in LLaMA-Factory, the eos token ends it.

    Where the template always writes another end, which is ordinary text, it stays as it is and a warning says what that means.
    """
    if style.end_problem:
        _note(style.end_problem)
        return tokens
    return [*tokens, style.tokenizer.eos_token_id]


def _with_marker(tokens: list[int], start: int, end: int, style: ChatFormat) -> int:
    """The end of an answer that others follow. Where the template writes none, the marker of the next turn ends it, if it is a token of its own."""
    if style.stops(tokens[start:end]):
        return end
    if end < len(tokens) and style.is_control(tokens[end]):
        return end + 1
    _note("the chat template ends an answer that others follow with no token of its own: the model will not learn to stop there")
    return end


def _first_start(tokens: list[int], style: ChatFormat, messages: list[Message], settings: Mapping[str, Any]) -> int:
    """Where an answer begins that nothing precedes: there is no prompt to compare with, since templates take no empty conversation."""
    header = style.header
    for start in range(len(tokens) - len(header) + 1 if header else 0):
        if tokens[start : start + len(header)] == header:
            return start + len(header)
    other = {**messages[0], "content": "y" if messages[0]["content"].startswith("x") else "x"}
    return _common(tokens, style.tokens([other, *messages[1:]], **settings))


def _turn_end(tokens: list[int], prefix: list[int], start: int) -> int:
    """Where the turn that begins at `start`, and is the last one of `prefix`, ends in `tokens`."""
    common = _common(tokens, prefix)
    if common == len(prefix):
        return common
    # Some templates write a turn differently once others follow it: Qwen3 leaves out its thoughts. What is left is the end of the turn in `prefix`.
    for end in range(min(len(tokens), len(prefix)), max(common, start), -1):
        if tokens[start:end] == prefix[len(prefix) - (end - start) :]:
            return end
    return max(common, start)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((index for index, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), min(len(left), len(right)))

"""A row as a conversation, and a conversation as tokens of the chat template with labels on the assistant's turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dataflex.backends.datasets.cells import text_of, text_or_none
from dataflex.backends.datasets.spec import IGNORED, DatasetSpec
from dataflex.errors import listing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MALFORMED, NO_REPLY, NO_TEMPLATE = "malformed", "no assistant turn", "chat template failed"
NO_TARGET = "no target tokens within cutoff_len"


def to_messages(row: Mapping[str, Any], spec: DatasetSpec, default_system: str | None = None) -> list[dict[str, str]]:
    """The conversation in a row, as chat templates take it: `[{"role": ..., "content": ...}, ...]`.

    Args:
        default_system: system prompt of a conversation that has none of its own.

    Raises:
        ValueError: an unknown role, a conversation without turns, or content that is missing or no text.
    """
    turns = _sharegpt_turns(row, spec) if spec.formatting == "sharegpt" else _alpaca_turns(row, spec.columns)
    column = spec.columns.get("system")
    system = (text_or_none(row.get(column), f"column '{column}'") if column else None) or default_system
    if system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _alpaca_turns(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, str]]:
    pairs = (row.get(columns["history"]) if "history" in columns else None) or []
    turns = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"column '{columns['history']}' must hold [prompt, response] pairs")
        turns += [{"role": role, "content": text_of(text, "history")} for role, text in zip(("user", "assistant"), pair, strict=True)]
    prompt = text_of(row.get(columns["prompt"]), f"column '{columns['prompt']}'")
    query = text_or_none(row.get(columns["query"]), f"column '{columns['query']}'") if "query" in columns else None
    response = text_of(row.get(columns["response"]), f"column '{columns['response']}'")
    user = "\n".join(part for part in (prompt, query) if part)
    return [*turns, {"role": "user", "content": user}, {"role": "assistant", "content": response}]


def _sharegpt_turns(row: Mapping[str, Any], spec: DatasetSpec) -> list[dict[str, str]]:
    """Turns with the roles of chat templates: `observation` becomes `tool`, and a `function_call` is what the assistant says."""
    column, tags = spec.columns["messages"], spec.tags
    roles = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system"}
    roles = {tags["observation_tag"]: "tool", tags["function_tag"]: "assistant", **roles}
    messages = row.get(column)
    if not messages:
        raise ValueError(f"column '{column}' holds no conversation")
    turns = []
    for message in messages:
        role = message.get(tags["role_tag"])
        if role not in roles:
            raise ValueError(f"'{tags['role_tag']}' is {role!r}; known: {listing(roles)}")
        turns.append({"role": roles[role], "content": text_of(message.get(tags["content_tag"]), f"'{tags['content_tag']}' of a message")})
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
        messages = to_messages(row, spec, default_system)
    except ValueError as error:
        return left_out(domain_id, f"{MALFORMED}: {error}")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        return left_out(domain_id, NO_REPLY)
    try:
        tokens = _tokens(tokenizer, messages)
        spans = [(0, len(tokens))] if train_on_prompt else _reply_spans(tokenizer, messages, tokens, last_only=mask_history)
    except Exception as error:  # a template is a program of its own, and what it may raise is not known
        return left_out(domain_id, f"{NO_TEMPLATE}: {error}")
    labels = [IGNORED] * len(tokens)
    for start, end in spans:
        labels[start:end] = tokens[start:end]
    tokens, labels = tokens[:cutoff_len], labels[:cutoff_len]
    # The first label has no token before it that could predict it.
    if all(label == IGNORED for label in labels[1:]):
        return left_out(domain_id, NO_TARGET)
    return {"input_ids": tokens, "labels": labels, "domain_id": domain_id, "trouble": ""}


def _tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, prompt: bool = False) -> list[int]:
    tokens: Any = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt, return_dict=False)
    return list(tokens)


def _reply_spans(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], tokens: list[int], *, last_only: bool) -> list[tuple[int, int]]:
    """(start, end) in `tokens` of each turn of the assistant, from after its header to after its end-of-turn token."""
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    spans = []
    for turn in turns[-1:] if last_only else turns:
        start = _common(tokens, _tokens(tokenizer, messages[:turn], prompt=True))
        last = turn + 1 == len(messages)
        spans.append((start, len(tokens) if last else _turn_end(tokens, _tokens(tokenizer, messages[: turn + 1]), start)))
    return spans


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

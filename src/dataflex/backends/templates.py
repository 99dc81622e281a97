"""What `template:` means: LLaMA-Factory's names, written as the chat templates that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dataflex.errors import listing, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What LLaMA-Factory writes of tools in these templates: declared ones behind the system prompt, calls as what the assistant says.
_TOOLS = (
    "{% macro tool_text() %}{{ 'You have access to the following tools:\\n' }}{% for function in tools | map(attribute='function') %}"
    "{% set parameters = function.parameters or {} %}"
    "{{ '> Tool Name: ' ~ function.name ~ '\\nTool Description: ' ~ (function.description or '') ~ '\\nTool Args:\\n' }}"
    "{% for name, value in (parameters.properties or {}).items() %}"
    "{{ '  - ' ~ name ~ ' (' ~ (value.type or '') }}"
    "{{ (', required' if name in (parameters.required or []) else '') ~ '): ' ~ (value.description or '') }}"
    "{{ (', should be one of [' ~ value.enum | join(', ') ~ ']') if value.enum else '' }}"
    "{{ (', where each item should be ' ~ (value.get('items').type or '')) if value.get('items') else '' }}"
    "{{ '\\n' }}{% endfor %}{{ '\\n' }}{% endfor %}"
    "{{ 'Use the following format if using a tool:\\n```\\n' }}"
    "{{ 'Action: tool name (one of [' ~ tools | map(attribute='function.name') | join(', ') ~ '])\\n"
    "Action Input: the input to the tool, in a JSON format representing the kwargs "
    '(e.g. ```{"input": "hello world", "num_beams": 5}```)\\n```\\n\' }}{% endmacro %}'
    "{% macro said(message) %}{{ message.content }}{{ '\\n' if message.tool_calls and message.content and message.content[-1] != '\\n' else '' }}"
    "{% for call in message.tool_calls or [] %}{{ ('' if loop.first else '\\n') ~ 'Action: ' ~ call.function.name ~ '\\nAction Input: ' }}"
    "{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}{% endfor %}{% endmacro %}"
)


def _written(*, system: str, user: str, tool: str, answer: str, prompt: str, default_system: str = "") -> str:
    """A chat template from how each turn is written, with `@` for what it says. The system prompt and the tools come first."""
    turns = [("system", system, "message.content"), ("user", user, "message.content"), ("tool", tool, "message.content")]
    turns.append(("assistant", answer, "said(message)"))
    branches = "".join(
        f"{{% {'if' if role == 'system' else 'elif'} message.role == '{role}' %}}{text.replace('@', f'{{{{ {what} }}}}')}"
        for role, text, what in turns
    )
    return (
        f"{_TOOLS}{{% set given = messages[0].role == 'system' %}}{{% set first = (messages[0].content if given else '') or '{default_system}' %}}"
        f"{{% if tools %}}{{% set first = first ~ tool_text() %}}{{% endif %}}{{% if first %}}{system.replace('@', '{{ first }}')}{{% endif %}}"
        f"{{% for message in (messages[1:] if given else messages) %}}{branches}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


# The same text as LLaMA-Factory's templates of these names.
BUILT_IN = {
    "chatml": _written(
        system="<|im_start|>system\n@<|im_end|>\n",
        user="<|im_start|>user\n@<|im_end|>\n",
        tool="<|im_start|>tool\n@<|im_end|>\n",
        answer="<|im_start|>assistant\n@<|im_end|>\n",
        prompt="<|im_start|>assistant\n",
    ),
    "default": _written(
        system="System: @{{ eos_token }}\n",
        user="Human: @{{ eos_token }}\n",
        tool="Human: @{{ eos_token }}\n",
        answer="Assistant:@{{ eos_token }}\n",
        prompt="Assistant:",
    ),
    "alpaca": _written(
        default_system="Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n",
        system="@",
        user="### Instruction:\n@\n\n",
        tool="### Instruction:\n@\n\n",
        answer="### Response:\n@{{ eos_token }}\n\n",
        prompt="### Response:\n",
    ),
}
# Tokens that a built-in template needs, the one that ends an answer first.
SPECIAL_TOKENS = {"chatml": ("<|im_end|>", "<|im_start|>")}

# Names of LLaMA-Factory templates, and a marker by which a tokenizer's own template of that family is known.
FAMILIES = {
    "qwen": "<|im_start|>",
    "qwen3": "<|im_start|>",
    "smollm": "<|im_start|>",
    "yi": "<|im_start|>",
    "llama3": "<|start_header_id|>",
    "llama2": "[INST]",
    "mistral": "[INST]",
    "gemma": "<start_of_turn>",
    "gemma3": "<start_of_turn>",
    "phi3": "<|user|>",
    "phi4": "<|im_start|>",
    "deepseek3": "<｜User｜>",
    "chatglm3": "<|user|>",
    "glm4": "<|user|>",
}


def resolve_template(name: str | None, own: str | None, folder: Path) -> str:
    """The chat template text to use.

    Args:
        name: the `template` key.
        own: the tokenizer's own template.
        folder: where a relative .jinja path is looked up.

    Raises:
        ValueError: there is none, or the tokenizer's own does not fit the name.
    """
    if name in (None, "auto"):
        if not own:
            raise ValueError(f"the tokenizer has no chat template; set template to one of {listing(BUILT_IN)}, or to a .jinja file")
        return own
    assert name is not None
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.endswith((".jinja", ".j2")):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"no file '{path}'")
        return path.read_text(encoding="utf-8")
    if name not in FAMILIES:
        known = [*BUILT_IN, *FAMILIES]
        raise ValueError(f"'{name}' is not known.{nearest(name, known)} Known: {listing(known)}; or leave it out to use the tokenizer's own")
    if not own or FAMILIES[name] not in own:
        why = "and this tokenizer has none" if not own else f"which is another one (it lacks {FAMILIES[name]})"
        raise ValueError(f"'{name}' stands for the tokenizer's own chat template, {why}; use one of {listing(BUILT_IN)}, or a .jinja file")
    return own


def fit_tokenizer(name: str | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Give the tokenizer what a built-in template needs: its marks as special tokens, and the one that ends an answer as eos token.

    Returns:
        The tokens that are new to the tokenizer.
    """
    from tokenizers import AddedToken

    tokens = SPECIAL_TOKENS.get(name or "", ())
    new = [token for token in tokens if token not in tokenizer.get_vocab()]
    if tokens:
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
        tokenizer.eos_token = tokens[0]
    return new

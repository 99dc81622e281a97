"""What `template:` means: LLaMA-Factory's names, written as the chat templates that transformers reads."""

from __future__ import annotations

from pathlib import Path

from dataflex.errors import listing, nearest

BUILT_IN = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "default": (
        "{% for message in messages %}{% if message['role'] == 'system' %}System: {{ message['content'] }}\n"
        "{% elif message['role'] == 'user' %}Human: {{ message['content'] }}\n"
        "{% else %}Assistant: {{ message['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}"
    ),
    "alpaca": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
        "{% else %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
}

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

"""A small Llama and a byte-level tokenizer, built in code: no files, no network."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ["<pad>", "<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, plus special tokens: 261 in all, and any text can be encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>")
    fast.chat_template = chat_template
    return fast


def tiny_model(seed: int = 0, vocab_size: int = 261, **config: Any) -> LlamaForCausalLM:
    """A Llama with two layers and random weights that depend on `seed` alone."""
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 4,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **config}))


def tiny_rows(
    number: int, *, seed: int = 0, lengths: tuple[int, int] = (6, 24), vocab_size: int = 261, masked: float = 0.3
) -> list[dict[str, list[int]]]:
    """Random token rows with labels; the first `masked` share of each row carries none, as a prompt would."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(number):
        length = int(torch.randint(lengths[0], lengths[1] + 1, (1,), generator=generator))
        tokens = torch.randint(5, vocab_size, (length,), generator=generator).tolist()
        prompt = int(length * masked)
        rows.append({"input_ids": tokens, "attention_mask": [1] * length, "labels": [-100] * prompt + tokens[prompt:]})
    return rows


def pad_collator(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Right-pad rows to the longest."""
    width = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows]) for name, value in padding.items()}

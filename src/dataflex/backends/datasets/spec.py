"""What a data set is: where it lies and how its rows are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

INFO_FILE = "dataset_info.json"
IGNORED = -100  # the label that a loss leaves out
SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")

DEFAULT_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "text": {"prompt": "text"},
}
OPTIONAL_COLUMNS = {"alpaca": ("query", "system", "history"), "sharegpt": ("system",), "text": ()}
UNREAD_COLUMNS = ("tools", "images", "videos", "audios", "chosen", "rejected", "kto_tag")
ROLES = ("prompt", "query", "response", "history", "messages", "system", *UNREAD_COLUMNS)
DEFAULT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
    "observation_tag": "observation",
    "function_tag": "function_call",
}
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool"}
REMOTE_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
HUB_ONLY_KEYS = ("subset", "split", "folder", "revision")
ENTRY_KEYS = ("file_name", "formatting", "columns", "tags", "num_samples", "ranking", *REMOTE_KEYS, *HUB_ONLY_KEYS)

DOMAIN_ROLE = "domain"  # of the column that `domain_column` names

Stage = Literal["sft", "pt"]
Formatting = Literal["alpaca", "sharegpt", "text"]


@dataclass(frozen=True)
class DatasetSpec:
    """Where one data set lies and how its rows are read.

    Attributes:
        path: a file, or a folder whose files are all read in the order of their names.
        columns: role (`prompt`, `response`, `messages`, ...) to column name. An optional role that is not listed is not read.
        tags: for sharegpt, LLaMA-Factory's `role_tag`, `content_tag`, `user_tag`, ... with defaults filled in; otherwise empty.
        num_samples: rows to take; a smaller data set is repeated from its start.
        key: the setting that named the data set, for messages.
    """

    name: str
    path: Path
    formatting: Formatting
    columns: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)
    num_samples: int | None = None
    key: str = "dataset"

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
    "openai": {"messages": "messages"},
    "prompt_completion": {"prompt": "prompt", "completion": "completion"},
    "text": {"prompt": "text"},
}
OPTIONAL_COLUMNS = {
    "alpaca": ("query", "system", "history", "tools"),
    "sharegpt": ("system", "tools", "chat_template_kwargs"),
    "openai": ("system", "tools", "chat_template_kwargs"),
    "prompt_completion": ("tools", "chat_template_kwargs"),
    "text": (),
}
FORMATTINGS = ("alpaca", "openai", "prompt_completion", "sharegpt")
UNREAD_COLUMNS = ("images", "videos", "audios", "chosen", "rejected", "kto_tag")
ROLES = ("prompt", "query", "response", "completion", "history", "messages", "system", "tools", "chat_template_kwargs", *UNREAD_COLUMNS)
# Columns that say something about the answer wherever they are used; one that is there and not read is reported.
TELLING_COLUMNS = {
    *ROLES,
    *(column for columns in DEFAULT_COLUMNS.values() for column in columns.values()),
    *("system_prompt", "functions", "image", "video", "audio", "label", "weight", "reasoning_content", "reasoning", "thinking", "documents"),
}
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
FIELDS = "(fields)"  # a message's fields beside role and content, as JSON text

Stage = Literal["sft", "pt"]
Formatting = Literal["alpaca", "sharegpt", "openai", "prompt_completion", "text"]


@dataclass(frozen=True)
class DatasetSpec:
    """Where one data set lies and how its rows are read.

    Attributes:
        path: a file, or a folder whose files are all read in the order of their names.
        columns: role (`prompt`, `response`, `messages`, ...) to column name. An optional role that is not listed is not read.
        tags: where rows hold messages, LLaMA-Factory's `role_tag`, `content_tag`, `user_tag`, ... with defaults filled in; otherwise empty.
        num_samples: rows to take; a smaller data set is repeated from its start.
        key: the setting that named the data set, for messages.
        outside: the path does not lie in `dataset_dir`.
    """

    name: str
    path: Path
    formatting: Formatting
    columns: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)
    num_samples: int | None = None
    key: str = "dataset"
    outside: bool = False

    @property
    def message_roles(self) -> tuple[str, ...]:
        """The roles whose columns hold lists of messages. TRL's prompt and completion may be text or messages; only messages have tags."""
        if self.formatting == "prompt_completion":
            return ("prompt", "completion") if self.tags else ()
        return ("messages",)

    @property
    def needs_template(self) -> bool:
        """Rows are conversations; TRL's prompt and completion may be plain text."""
        return self.formatting != "text" and (self.formatting != "prompt_completion" or bool(self.tags))

    @property
    def shown(self) -> str:
        """The name, with the path where that is not to be guessed."""
        return f"{self.name} ({self.path})" if self.outside and self.name != str(self.path) else self.name

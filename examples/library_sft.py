"""DataFlex in front of TRL's SFTTrainer.

python examples/library_sft.py MODEL_FOLDER_OR_HUB_ID
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from dataflex import DataflexConfig, WeightTrainer

rows = load_dataset("json", data_files=str(Path(__file__).parent / "data" / "arithmetic.jsonl"), split="train")
rows = rows.map(lambda row: {"prompt": row["instruction"] + " ", "completion": row["output"]}, remove_columns=rows.column_names)

trainer = WeightTrainer.over(SFTTrainer)(
    model=sys.argv[1],
    args=SFTConfig("runs/library_sft", max_steps=4, per_device_train_batch_size=4, logging_steps=1, report_to="none", bf16=torch.cuda.is_available()),
    train_dataset=rows,
    dataflex=DataflexConfig(component_name="dft", warmup_step=2),
)
trainer.train()

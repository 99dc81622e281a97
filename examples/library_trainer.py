"""DataFlex in front of a plain transformers.Trainer.

python examples/library_trainer.py MODEL_FOLDER_OR_HUB_ID
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from dataflex import DataflexConfig, WeightTrainer

name = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(name)
texts = load_dataset("json", data_files=str(Path(__file__).parent / "data" / "notes.jsonl"), split="train")
rows = texts.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns=["text"])

WeightedTrainer = WeightTrainer.over(Trainer)
trainer = WeightedTrainer(
    model=AutoModelForCausalLM.from_pretrained(name),
    args=TrainingArguments("runs/library_trainer", max_steps=4, per_device_train_batch_size=4, logging_steps=1, report_to="none"),
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    dataflex=DataflexConfig(component_name="loss", component_params={"strategy": "quadratic"}, warmup_step=1),
)
trainer.train()

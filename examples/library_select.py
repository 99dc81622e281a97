"""Sample selection in front of a bare `transformers.Trainer`, with a selector of your own: python examples/library_select.py MODEL"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from dataflex import DataflexConfig, ScoringSelector, SelectTrainer


class Unsure(ScoringSelector):
    """Rows that the model finds hardest at the moment, but not the very hardest tenth, which is often noise."""

    needs_model = True

    def scores(self, rows, *, ctx, **kwargs):
        losses = ctx.signals.losses(ctx.train_dataset, rows)  # (n,), by the model as it is
        losses[losses.argsort()[-len(losses) // 10 :]] = float("nan")  # NaN: never chosen
        return losses


folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = [tokenizer(f"{a} + {b} = {a + b}{tokenizer.eos_token}") for a in range(8) for b in range(8)]
trainer = SelectTrainer.over(Trainer)(
    model=AutoModelForCausalLM.from_pretrained(folder),
    args=TrainingArguments("runs/library_select", per_device_train_batch_size=8, num_train_epochs=1, logging_steps=1, report_to="none"),
    train_dataset=Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows]),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    dataflex=DataflexConfig(train_type="dynamic_select", component_name="unsure", warmup_step=1, update_step=1, update_times=3),
    component=Unsure(),
)
trainer.train()

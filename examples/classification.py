"""Sequence classification with transformers' Trainer. PEFT trains the new head in full and saves it with the adapter.

    python examples/classification.py --model answerdotai/ModernBERT-base --data rows.jsonl --output runs/topics

Each row of the data has `text` and `label`.
"""

import argparse

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from gralora import GraloraConfig, get_peft_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--steps", type=int, default=500)
arguments = parser.parse_args()

rows = load_dataset("json", data_files=arguments.data, split="train").class_encode_column("label")
labels = rows.features["label"].names
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
encoded = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns=["text"])
parts = encoded.train_test_split(test_size=0.1, seed=0)

model = AutoModelForSequenceClassification.from_pretrained(
    arguments.model, num_labels=len(labels), id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True
)
model.config.pad_token_id = tokenizer.pad_token_id
config = GraloraConfig(r=32, alpha=64, gralora_k=2, target_modules="all-linear", task_type="SEQ_CLS")

trainer = Trainer(
    model=get_peft_model(model, config),
    args=TrainingArguments(
        output_dir=arguments.output,
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=max(1, arguments.steps // 5),
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=parts["train"],
    eval_dataset=parts["test"],
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean()},
)
trainer.train()
print(trainer.evaluate())
trainer.save_model(arguments.output)

"""Preference tuning with TRL's DPOTrainer. The model with its adapter switched off is the reference.

    python examples/dpo.py --model Qwen/Qwen3-0.6B --data preferences.jsonl --output runs/dpo

Each row of the data has `prompt`, `chosen` and `rejected`, as text or as lists of messages.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from gralora import GraloraConfig

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--steps", type=int, default=200)
arguments = parser.parse_args()

trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(arguments.model),
    args=DPOConfig(
        output_dir=arguments.output,
        max_steps=arguments.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=5e-5,
        beta=0.1,
        logging_steps=1,
        bf16=torch.cuda.is_available(),  # TRL's default, which a CPU does not take
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(arguments.model),
    peft_config=GraloraConfig(r=32, alpha=64, gralora_k=2, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(arguments.output)

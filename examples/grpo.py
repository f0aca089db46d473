"""Reinforcement learning with TRL's GRPOTrainer and a reward function.

    python examples/grpo.py --model Qwen/Qwen3-0.6B --data prompts.jsonl --output runs/grpo

Each row of the data has `prompt` and `answer`. An answer that holds the reference earns 1, and a short one a little.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from gralora import GraloraConfig

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--max-new-tokens", type=int, default=256)
arguments = parser.parse_args()


def correct(completions, answer, **_):
    """Return 1 for each completion that holds its reference."""
    return [float(reference in completion) for completion, reference in zip(completions, answer, strict=True)]


def short(completions, **_):
    """Return at most 0.1, more for a shorter completion."""
    return [0.1 / (1 + len(completion)) for completion in completions]


trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(arguments.model),
    reward_funcs=[correct, short],
    args=GRPOConfig(
        output_dir=arguments.output,
        max_steps=arguments.steps,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=arguments.max_new_tokens,
        learning_rate=1e-4,
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

"""A plain SFTTrainer with our tuner, as a user's own script has it."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny_language_model import make_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

import gralora

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


def sft_trainer(base_model, output, callbacks=(), **changes):
    settings = {
        "output_dir": str(output),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    ids = [[5 + (i + j) % 50 for j in range(6)] for i in range(16)]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32),
        args=SFTConfig(**(settings | changes)),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=make_tokenizer(),
        peft_config=gralora.GraloraConfig(r=4, target_modules="all-linear", gralora_dropout=0.2),
        callbacks=list(callbacks),
    )


def adapter_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_the_trainers_own_resume_goes_on_bit_for_bit(base_model, tmp_path):
    unbroken = sft_trainer(base_model, tmp_path / "a")
    unbroken.train()
    resumed = sft_trainer(base_model, tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    first, second = adapter_of(unbroken), adapter_of(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_trainer_loads_the_best_adapter_at_the_end(base_model, tmp_path):
    class Spoil(TrainerCallback):
        """After step 2 every step makes the adapter much worse."""

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step >= 2:
                for p in model.parameters():
                    if p.requires_grad:
                        p.data.add_(1.0)

    trainer = sft_trainer(
        base_model, tmp_path, [Spoil()], eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    trainer.train()
    assert trainer.state.best_global_step == 2
    loaded = adapter_of(trainer)
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    best = PeftModel.from_pretrained(base, tmp_path / "checkpoint-2", is_trainable=True)
    expected = {name: p for name, p in best.named_parameters() if p.requires_grad}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)

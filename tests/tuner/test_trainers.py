"""Training with TRL and with the Trainer of transformers."""

import math

import pytest
import torch
from conftest import randomise, tiny_llama
from datasets import Dataset
from peft import PeftModel, prepare_model_for_kbit_training
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from gralora import GraloraConfig, GraloraLayer, get_peft_model

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]


@pytest.fixture
def tokenizer():
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def config(**changes):
    return GraloraConfig(
        **({"r": 8, "gralora_k": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)
    )


def sft(model, tokenizer, folder, peft_config=None, **changes):
    rows = Dataset.from_list([{"text": " ".join(f"w{(i + j) % 9}" for j in range(12))} for i in range(16)])
    arguments = SFTConfig(
        str(folder),
        **(
            {
                "max_steps": 6,
                "learning_rate": 2e-2,
                "per_device_train_batch_size": 4,
                "logging_steps": 1,
                "report_to": "none",
                "save_strategy": "no",
                "disable_tqdm": True,
                "bf16": False,
                "use_cpu": True,
                "dataloader_pin_memory": False,
            }
            | changes
        ),
    )
    return SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_sft_trains_on_a_dense_base(tokenizer, tmp_path):
    base = tiny_llama()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    trainer = sft(base, tokenizer, tmp_path, config(), gradient_checkpointing=False)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    trained = dict(trainer.model.named_parameters())
    for name, weight in before.items():
        key = f"base_model.model.{name}"
        stem, _, leaf = key.rpartition(".")
        assert torch.equal(trained.get(key, trained.get(f"{stem}.base_layer.{leaf}")), weight)
    trainer.save_model(tmp_path / "final")
    tokens = torch.arange(4, 14)[None]
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "final")
    assert torch.equal(loaded(tokens).logits, trainer.model.eval()(tokens).logits)


@pytest.mark.filterwarnings("ignore:.*adapted layers cannot be merged:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.utils.checkpoint:UserWarning")
def test_sft_trains_on_a_4_bit_base(tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization, device_map="cpu")
    base = prepare_model_for_kbit_training(base)
    trainer = sft(base, tokenizer, tmp_path, config())
    assert {type(m.base_layer).__name__ for m in trainer.model.modules() if isinstance(m, GraloraLayer)} == {
        "Linear4bit"
    }
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    trainer.save_model(tmp_path / "final")
    assert (tmp_path / "final/adapter_model.safetensors").exists()


def test_trainer_resumes_and_loads_the_best(tokenizer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": False}
    unbroken = sft(tiny_llama(), tokenizer, tmp_path / "a", config(gralora_dropout=0.1), **settings)
    unbroken.train()
    resumed = sft(tiny_llama(), tokenizer, tmp_path / "b", config(gralora_dropout=0.1), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))
    assert losses(resumed)[-2:] == losses(unbroken)[-2:]
    ours, theirs = (dict(t.model.named_parameters()) for t in (resumed, unbroken))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_dpo_with_a_reference_adapter_starts_at_ln_2(tokenizer, tmp_path):
    rows = Dataset.from_list([{"prompt": f"w{i} w1", "chosen": f" w{i} w2", "rejected": " w5 w6"} for i in range(8)])
    base = randomise(get_peft_model(tiny_llama(), config(gralora_dropout=0.0)), 0.1)
    arguments = DPOConfig(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        learning_rate=1e-3,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(base, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(math.log(2), abs=1e-5)
    ours = dict(trainer.model.named_parameters())
    copied = [name for name in ours if ".ref." in name]
    assert copied

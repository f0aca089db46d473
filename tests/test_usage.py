"""The usage examples of the documentation, as printed. Only the hub's models are replaced by small local ones."""

import runpy
from pathlib import Path

import pytest
import torch
from conftest import tiny_gpt2, tiny_opt

README = Path(__file__).parent.parent / "README.md"
IMPORTS = ["import gralora", "from gralora import GraloraConfig, get_peft_model"]

BASIC = """
from peft import GraloraConfig, get_peft_model
from transformers import AutoModelForCausalLM

# Load base model
model = AutoModelForCausalLM.from_pretrained("facebook/opt-125m")

# Configure GraLoRA
config = GraloraConfig(
    r=32,           # Total rank
    alpha=64,       # Scaling alpha
    gralora_k=2,    # 2 subblocks (recommended for rank 32)
    target_modules=["q_proj", "v_proj"],
    gralora_dropout=0.0,
    init_weights=True
)

# Apply GraLoRA adapter
peft_model = get_peft_model(model, config)
print(f"Trainable parameters: {peft_model.num_parameters(only_trainable=True)}")
"""
HYBRID = """
# Combine GraLoRA with vanilla LoRA
config = GraloraConfig(
    r=32,           # GraLoRA rank
    hybrid_r=16,    # Vanilla LoRA rank
    alpha=96,       # Scale = 96 / (32 + 16) = 2.0
    gralora_k=2,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    gralora_dropout=0.1
)

peft_model = get_peft_model(model, config)
"""
HIGH_RANK = """
# Use gralora_k=4 for higher ranks
config = GraloraConfig(
    r=64,           # Higher rank
    alpha=128,
    gralora_k=4,    # 4 subblocks (recommended for rank ≥ 64)
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    init_weights=True
)

peft_model = get_peft_model(model, config)
"""
CONV1D = """
from transformers import GPT2LMHeadModel

model = GPT2LMHeadModel.from_pretrained("gpt2")

# GPT-2 uses Conv1D, so set fan_in_fan_out=True
config = GraloraConfig(
    r=32,
    alpha=64,
    gralora_k=2,
    target_modules=["c_attn", "c_proj"],
    fan_in_fan_out=True,  # Important for Conv1D!
    init_weights=True
)

peft_model = get_peft_model(model, config)
"""
SELECTIVE = """
# Apply only to specific transformer layers
config = GraloraConfig(
    r=32,
    alpha=64,
    gralora_k=2,
    target_modules=["q_proj", "v_proj"],
    layers_to_transform=[0, 1, 2],  # Only first 3 layers
    layers_pattern="model.layers"   # Pattern to match
)

peft_model = get_peft_model(model, config)
"""
MERGING = """
# Train the model
trainer.train()

# Merge adapters for inference
peft_model.merge_adapter()

# Save merged model
peft_model.save_pretrained("./gralora_merged_model")

# Or save adapter weights only
peft_model.save_pretrained("./gralora_adapter", safe_serialization=True)
"""


@pytest.fixture(autouse=True)
def local_hub(tmp_path, monkeypatch):
    """A working directory in which the hub's names are folders."""
    tiny_opt(layers=4).save_pretrained(tmp_path / "facebook/opt-125m")
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)


def run(code, first_line, tmp_path, **names):
    script = tmp_path / "example.py"
    script.write_text(f"{first_line}\n{code}")
    return runpy.run_path(str(script), init_globals=names)


def names_for(first_line):
    """What the printed examples take from the ones before them."""
    import peft

    return (
        {}
        if "from gralora" in first_line
        else {"GraloraConfig": peft.GraloraConfig, "get_peft_model": peft.get_peft_model}
    )


def layers(peft_model):
    from gralora import GraloraLayer

    return {name: m for name, m in peft_model.named_modules() if isinstance(m, GraloraLayer)}


@pytest.mark.parametrize("first_line", IMPORTS)
def test_basic(first_line, tmp_path, capsys):
    scope = run(BASIC, first_line, tmp_path)
    trainable = 8 * 32 * (64 + 64)
    assert f"Trainable parameters: {trainable}" in capsys.readouterr().out
    assert len(layers(scope["peft_model"])) == 8


@pytest.mark.filterwarnings("ignore:`target_modules` names that match no module. 'o_proj':UserWarning")
@pytest.mark.parametrize("first_line", IMPORTS)
@pytest.mark.parametrize(("code", "scale", "shape"), [(HYBRID, 2.0, (2, 32, 32)), (HIGH_RANK, 2.0, (4, 16, 64))])
def test_hybrid_and_high_rank(code, scale, shape, first_line, tmp_path):
    scope = run(code, first_line, tmp_path, model=tiny_opt(), **names_for(first_line))
    found = layers(scope["peft_model"])
    assert len(found) == 6  # OPT has no `o_proj`, which is said
    for layer in found.values():
        assert layer.scaling["default"] == scale
        assert layer.gralora_A["default"].shape == shape


@pytest.mark.parametrize("first_line", IMPORTS)
def test_conv1d(first_line, tmp_path):
    scope = run(CONV1D, first_line, tmp_path, **names_for(first_line))
    found = layers(scope["peft_model"])
    assert len(found) == 6
    assert all(layer.get_delta_weight("default").shape == layer.base_layer.weight.shape for layer in found.values())


@pytest.mark.parametrize("first_line", IMPORTS)
def test_selective(first_line, tmp_path):
    code = SELECTIVE.replace('"model.layers"', '"model.decoder.layers"')  # OPT's layers hang one level deeper
    scope = run(code, first_line, tmp_path, model=tiny_opt(layers=4), **names_for(first_line))
    assert {name.split(".layers.")[1][0] for name in layers(scope["peft_model"])} == {"0", "1", "2"}


@pytest.mark.parametrize("first_line", IMPORTS)
def test_selective_as_printed_on_a_llama(first_line, tmp_path):
    from conftest import tiny_llama

    model = tiny_llama(num_hidden_layers=4)
    scope = run(SELECTIVE, first_line, tmp_path, model=model, **names_for(first_line))
    assert {name.split(".layers.")[1][0] for name in layers(scope["peft_model"])} == {"0", "1", "2"}


@pytest.mark.filterwarnings("ignore:The adapter is merged; what is saved:UserWarning")
def test_training_and_merging(tmp_path):
    from peft import PeftModel
    from transformers import Trainer, TrainingArguments

    peft_model = run(BASIC, IMPORTS[0], tmp_path)["peft_model"]
    rows = [{"input_ids": torch.arange(3, 19), "labels": torch.arange(3, 19)} for _ in range(8)]
    arguments = TrainingArguments(
        "out",
        max_steps=4,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(peft_model, arguments, train_dataset=rows)
    run(MERGING, IMPORTS[0], tmp_path, trainer=trainer, peft_model=peft_model)
    losses = [entry for entry in trainer.state.log_history if "train_loss" in entry]
    assert losses
    tokens = torch.arange(3, 19)[None]
    expected = peft_model.eval()(tokens).logits
    for folder in ("gralora_merged_model", "gralora_adapter"):
        loaded = PeftModel.from_pretrained(tiny_opt(layers=4), folder)
        torch.testing.assert_close(loaded(tokens).logits, expected, atol=1e-5, rtol=1e-5)

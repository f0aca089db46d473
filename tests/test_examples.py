"""The files in examples/, run as they are on tiny models."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import run
from safetensors.torch import load_file
from tiny_language_model import save_model, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification

from gralora import PeftModel

EXAMPLES = Path(__file__).parent.parent / "examples"

pytest_plugins = ["run_fixtures"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # What these trainers of TRL say about themselves.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def run_script(name, monkeypatch, cache, **arguments):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))
    flags = [text for flag, value in arguments.items() for text in (f"--{flag.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", [name, *flags])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_trained(folder, model):
    """The adapter loads, and B is no longer zero."""
    tensors = load_file(folder / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in tensors.items() if "gralora_B" in name)
    PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("name", ["sft", "qlora"])
def test_a_yaml_file_trains(name, base_model, rows_file, output, tmp_path):
    held_out = write_rows(tmp_path / "held-out.jsonl", count=2, start=50)
    flags = ["--model", base_model, "--data", rows_file, "--output", str(output), "--r", "8"]
    flags += ["--steps", "2"] + (["--eval", held_out] if name == "sft" else [])
    flags += ["--target-modules", "down_proj"] if name == "qlora" else []  # of a width that 4 bits take
    assert run("train", "--config", str(EXAMPLES / f"{name}.yaml"), *flags) == 0
    assert_trained(output, AutoModelForCausalLM.from_pretrained(base_model))


def test_preferences_are_learned(base_model, output, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": "no"} for i in range(8)]
    data = write(tmp_path / "rows.jsonl", rows)
    run_script("dpo.py", monkeypatch, tmp_path / "cache", model=base_model, data=data, output=output, steps=2)
    assert_trained(output, AutoModelForCausalLM.from_pretrained(base_model))


def test_a_reward_is_followed(base_model, output, tmp_path, monkeypatch, capsys):
    data = write(tmp_path / "rows.jsonl", [{"prompt": f"say {i}", "answer": f"{i}"} for i in range(8)])
    given = {"model": base_model, "data": data, "output": output, "steps": 2, "max_new_tokens": 8}
    run_script("grpo.py", monkeypatch, tmp_path / "cache", **given)
    assert (output / "adapter_model.safetensors").is_file()


def test_a_classifier_is_trained_with_its_head(output, tmp_path, monkeypatch, capsys):
    config = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "causal")).config
    torch.manual_seed(0)
    save_model(tmp_path / "model", LlamaForSequenceClassification(config))
    rows = [{"text": f"number {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(20)]
    data = write(tmp_path / "rows.jsonl", rows)
    given = {"model": tmp_path / "model", "data": data, "output": output, "steps": 2}
    run_script("classification.py", monkeypatch, tmp_path / "cache", **given)
    assert "eval_accuracy" in capsys.readouterr().out
    assert_trained(output, AutoModelForSequenceClassification.from_pretrained(tmp_path / "model"))
    assert any("score" in name for name in load_file(output / "adapter_model.safetensors"))


def test_two_processes_share_the_weights(base_model, rows_file, output):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / "fsdp2.yaml")]
    launch += ["--main_process_port", "0", "-m", "gralora", "train", "--model", base_model, "--data", rows_file]
    launch += ["--output", str(output), "--rank", "4", "--steps", "2", "--batch-size", "2", "--dtype", "float32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    assert "4 rows (2 at once x 2 processes)" in " ".join(ran.stdout.split())
    assert_trained(output, AutoModelForCausalLM.from_pretrained(base_model))

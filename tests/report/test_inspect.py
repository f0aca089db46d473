import math

import oracle
import pytest
import torch
from conftest import random_factors, tiny_llama
from safetensors.torch import load_file

from gralora import GraloraConfig, get_peft_model
from gralora.files.checkpoint import open_adapter
from gralora.report import inspect
from gralora.report.inspect import block_norms

TARGETS = ["q_proj", "down_proj"]


def test_the_numbers_are_those_of_the_dense_update(adapter_folder, base_folder):
    report = inspect(adapter_folder, base_folder)
    adapter, weights = open_adapter(adapter_folder), load_file(base_folder / "model.safetensors")
    assert [entry.target for entry in report.layers] == list(adapter.layers)
    for entry in report.layers:
        dense = oracle.dense(*adapter.factors(entry.target), 2.0)
        weight = weights[f"{entry.target}.weight"].double()
        s = torch.linalg.svdvals(dense)
        shares = s[s > 1e-12] / s.sum()
        assert (entry.r, entry.hybrid_r, entry.k, entry.scale, entry.lora_rank) == (8, 2, 2, 2.0, 18)
        assert entry.norm == pytest.approx(float(dense.norm()))
        assert entry.relative_norm == pytest.approx(float(dense.norm() / weight.norm()))
        assert entry.needed_rank == torch.linalg.matrix_rank(dense) == 18
        assert entry.effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())))
    assert report.norm == pytest.approx(math.sqrt(sum(entry.norm**2 for entry in report.layers)))
    stored = load_file(adapter_folder / "adapter_model.safetensors")
    assert report.parameters == sum(tensor.numel() for tensor in stored.values())
    assert report.bytes == sum(
        (adapter_folder / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert (report.base_model, report.lora_rank, report.vllm_max_lora_rank) == ("someone/base", 18, 32)
    assert "vLLM (--max-lora-rank 32)" in report.served_on


def test_without_a_base_there_is_no_relative_norm(adapter_folder):
    assert all(entry.relative_norm is None for entry in inspect(adapter_folder).layers)


def test_block_norms_are_those_of_the_blocks():
    f = random_factors(k=3, n=4, m=5)
    dense = oracle.dense(*f, 0.5)
    norms = block_norms([f], 0.5)
    for i in range(3):
        for j in range(3):
            block = dense[5 * i : 5 * i + 5, 4 * j : 4 * j + 4]
            assert float(norms[i, j]) == pytest.approx(float(block.norm()))


def test_what_it_can_be_served_on(tmp_path):
    config = GraloraConfig(r=8, target_modules=TARGETS, modules_to_save=["lm_head"])
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "more")
    report = inspect(tmp_path / "more")
    assert report.also_trained == ("base_model.model.lm_head.weight",)
    assert "LoRA engines need it merged: `gralora merge`" in report.served_on
    get_peft_model(tiny_llama(num_hidden_layers=1), GraloraConfig(r=512, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "high"
    )
    report = inspect(tmp_path / "high")
    assert (report.lora_rank, report.vllm_max_lora_rank) == (1024, None)
    assert report.layers[0].needed_rank == 0
    assert "vLLM after `gralora export --max-rank 512` or lower, or merged" in report.served_on

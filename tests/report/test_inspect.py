import math

import oracle
import pytest
import torch
from conftest import random_factors, small_config, tiny_llama
from mixtures import save_mixture_and_adapter
from safetensors.torch import load_file
from torch import nn

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
    norms = block_norms(f, 0.5)
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


def test_the_numbers_of_a_stack_are_those_of_all_experts(tmp_path):
    save_mixture_and_adapter(tmp_path)
    report, adapter = inspect(tmp_path / "adapter"), open_adapter(tmp_path / "adapter")
    entry = next(entry for entry in report.layers if entry.target == "model.layers.0.mlp.experts.gate_up_proj")
    factors = adapter.factors(entry.target)
    dense = torch.stack([oracle.dense(*factors.expert(index), entry.scale) for index in range(4)])
    s = torch.linalg.svdvals(dense)
    shares = s / s.sum(1, keepdim=True)
    entropies = torch.special.entr(shares).sum(1)
    assert (entry.kind, entry.experts, entry.lora_rank, entry.needed_rank) == ("experts", 4, 10, 10)
    assert entry.norm == pytest.approx(float(dense.norm()))
    assert entry.effective_rank == pytest.approx(float(entropies.exp().mean()))
    assert report.parameters == sum(
        t.numel() for t in load_file(tmp_path / "adapter/adapter_model.safetensors").values()
    )
    assert (
        "vLLM (--max-lora-rank 16), SGLang and llama.cpp after `gralora export`, which says how they take experts"
        in report.served_on
    )


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Conv2d(4, 8, 3), "as LoRA after `gralora export`, which says which engines take it"),
        (nn.Conv2d(4, 8, 3, groups=2), "No LoRA has the same update on its convolutions, so LoRA engines need it merg"),
        (nn.MultiheadAttention(8, 2), "No LoRA has the same update on its attention, so LoRA engines need it merged"),
    ],
)
def test_what_other_kinds_can_be_served_on(module, text, tmp_path):
    with pytest.warns(UserWarning, match="This adapter uses `layer_kinds`"):
        get_peft_model(nn.Sequential(module), small_config(gralora_k=2)).save_pretrained(tmp_path / "adapter")
    assert text in inspect(tmp_path / "adapter").served_on

"""Tiny mixtures of experts, in every layout of transformers, and their adapters."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from gralora import GraloraConfig, get_peft_model
from gralora.tuner.layer import gralora_layers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "mixtral": lambda: MixtralConfig(**SIZES, intermediate_size=36, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, intermediate_size=36, moe_intermediate_size=12, num_experts=4, head_dim=6
    ),
    "gpt_oss": lambda: GptOssConfig(**SIZES, intermediate_size=36, num_local_experts=4, head_dim=6),
    "deepseek_v3": lambda: DeepseekV3Config(
        **(SIZES | {"num_key_value_heads": 4}),
        intermediate_size=36,
        moe_intermediate_size=12,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "llama4": lambda: Llama4TextConfig(
        **(SIZES | {"num_experts_per_tok": 1}),
        intermediate_size=36,
        intermediate_size_mlp=36,
        num_local_experts=4,
        head_dim=6,
        interleave_moe_layer_step=1,
    ),
}


def tiny(name, dtype=torch.float64):
    """A random model with two layers, whose experts have four matrices each."""
    torch.manual_seed(0)
    config = MODELS[name]()
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def with_dense_updates(model, plain, *names):
    """Return `plain` with the dense updates of the adapters of `model` added to its weights."""
    dense = copy.deepcopy(plain)
    parameters = dict(dense.named_parameters())
    for name, layer in gralora_layers(model.base_model.model).items():
        parameter = parameters[f"{name.replace('.base_layer', '')}.{layer.parameter_name}"]
        for adapter in names or ("default",):
            if layer.has_adapter(adapter):
                parameter.data += layer.get_delta_weight(adapter)
    return dense


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def moe_config(**changes):
    settings = {"r": 4, "alpha": 8, "target_modules": [], "target_parameters": list(EXPERTS), "init_weights": False}
    return GraloraConfig(**(settings | changes))


def routing(x, number=4, top_k=2):
    """Two experts for every token, by its position, and their weights."""
    tokens = torch.arange(len(x))
    index = torch.stack([tokens * 3 % number, (tokens * 3 + 1) % number], 1)
    return index, torch.linspace(0.2, 0.8, len(x) * top_k, dtype=x.dtype).view(-1, top_k)


class Block(nn.Module):
    """Experts with a fixed routing, called with the tokens alone."""

    def __init__(self, experts):
        super().__init__()
        self.layer = experts

    def forward(self, x):
        return self.layer(x, *routing(x))


def save_mixture_and_adapter(folder, name="mixtral", **changes):
    """Save a mixture as `base` and an adapter of its experts as `adapter` in `folder`, and return the tuned model."""
    base = tiny(name, torch.float32)
    base.save_pretrained(folder / "base")
    settings = {"target_modules": ["q_proj"], "hybrid_r": 2} | changes
    model = get_peft_model(base, moe_config(**settings)).eval()
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    with pytest.warns(UserWarning, match="This adapter uses .*`layer_kinds`"):
        model.save_pretrained(folder / "adapter")
    return model

import contextlib
import importlib
import inspect
import os
import signal
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from jaxtyping import install_import_hook

with install_import_hook(["gralora.tuner.blocks", "gralora.tuner.fused"], "beartype.beartype"):
    import gralora.tuner.model

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from gralora.tuner.blocks import Factors

pytest.register_assert_rewrite("contract")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
# A shell ignores it for jobs in the background, and what is ignored stays ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class MLP(nn.Module):
    """Two linear layers of odd sizes."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.up = nn.Linear(12, 24, dtype=dtype)
        self.down = nn.Linear(24, 6, dtype=dtype)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


@pytest.fixture
def one_thread():
    # Small models are fastest on one thread, and parallel processes then do not wait for each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def without_shape_checks(value):
    """Return a function, property or static method without what the import hook put around it."""
    if isinstance(value, property):
        return property(without_shape_checks(value.fget))
    if isinstance(value, staticmethod):
        return staticmethod(without_shape_checks(value.__func__))
    while inspect.isfunction(value) and "jaxtyping" in value.__code__.co_filename:
        value = value.__wrapped__
    return value


@pytest.fixture
def unchecked_shapes(monkeypatch):
    """Take the shape checks out of gralora: the compiler cannot trace them."""
    modules = [module for name, module in sys.modules.items() if name.startswith("gralora.")]
    classes = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    for owner in (*modules, *(cls for cls in classes if cls.__module__.startswith("gralora."))):
        for name, value in list(vars(owner).items()):
            if (plain := without_shape_checks(value)) is not value:
                monkeypatch.setattr(owner, name, plain)


def mlp_config(**changes):
    settings = {"r": 6, "gralora_k": 3, "alpha": 12, "target_modules": ["up", "down"], "init_weights": False}
    return gralora.GraloraConfig(**(settings | changes))


def small_config(**changes):
    """A small, random adapter for the first layer of an `nn.Sequential`, but for `changes`."""
    settings = {"r": 4, "alpha": 3.0, "target_modules": ["0"], "init_weights": False}
    return gralora.GraloraConfig(**(settings | changes))


def layer_settings(**changes):
    """The settings of `small_config` on one layer."""
    return small_config(**changes).settings_for("0")


def adapted_layer(base, **changes):
    """Put an adapter of `small_config` on `base`, and return the layer."""
    return gralora.get_peft_model(nn.Sequential(base), small_config(**changes)).base_model.model[0]


def random_factors(k=2, s=2, n=6, m=5, hybrid_r=0, dtype=torch.float64):
    """Random factors of `k` blocks per side, `s` columns for each pair, and blocks of `m` by `n`."""
    r = k * s
    return Factors(
        A=torch.randn(k, n, r, dtype=dtype),
        B=torch.randn(k, r, m, dtype=dtype),
        A_general=torch.randn(hybrid_r, k * n, dtype=dtype) if hybrid_r else None,
        B_general=torch.randn(k * m, hybrid_r, dtype=dtype) if hybrid_r else None,
    )


def tiny_llama(**changes):
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def tiny_opt(layers=2):
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=64,
            ffn_dim=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
        )
    ).eval()


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    ).eval()


@contextlib.contextmanager
def native_peft():
    """PEFT with its own GraLoRA, as in a process that never imported gralora."""
    ours = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.GRALORA], PEFT_TYPE_TO_TUNER_MAPPING[PeftType.GRALORA]
    config = importlib.import_module("peft.tuners.gralora.config").GraloraConfig
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.GRALORA] = config
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.GRALORA] = importlib.import_module("peft.tuners.gralora.model").GraloraModel
    gralora.GraloraConfig.is_registered = False
    try:
        yield config
    finally:
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.GRALORA], PEFT_TYPE_TO_TUNER_MAPPING[PeftType.GRALORA] = ours
        gralora.GraloraConfig.is_registered = True


def randomise(model, std=0.05):
    """Give every adapter parameter of `model` a value, so that no update is zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gralora_" in name or "lora_" in name:
                parameter.normal_(std=std)
    return model


def weights_of(model):
    """Return a copy of every tensor of `model` that belongs to no adapter, by name."""
    return {name: t.detach().clone() for name, t in model.state_dict().items() if "gralora_" not in name}


def assert_same_bits(before, after):
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert not changed


def get_native_peft_model(model, **settings):
    with native_peft() as config:
        return peft.get_peft_model(model, config(**settings))


@pytest.fixture
def base_folder(tmp_path):
    """A tiny Llama on disk."""
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter_folder(tmp_path):
    """An adapter of it on disk, with a hybrid part and a scale of 2."""
    from adapters import save_adapter

    return save_adapter(tmp_path / "adapter", hybrid_r=2, alpha=20, target_modules=["q_proj", "down_proj"])

"""Builders of adapters and their folders, and ways to damage them, for the tests of files, exports and imports."""

import json

import pytest
import torch
from conftest import MLP, randomise, tiny_llama
from peft import LoraConfig, PeftModel
from peft import get_peft_model as get_any_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from gralora import GraloraConfig, get_peft_model
from gralora.cli import main

TOKENS = torch.arange(3, 23)[None]
LLAMA = ["q_proj", "v_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes' blocks of 64 must fit the rows
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def adapted(make=tiny_llama, **settings):
    settings = {"r": 8, "gralora_k": 2, "alpha": 16, "target_modules": LLAMA} | settings
    return randomise(get_peft_model(make(), GraloraConfig(**settings))).eval()


def save_adapter(folder, **settings):
    """Save a GraLoRA adapter, and return its folder."""
    model = adapted(**settings)
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def save_base_and_adapter(folder):
    """Save a base model as `base` and an adapter of it as `adapter` in `folder`, and return `folder`."""
    base = tiny_llama(**WIDTHS)
    base.save_pretrained(folder / "base")
    config = GraloraConfig(r=8, hybrid_r=2, target_modules=["q_proj", "down_proj"])
    randomise(get_peft_model(base, config)).save_pretrained(folder / "adapter")
    return folder


def tuned_base(folder):
    """Load what `save_base_and_adapter` saved."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder / "adapter").eval()


def lora(make=tiny_llama, **settings):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LLAMA} | settings
    return randomise(get_any_peft_model(make(), LoraConfig(**settings))).eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def assert_same_outputs(model, expected):
    # Equal maps in float32, whose products are summed in another order.
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-6, rtol=1e-6)


def read_config(folder):
    return json.loads((folder / CONFIG).read_text())


def edit_config(folder, old, new):
    text = (folder / CONFIG).read_text()
    assert old in text
    (folder / CONFIG).write_text(text.replace(old, new))


def edit_tensors(folder, change):
    """Replace the tensors in `folder` by what `change` makes of them."""
    tensors = load_file(folder / TENSORS)
    save_file(change(tensors), folder / TENSORS)


def run(capsys, *arguments):
    """Run the command line; return its status and what it printed."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


# Ways to damage the folder of an adapter.


def truncated(folder):
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100])


def truncated_in_the_header(folder):
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:50])


def empty(folder):
    (folder / TENSORS).write_bytes(b"")


def bit_of_the_header_flipped(folder):
    raw = bytearray((folder / TENSORS).read_bytes())
    raw[raw.index(b"gralora_A")] ^= 1
    (folder / TENSORS).write_bytes(raw)


def bit_of_an_exponent_flipped(folder):
    def flip(tensors):
        next(iter(tensors.values())).view(torch.int32).view(-1)[3] |= 0x7F800000
        return tensors

    edit_tensors(folder, flip)


def one_factor_missing(folder):
    def drop(tensors):
        del tensors[next(key for key in tensors if key.endswith("gralora_B"))]
        return tensors

    edit_tensors(folder, drop)


def other_shapes(folder):
    edit_config(folder, '"gralora_k": 2', '"gralora_k": 4')


def integers(folder):
    edit_tensors(folder, lambda tensors: {key: tensor.to(torch.int32) for key, tensor in tensors.items()})


def config_truncated(folder):
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:-20])


def config_no_object(folder):
    (folder / CONFIG).write_text("[]")


def bad_value(folder):
    edit_config(folder, '"r": 8', '"r": "eight"')


def no_tensors(folder):
    (folder / TENSORS).unlink()


def pickled(folder):
    (folder / TENSORS).rename(folder / "adapter_model.bin")


def no_config(folder):
    (folder / CONFIG).unlink()


def a_lora(folder):
    edit_config(folder, "GRALORA", "LORA")


def no_factors(folder):
    edit_tensors(folder, lambda tensors: {"other": torch.zeros(2)})


DAMAGES = [
    (truncated, "must be a whole safetensors file; it cannot be read"),
    (truncated_in_the_header, "must be a whole safetensors file; it cannot be read"),
    (empty, "must be a whole safetensors file; it cannot be read"),
    (bit_of_the_header_flipped, "must hold gralora_A, gralora_B with hybrid_r=0; got gralora_B at"),
    (bit_of_an_exponent_flipped, "must be finite; it holds nan or inf"),
    (one_factor_missing, "must hold gralora_A, gralora_B with hybrid_r=0; got gralora_A at"),
    (other_shapes, r"must fit the config \(gralora_k=4, r=8, hybrid_r=0\); got shape"),
    (integers, "must have one floating-point dtype; got I32, I32"),
    (config_truncated, "must be JSON; it cannot be read"),
    (config_no_object, "must hold a JSON object; got list"),
    (bad_value, "`r` must be a positive integer; got r='eight'"),
    (no_tensors, "`adapter` must be the folder of an adapter; .* has no adapter_model.safetensors"),
    (pickled, "save it with `safe_serialization=True`"),
    (no_config, "must be the folder of an adapter; .* has no adapter_config.json"),
    (a_lora, "must hold a GraLoRA adapter; its config says peft_type='LORA'"),
    (no_factors, "must hold a GraLoRA adapter; it has no `gralora_A`"),
]


# The authors' own repository.


class AuthorsLinear(nn.Module):
    """The forward pass of the authors' `Linear`, as published: `r` includes `hybrid_r`."""

    def __init__(self, base, r, k, hybrid_r, alpha):
        super().__init__()
        self.base, self.r, self.k, self.hybrid_r, self.scaling = base, r, k, hybrid_r, alpha / r
        n, m = base.in_features // k, base.out_features // k
        self.A, self.B = 0.1 * torch.randn(k, n, r - hybrid_r), torch.randn(k, r - hybrid_r, m)
        self.A_general, self.B_general = 0.1 * torch.randn(hybrid_r, k * n), torch.randn(k * m, hybrid_r)

    def forward(self, x):
        batch, length, width = x.shape
        k, s = self.k, (self.r - self.hybrid_r) // self.k
        h = torch.einsum("blni,nir->blnr", x.view(batch, length, k, width // k), self.A)
        h = h.view(batch, length, k, k, s).permute(0, 1, 3, 2, 4).reshape(batch, length, k, k * s)
        update = torch.einsum("bljr,jro->bljo", h, self.B).reshape(batch, length, -1)
        return self.base(x) + self.scaling * (update + x @ self.A_general.T @ self.B_general.T)


def save_original(folder):
    """Write an adapter as the authors' fork of PEFT does, and return its folder and its model."""
    model = MLP()
    tensors = {}
    for name in ("up", "down"):
        layer = AuthorsLinear(getattr(model, name), r=8, k=3, hybrid_r=2, alpha=20)
        setattr(model, name, layer)
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.gralora_A"], tensors[f"{prefix}.gralora_B"] = layer.A, layer.B
        tensors[f"{prefix}.gralora_A_general.weight"] = layer.A_general
        tensors[f"{prefix}.gralora_B_general.weight"] = layer.B_general
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": "someone/base",
        "bias": "none",
        "fan_in_fan_out": False,
        "gralora_alpha": 20,
        "gralora_dropout": 0.05,
        "gralora_k": 3,
        "hybrid_r": 2,
        "inference_mode": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "peft_type": "GRALORA",
        "r": 8,
        "revision": None,
        "target_modules": ["up", "down"],
        "task_type": None,
    }
    folder.mkdir()
    save_file(tensors, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder, model

"""Adapters on bases that real libraries quantise: a merge is undone to the same bytes.

bitsandbytes is tested as it is; torchao by running this file once more where it is found. It lies in a folder of its
own, because transformers and PEFT import it wherever it is installed, and it greets every process with warnings.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from conftest import MLP, assert_same_bits, mlp_config, tiny_llama, weights_of
from peft import LoraConfig, PeftModel
from peft import get_peft_model as peft_get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from gralora import GraloraConfig, GraloraLayer, get_peft_model
from gralora.tuner.merging.quantised import backend_of

TORCHAO = {}
if os.environ.get("GRALORA_TEST_TORCHAO"):
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerGroup

    TORCHAO = {
        "int8": Int8WeightOnlyConfig(),
        "int8 dynamic": Int8DynamicActivationInt8WeightConfig(),
        "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    }
BITSANDBYTES = ["nf4 plain", "nf4 nested", "fp4 plain", "fp4 nested", "int8"]
KINDS = [f"torchao {form}" for form in TORCHAO] or [f"bnb {form}" for form in BITSANDBYTES]
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt|Merge lora module:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torchao's own
]


def quantised(kind, n_in=64, n_out=64):
    """Return a dense layer and the same one quantised."""
    torch.manual_seed(0)
    dense = nn.Linear(n_in, n_out)
    library, _, form = kind.partition(" ")
    if library == "torchao":
        holder = nn.Sequential(copy.deepcopy(dense))
        quantize_(holder, TORCHAO[form])
        return dense, holder[0]
    if form == "int8":
        layer = bnb.nn.Linear8bitLt(n_in, n_out, has_fp16_weights=False)
    else:
        quant_type, nested = form.split()
        layer = bnb.nn.Linear4bit(
            n_in, n_out, compute_dtype=torch.float32, quant_type=quant_type, compress_statistics=nested == "nested"
        )
    layer.load_state_dict(dense.state_dict())
    return dense, layer.to("cpu")


def adapted(kind, base, lora=False, r=8):
    """Put an adapter on `base` inside a model that says how it is quantised, as transformers' do."""
    holder = nn.ModuleDict({"layer": base})
    library, _, form = kind.partition(" ")
    if library == "torchao":
        holder.hf_quantizer = SimpleNamespace(quantization_config=TorchAoConfig(TORCHAO[form]))
    if lora:
        holder.is_loaded_in_4bit = isinstance(base, bnb.nn.Linear4bit)  # what LoRA goes by
        holder.is_loaded_in_8bit = isinstance(base, bnb.nn.Linear8bitLt)
        return peft_get_peft_model(holder, LoraConfig(r=r, target_modules=["layer"], init_lora_weights=False))
    return get_peft_model(holder, GraloraConfig(r=r, target_modules=["layer"], init_weights=False, alpha=r))


def packed_state(base):
    """Copies of the tensors that a quantised layer is made of."""
    if hasattr(base.weight, "__tensor_flatten__"):
        tensors = {name: getattr(base.weight, name) for name in base.weight.__tensor_flatten__()[0]}
    elif isinstance(base, bnb.nn.Linear4bit):
        state = base.weight.quant_state.as_dict(packed=False)
        tensors = {"data": base.weight.data} | {k: t for k, t in state.items() if isinstance(t, torch.Tensor)}
    else:
        tensors = {"data": base.weight.data, "SCB": base.state.SCB if base.weight.SCB is None else base.weight.SCB}
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after inference"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_bases_merge_and_give_their_packed_bytes_back(kind, used):
    _, base = quantised(kind)
    model = adapted(kind, base).train(not used)  # bitsandbytes repacks a weight when it is first used in eval mode
    layer = model.base_model.model["layer"]
    x = torch.randn(5, 64)
    expected = layer(x)
    weight, before = base.weight, packed_state(base)
    for _ in range(3):
        model.merge_adapter()
        merged = layer(x)
        assert (merged - expected).norm() < 0.2 * expected.norm()  # requantised to 4 bits
        model.unmerge_adapter()
        assert base is layer.base_layer
        assert base.weight is weight
        assert_same_bits(before, packed_state(base))
    torch.testing.assert_close(layer(x), expected)
    model.to("cpu")
    torch.testing.assert_close(layer(x), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_quantised_layer_is_as_accurate_as_lora_s(kind):
    errors = []
    for lora in (False, True):
        dense, base = quantised(kind)
        model = adapted(kind, base, lora).eval()
        layer = model.base_model.model["layer"]
        delta = layer.get_delta_weight("default")
        scale = dense.weight.detach().abs().mean() / delta.detach().abs().mean()
        layer.scaling["default"] *= scale.item()
        exact = base_weight_of(base) + layer.get_delta_weight("default").detach()
        model.merge_adapter()
        merged = base_weight_of(layer.get_base_layer())
        errors.append(float((merged - exact).norm() / exact.norm()))
    ours, theirs = errors
    assert ours < 1.2 * theirs


def base_weight_of(base):
    """The dense weight of a quantised layer, read off its outputs on the unit vectors."""
    base.train()
    with torch.no_grad():
        columns = base(torch.eye(base.in_features)) - (0 if base.bias is None else base.bias)
    return columns.float().T


QUANTIZERS = {
    "bnb nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bnb int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(TORCHAO["int8"]),
    "torchao int4": lambda: TorchAoConfig(TORCHAO["int4"]),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [kind for kind in QUANTIZERS if kind.startswith(KINDS[0].split()[0])])
def test_a_quantised_model_trains_saves_reloads_merges_and_unmerges(kind, tmp_path):
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=QUANTIZERS[kind]())

    tokens = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    model = get_peft_model(load(), GraloraConfig(r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, GraloraLayer)}
    with torch.no_grad():
        expected = model(tokens).logits
        reloaded = PeftModel.from_pretrained(load(), tmp_path / "adapter")
        # bitsandbytes' own 4-bit layers give other outputs (by 0.004) after they were used for training.
        atol = 0.01 if kind == "bnb nf4" else 0
        torch.testing.assert_close(reloaded(tokens).logits, expected, atol=atol, rtol=0)
        before = {name: packed_state(layer.base_layer) for name, layer in layers.items()}
        model.merge_adapter()
        assert not torch.equal(model(tokens).logits, expected)
        model.unmerge_adapter()
        for name, layer in layers.items():
            assert_same_bits(before[name], packed_state(layer.base_layer))
        assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_refused_merge_leaves_the_packed_bytes(kind):
    _, base = quantised(kind)
    model = adapted(kind, base)
    layer = model.base_model.model["layer"]
    before = packed_state(base)
    with torch.no_grad():
        layer.gralora_B["default"][0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"non-finite values.*at 'layer'; no layer was merged"):
        model.merge_adapter(safe_merge=True)
    assert layer.base_layer is base
    assert_same_bits(before, packed_state(base))


class ForwardOnly(nn.Linear):
    """Stands for a packed format that cannot be read."""


def test_a_base_that_cannot_be_rewritten_trains_and_refuses_to_merge(monkeypatch):
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    import gralora.tuner.merging.quantised as room

    monkeypatch.setattr(
        room,
        "resolve_quantization_backend",
        lambda module, **_: ForwardOnlyQuantizationBackend("gptq") if isinstance(module, ForwardOnly) else None,
    )
    base = MLP()
    base.down = ForwardOnly(24, 6)
    with pytest.warns(UserWarning, match="1 adapted layers cannot be merged: gptq weights"):
        model = get_peft_model(base, mlp_config())
    model(torch.randn(3, 12)).sum().backward()
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"Nothing was merged: 'down' cannot be, because gptq.*16 or 32 bits"):
        model.merge_adapter()
    assert_same_bits(before, weights_of(model))


if TORCHAO:

    def test_torchao_without_its_recipe_is_forward_only():
        base = nn.Sequential(nn.Linear(64, 64))
        quantize_(base, TORCHAO["int8"])
        assert backend_of(base[0]).supports_merge is False
        with pytest.warns(UserWarning, match="1 adapted layers cannot be merged: torchao weights"):
            model = get_peft_model(base, GraloraConfig(r=8, target_modules=["0"], init_weights=False))
        model(torch.randn(3, 64)).sum().backward()
        with pytest.raises(RuntimeError, match=r"Nothing was merged: '0' cannot be, because torchao"):
            model.merge_adapter()

    def test_torchao_applied_after_the_adapter_serves_and_refuses_to_merge():
        model = get_peft_model(
            nn.Sequential(nn.Linear(64, 64)), GraloraConfig(r=8, target_modules=["0"], init_weights=False)
        )
        x = torch.randn(3, 64)
        expected = model(x)
        quantize_(model, TORCHAO["int8"])
        assert type(model.base_model.model[0].base_layer.weight) is not nn.Parameter
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, atol=0.05, rtol=0.05)
        before = packed_state(model.base_model.model[0].base_layer)
        for refused in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(RuntimeError, match=r"Nothing was merged: '0' cannot be, because its base weight is a"):
                refused()
        assert_same_bits(before, packed_state(model.base_model.model[0].base_layer))

else:

    def test_torchao():
        """All of this file, with torchao's kinds of weight, in a process that finds it where the Makefile put it."""
        paths = [str(Path(sys.prefix) / "torchao"), os.environ.get("PYTHONPATH", "")]
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "GRALORA_TEST_TORCHAO": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-4000:]
        assert "no tests ran" not in run.stdout


def test_an_evaluation_leaves_the_gradients_of_a_4_bit_model_as_they_are():
    """On a CPU with AVX512-BF16, bitsandbytes packs the weights in evaluation mode, without a gradient from then on."""

    def gradients(evaluated):
        torch.manual_seed(0)
        layers = (bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.bfloat16) for _ in range(2))
        config = GraloraConfig(r=4, target_modules=["0"], init_weights=False)
        model = get_peft_model(nn.Sequential(*layers).to("cpu"), config)
        x = torch.randn(3, 64)
        if evaluated:
            with torch.no_grad():
                model.eval()(x)
        model.train()(x).sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert one.any()
        assert torch.equal(one, other)

import json
import math
import shutil

import oracle
import pytest
import torch
from conftest import MLP, get_native_peft_model, randomise, tiny_gpt2, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft import get_peft_model as get_any_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from gralora import GraloraConfig, GraloraLayer, get_peft_model
from gralora.export import rank_warning, to_diffusers, to_lora
from gralora.export.engines import engines_for, vllm_max_lora_rank
from gralora.export.lora import LoraOptions
from gralora.files.checkpoint import open_adapter
from gralora.importing import from_lora, import_original
from gralora.tuner import svd
from gralora.tuner.blocks import Factors

TOKENS = torch.arange(3, 23)[None]
LLAMA = ["q_proj", "v_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]


def adapted(make=tiny_llama, **settings):
    settings = {"r": 8, "gralora_k": 2, "alpha": 16, "target_modules": LLAMA} | settings
    return randomise(get_peft_model(make(), GraloraConfig(**settings))).eval()


@pytest.fixture
def folder(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def random_factors(k=2, n=6, s=2, m=5, q=0, dtype=torch.float64):
    r = k * s
    general = (torch.randn(q, k * n, dtype=dtype), torch.randn(k * m, q, dtype=dtype)) if q else (None, None)
    return Factors(torch.randn(k, n, r, dtype=dtype), torch.randn(k, r, m, dtype=dtype), *general)


# The exact way.


@pytest.mark.parametrize("hybrid_r", [0, 3])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize(("make", "targets"), [(tiny_llama, LLAMA), (tiny_gpt2, CONV1D)], ids=["linear", "conv1d"])
def test_pefts_lora_with_the_export_is_our_adapter(make, targets, k, hybrid_r, tmp_path):
    changes = {"fan_in_fan_out": True} if make is tiny_gpt2 else {}
    model = adapted(make, gralora_k=k, hybrid_r=hybrid_r, target_modules=targets, **changes)
    export = to_lora(model, tmp_path / "lora")
    assert export.rank == 8 * k + hybrid_r
    loaded = PeftModel.from_pretrained(make(), tmp_path / "lora").eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=1e-6)
    # Copied values: what differs is the order of summation in float64; with hybrid_r the scale is rounded to float32.
    assert export.worst.measured.largest < (1e-7 if hybrid_r else 1e-16)


def test_gpt2_needs_no_fan_in_fan_out_in_our_config(tmp_path):
    model = adapted(tiny_gpt2, target_modules=CONV1D)
    assert to_lora(model, tmp_path / "lora").config["fan_in_fan_out"] is False
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to True"):
        loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_is_a_stored_one_where_the_scale_comes_out_whole(dtype, tmp_path):
    model = adapted(r=8, gralora_k=4, alpha=12)
    for layer in model.modules():
        if isinstance(layer, GraloraLayer):
            layer.gralora_A.to(dtype), layer.gralora_B.to(dtype)
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    export = to_lora(tmp_path / "adapter", tmp_path / "lora")
    assert (export.rank, export.config["lora_alpha"]) == (32, 48)
    written = load_file(tmp_path / "lora/adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    A, B = stored[f"{name}.gralora_A"], stored[f"{name}.gralora_B"]
    lora_a, lora_b = written[f"{name}.lora_A.weight"], written[f"{name}.lora_B.weight"]
    assert lora_a.dtype == lora_b.dtype == dtype
    for j in range(4):
        assert torch.equal(lora_a[8 * j : 8 * j + 8, 8 * j : 8 * j + 8], A[j].T)
        for i in range(4):
            rows, columns = slice(8 * i, 8 * i + 8), slice(8 * j + 2 * i, 8 * j + 2 * i + 2)
            assert torch.equal(lora_b[rows, columns], B[i, 2 * j : 2 * j + 2].T)
    assert lora_a.count_nonzero() == A.count_nonzero()
    assert lora_b.count_nonzero() == B.count_nonzero()


def test_factors_multiply_to_the_oracle(folder):
    export, adapter = to_lora(folder), open_adapter(folder)
    for name, layer in adapter.layers.items():
        f = adapter.factors(name)
        a, b = (export.tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        expected = oracle.dense(f.A, f.B, f.A_general, f.B_general, layer.settings.scaling)
        torch.testing.assert_close(b @ a * export.config["lora_alpha"] / export.rank, expected, atol=1e-12, rtol=1e-12)


def test_the_config_is_what_every_engine_reads(tmp_path):
    model = adapted(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    to_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    wanted = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/base",
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["down_proj", "q_proj"],
        "bias": "none",
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "fan_in_fan_out": False,
    }
    assert {name: config[name] for name in wanted} == wanted
    assert isinstance(config["lora_alpha"], int)
    assert set(config) <= set(LoraConfig().to_dict())
    keys = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_model_and_its_folder_give_the_same_export(folder):
    model = PeftModel.from_pretrained(tiny_llama(), folder)
    a, b = to_lora(folder), to_lora(model)
    assert a.config == b.config | {"base_model_name_or_path": a.config["base_model_name_or_path"]}
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)


def test_layers_of_other_ranks_and_scales_are_padded_and_folded(tmp_path):
    patterns = {"rank_pattern": {"q_proj": 4}, "k_pattern": {"v_proj": 4}, "alpha_pattern": {"down_proj": 7}}
    model = adapted(**patterns)
    export = to_lora(model, tmp_path / "lora")
    assert export.rank == 32
    assert {tensor.shape[0] for key, tensor in export.tensors.items() if "lora_A" in key} == {32}
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=1e-6)


def test_a_scale_that_lora_alpha_cannot_state_is_folded_in_float32(tmp_path):
    model = adapted(use_rslora=True, alpha=5)
    for layer in model.modules():
        if isinstance(layer, GraloraLayer):
            layer.gralora_A.to(torch.bfloat16), layer.gralora_B.to(torch.bfloat16)
    export = to_lora(model, tmp_path / "lora")
    assert export.config["lora_alpha"] == export.rank == 16
    dtypes = {key.split(".")[-2]: tensor.dtype for key, tensor in export.tensors.items()}
    assert dtypes == {"lora_A": torch.bfloat16, "lora_B": torch.float32}
    assert max(layer.measured.relative for layer in export.layers) < 1e-7


@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": r".*layers\.0\.(self_attn\.q_proj|mlp\.up_proj)"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.1\..*"},
    ],
    ids=["regex", "layers", "exclude"],
)
def test_targets_are_named_in_full_where_short_names_would_mean_more(selection, tmp_path):
    model = adapted(**selection)
    export = to_lora(model, tmp_path / "lora")
    assert export.config["target_modules"] == ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"]
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=1e-6)


def test_layers_come_in_the_order_of_depth():
    model = adapted(lambda: tiny_llama(num_hidden_layers=11), target_modules=["q_proj"])
    assert [layer.name.split(".")[2] for layer in to_lora(model).layers] == [str(i) for i in range(11)]


def test_an_adapter_of_pefts_own_tuner_is_exported_too(tmp_path):
    native = randomise(get_native_peft_model(tiny_llama(), r=8, target_modules=LLAMA)).eval()
    native.save_pretrained(tmp_path / "native")
    to_lora(tmp_path / "native", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(loaded), logits(native), atol=1e-6, rtol=1e-6)


def test_the_dtype_is_cast_and_what_it_costs_is_measured(folder, tmp_path):
    export = to_lora(folder, tmp_path / "lora", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "lora/adapter_model.safetensors").values()} == {torch.bfloat16}
    assert 1e-4 < max(layer.measured.relative for layer in export.layers) < 1e-2


def test_a_wrong_file_would_be_noticed(folder, tmp_path, monkeypatch):
    from gralora.files.adapter_folder import AdapterFolder

    write = AdapterFolder.write

    def swap(self, path):
        key = next(key for key in self.tensors if "lora_B" in key)
        self.tensors[key] = self.tensors[key].flip(0).contiguous()
        write(self, path)

    monkeypatch.setattr(AdapterFolder, "write", swap)
    with pytest.raises(RuntimeError, match="Nothing was exported: what was read back gives another update at 'model"):
        to_lora(folder, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


# What else was trained.


def test_biases_modules_and_tokens_are_refused_for_serving_and_carried_over_for_peft(tmp_path):
    cases = {
        "bias": ({"bias": "gralora_only"}, r"bias='gralora_only', with 6 trained biases"),
        "modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        "tokens": ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "trainable_token_indices="),
    }
    for name, (settings, message) in cases.items():

        def make(name=name):
            return tiny_gpt2() if name == "bias" else tiny_llama()

        targets = ["c_fc", "c_proj"] if name == "bias" else LLAMA
        fan = {"fan_in_fan_out": True} if name == "bias" else {}
        model = adapted(make, target_modules=targets, **settings, **fan)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        with pytest.raises(ValueError, match=f"must hold factors alone; got {message}.*`gralora merge`.*--for peft"):
            to_lora(model, tmp_path / name)
        assert not (tmp_path / name).exists()
        to_lora(model, tmp_path / name, target="peft")
        loaded = PeftModel.from_pretrained(make(), tmp_path / name).eval()
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=1e-6)


def test_resized_embeddings_in_the_file_are_refused(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"factors alone; got also 'base_model.model.lm_head.weight' in"):
        to_lora(folder)


# Compression.


@pytest.mark.parametrize(("k", "q"), [(1, 0), (2, 0), (4, 0), (2, 3), (4, 5)])
def test_singular_values_are_those_of_the_dense_update(k, q):
    f = random_factors(k=k, q=q)
    dense = oracle.dense(*f, 0.7)
    expected = torch.linalg.svdvals(dense)
    s = svd.singular_values(f, 0.7)
    torch.testing.assert_close(s[: len(expected)], expected[: len(s)], atol=1e-12, rtol=1e-12)
    assert svd.numerical_rank(s, f) == torch.linalg.matrix_rank(dense)


@pytest.mark.parametrize("rank", [1, 5, 8, 30])
@pytest.mark.parametrize(("k", "q"), [(2, 0), (4, 3)])
def test_compression_is_the_optimum(k, q, rank):
    f = random_factors(k=k, n=8, s=2, m=9, q=q)
    dense = oracle.dense(*f, 0.7)
    lora_a, lora_b, _ = svd.best_lora(f, 0.7, rank)
    tail = torch.linalg.svdvals(dense)[rank:]
    error = (lora_b @ lora_a - dense).norm() / dense.norm()
    assert float(error) == pytest.approx(float(tail.norm() / dense.norm()), abs=1e-6)
    if rank >= torch.linalg.matrix_rank(dense):
        torch.testing.assert_close(lora_b @ lora_a, dense, atol=1e-12, rtol=1e-12)


def test_hybrid_columns_inside_the_blocks_cost_no_accuracy():
    f = random_factors(k=1, n=10, s=3, m=10, q=2)
    f = f._replace(A_general=f.A[0, :, :2].T.contiguous(), B_general=f.B[0, :2].T.contiguous())
    dense = oracle.dense(*f, 1.0)
    lora_a, lora_b, s = svd.best_lora(f, 1.0, 5)
    torch.testing.assert_close(lora_b @ lora_a, dense, atol=1e-12, rtol=1e-12)
    assert svd.numerical_rank(s, f) == 3


def test_max_rank_compresses_what_is_above_it(folder, tmp_path):
    export = to_lora(folder, tmp_path / "lora", max_rank=6)
    adapter = open_adapter(folder)
    lost = whole = 0.0
    for layer in export.layers:
        f = adapter.factors(layer.name)
        s = torch.linalg.svdvals(oracle.dense(*f, adapter.layers[layer.name].settings.scaling))
        optimum = float(s[6:].norm() / s.norm())
        assert layer.relative_error == pytest.approx(optimum, abs=1e-6)
        assert layer.measured.relative == pytest.approx(optimum, abs=1e-6)
        lost, whole = lost + float(s[6:].square().sum()), whole + float(s.square().sum())
    assert export.rank == 6
    assert export.relative_error == pytest.approx(math.sqrt(lost / whole), abs=1e-6)


def test_max_rank_at_the_full_rank_copies(folder):
    exact, capped = to_lora(folder), to_lora(folder, max_rank=16)
    assert capped.relative_error == 0
    assert all(torch.equal(exact.tensors[key], capped.tensors[key]) for key in exact.tensors)


def test_max_error_finds_the_smallest_rank(folder):
    for per_layer in (False, True):
        export = to_lora(folder, max_error=0.3, per_layer=per_layer)
        below = to_lora(folder, max_rank=export.rank - 1)
        if per_layer:
            assert max(layer.relative_error for layer in export.layers) <= 0.3
            assert max(layer.relative_error for layer in below.layers) > 0.3
        else:
            assert export.relative_error <= 0.3 < below.relative_error
    assert to_lora(folder, max_error=0).relative_error < 1e-12


def test_a_fresh_adapter_compresses_to_nothing(tmp_path):
    model = get_peft_model(tiny_llama(), GraloraConfig(r=8, target_modules=LLAMA))
    export = to_lora(model, tmp_path / "lora", max_rank=2)
    assert export.relative_error == 0
    assert not any(tensor.any() for tensor in export.tensors.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rank": 0}, "`max_rank` must be a positive integer; got max_rank=0"),
        ({"max_rank": True}, "`max_rank` must be a positive integer; got max_rank=True"),
        ({"max_error": 1.5}, r"`max_error` must be in \[0, 1\); got max_error=1.5"),
        ({"per_layer": True}, "`per_layer` must come with `max_error`"),
        ({"dtype": torch.int8}, "`dtype` must be float32, bfloat16 or float16; got dtype=torch.int8"),
        ({"target": "ollama"}, "`target` must be 'serving' or 'peft'; got target='ollama'"),
        ({"max_rank": 2, "max_error": 0.1}, r"`max_rank` must be at least \d+ for max_error=0.1; got max_rank=2, with"),
        ({"adapter_name": "other"}, r"`adapter_name` must be one of \['default'\]; got adapter_name='other'"),
    ],
)
def test_bad_options_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_lora(adapted(), tmp_path / "lora", **options)
    assert not any(tmp_path.iterdir())


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path):
    model = adapted()
    layer = next(m for m in model.modules() if isinstance(m, GraloraLayer))
    with torch.no_grad():
        layer.gralora_A["default"][0, 0, 0] = 1e6
    with pytest.raises(
        ValueError, match=r"`dtype` must hold every value; got dtype=torch.float16 with 1e\+06 at 'model"
    ):
        to_lora(model, tmp_path / "lora", dtype=torch.float16)
    assert not any(tmp_path.iterdir())


# Damaged and foreign input.


def damage(folder, how):
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "truncated in the header":
        file.write_bytes(file.read_bytes()[:50])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "a bit of the header flipped":
        raw = bytearray(file.read_bytes())
        raw[raw.index(b"gralora_A")] ^= 1
        file.write_bytes(raw)
    elif how == "a bit of an exponent flipped":
        tensors = load_file(file)
        tensor = next(iter(tensors.values()))
        tensor.view(torch.int32).view(-1)[3] |= 0x7F800000
        save_file(tensors, file)
    elif how == "one factor missing":
        tensors = load_file(file)
        del tensors[next(key for key in tensors if key.endswith("gralora_B"))]
        save_file(tensors, file)
    elif how == "other shapes":
        config.write_text(config.read_text().replace('"gralora_k": 2', '"gralora_k": 4'))
    elif how == "integers":
        save_file({key: tensor.to(torch.int32) for key, tensor in load_file(file).items()}, file)
    elif how == "config truncated":
        config.write_text(config.read_text()[:-20])
    elif how == "config no object":
        config.write_text("[]")
    elif how == "bad value":
        config.write_text(config.read_text().replace('"r": 8', '"r": "eight"'))
    elif how == "no tensors":
        file.unlink()
    elif how == "pickled":
        file.rename(folder / "adapter_model.bin")
    elif how == "no config":
        config.unlink()
    elif how == "lora":
        config.write_text(config.read_text().replace("GRALORA", "LORA"))
    elif how == "no factors":
        save_file({"other": torch.zeros(2)}, file)


DAMAGE = {
    "truncated": "must be a whole safetensors file; it can't be read",
    "truncated in the header": "must be a whole safetensors file; it can't be read",
    "empty": "must be a whole safetensors file; it can't be read",
    "a bit of the header flipped": "must hold gralora_A, gralora_B with hybrid_r=0; got gralora_B at",
    "a bit of an exponent flipped": "must be finite; it holds nan or inf",
    "one factor missing": "must hold gralora_A, gralora_B with hybrid_r=0; got gralora_A at",
    "other shapes": r"must fit the config \(gralora_k=4, r=8, hybrid_r=0\); got shape",
    "integers": "must be of one floating-point dtype; got I32, I32",
    "config truncated": "must be JSON; it can't be read",
    "config no object": "must hold a JSON object; got list",
    "bad value": "`r` must be a positive integer; got r='eight'",
    "no tensors": "`adapter` must have a adapter_model.safetensors",
    "pickled": "save it with safe_serialization=True",
    "no config": "must be the folder of an adapter; .* has no adapter_config.json",
    "lora": "must hold a GraLoRA adapter; its config says peft_type='LORA'",
    "no factors": "must hold a GraLoRA adapter; it has no `gralora_A`",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_adapter_gives_one_line_and_writes_nothing(how, folder, tmp_path):
    damage(folder, how)
    with pytest.raises((ValueError, FileNotFoundError), match=DAMAGE[how]) as raised:
        to_lora(folder, tmp_path / "deep/lora")
    assert "\n" not in str(raised.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_a_model_without_a_gralora_adapter_is_refused():
    lora = get_any_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`adapter_name` must be a GraLoRA adapter; 'default' is"):
        to_lora(lora)


def test_output_that_exists_is_kept_unless_overwritten(folder, tmp_path):
    output = tmp_path / "lora"
    to_lora(folder, output)
    (output / "mine.txt").write_text("kept until then")
    with pytest.raises(ValueError, match=r"`output` must not exist; got .* add --overwrite"):
        to_lora(folder, output)
    assert (output / "mine.txt").exists()
    to_lora(folder, output, overwrite=True, max_rank=2)
    assert not (output / "mine.txt").exists()
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "lora"]


def test_only_adapters_are_overwritten_and_never_the_input(folder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(ValueError, match=r"`output` must hold adapter_config.json or .*; '.*photos' does not"):
        to_lora(folder, tmp_path / "photos", overwrite=True)
    for output in (folder, tmp_path):
        with pytest.raises(ValueError, match="`output` must not hold what is read"):
            to_lora(folder, output, overwrite=True)
    assert to_lora(folder, folder / "lora").path == folder / "lora"


def test_a_failing_write_leaves_what_was_there(folder, tmp_path, monkeypatch):
    to_lora(folder, tmp_path / "lora")
    before = (tmp_path / "lora/adapter_model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gralora.files.adapter_folder.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        to_lora(folder, tmp_path / "lora", overwrite=True, max_rank=2)
    assert (tmp_path / "lora/adapter_model.safetensors").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "lora"]


def test_a_move_that_fails_puts_the_old_one_back(folder, tmp_path, monkeypatch):
    to_lora(folder, tmp_path / "lora")

    def fail(*args):
        raise OSError("moving failed")

    monkeypatch.setattr("gralora.files.atomic.os.replace", fail)
    with pytest.raises(OSError, match="moving failed"):
        to_lora(folder, tmp_path / "lora", overwrite=True, max_rank=2)
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["r"] == 16


# Engines.


def test_vllm_takes_the_next_of_its_ranks():
    ranks = {1: 8, 8: 8, 9: 16, 64: 64, 129: 256, 257: 320, 321: 512, 512: 512, 513: None}
    assert {rank: vllm_max_lora_rank(rank) for rank in ranks} == ranks


def test_a_rank_that_vllm_cannot_serve_is_said():
    assert rank_warning(k=8, r=64) is None
    assert rank_warning(k=8, r=64, hybrid_r=1).startswith("The rank k·r + hybrid_r = 513 can't be served by vLLM")
    message = rank_warning(k=8, r=128)
    assert "k·r = 1024" in message
    assert "--max-rank 512" in message
    assert "gralora merge" in message


def test_serve_commands():
    vllm, sglang = engines_for(68, "org/base", "mine", "out folder")
    assert vllm.command == "vllm serve org/base --enable-lora --lora-modules 'mine=out folder' --max-lora-rank 128"
    assert sglang.command == (
        "python -m sglang.launch_server --model-path org/base --enable-lora --lora-paths 'mine=out folder' "
        "--max-lora-rank 68"
    )
    vllm, sglang = engines_for(1024, "org/base", "mine", "out")
    assert vllm.command is None
    assert vllm.reason == "rank 1024 is above its highest --max-lora-rank, 512"
    assert sglang.command


# diffusers.


def tiny_unet():
    import diffusers

    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


@torch.no_grad()
def denoise(unet):
    torch.manual_seed(1)
    return unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 16)).sample


@pytest.mark.parametrize("as_peft_model", [True, False])
def test_diffusers_loads_the_export(as_peft_model, tmp_path):
    config = GraloraConfig(r=8, hybrid_r=1, gralora_k=2, alpha=7, target_modules=["to_q", "to_v", "to_out.0"])
    unet = tiny_unet()
    base = denoise(unet)
    if as_peft_model:
        unet = get_peft_model(unet, config)
        randomise(unet, 0.3).save_pretrained(tmp_path / "adapter")
    else:
        unet.add_adapter(config)
        state = get_peft_model_state_dict(randomise(unet, 0.3))
        (tmp_path / "adapter").mkdir()
        save_file(state, tmp_path / "adapter/adapter_model.safetensors")
        config.save_pretrained(tmp_path / "adapter")
    expected = denoise(unet)
    export = to_diffusers(tmp_path / "adapter", tmp_path / "out", LoraOptions())
    keys = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    assert all(key.startswith("unet.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    assert max(layer.measured.relative for layer in export.layers) < 1e-6
    fresh = tiny_unet()
    fresh.load_lora_adapter(str(tmp_path / "out"), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(denoise(fresh), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, base, atol=1e-3)


def test_the_component_is_in_the_keys(folder, tmp_path):
    to_diffusers(folder, tmp_path / "a", LoraOptions())
    to_diffusers(folder, tmp_path / "b", LoraOptions(), component="text_encoder")
    for name, component in (("a", "transformer."), ("b", "text_encoder.")):
        keys = load_file(tmp_path / name / "pytorch_lora_weights.safetensors")
        assert all(key.startswith(component) for key in keys)
    with pytest.raises(ValueError, match=r"`component` must be one of unet, transformer, .*; got component='vae'"):
        to_diffusers(folder, tmp_path / "c", LoraOptions(), component="vae")


# The ways in.


def lora(make=tiny_llama, **settings):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LLAMA} | settings
    model = get_any_peft_model(make(), LoraConfig(**settings))
    return randomise(model).eval()


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_llama, {}),
        (tiny_llama, {"use_rslora": True}),
        (tiny_llama, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        (tiny_gpt2, {"target_modules": CONV1D, "fan_in_fan_out": True, "bias": "lora_only"}),
        (tiny_llama, {"modules_to_save": ["lm_head"]}),
    ],
    ids=["plain", "rslora", "patterns", "conv1d with biases", "modules"],
)
def test_a_lora_becomes_a_gralora_of_the_same_map(make, settings, k, tmp_path, recwarn):
    model = lora(make, **settings)
    model.save_pretrained(tmp_path / "lora")
    adapter = from_lora(tmp_path / "lora", tmp_path / "gralora", k=k)
    assert (adapter.config["r"], adapter.config["hybrid_r"], adapter.config["gralora_k"]) == (4 * k, 0, k)
    loaded = PeftModel.from_pretrained(make(), tmp_path / "gralora").eval()
    assert any(isinstance(module, GraloraLayer) for module in loaded.modules())
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=1e-6)


def test_every_block_holds_the_loras_factors():
    model = lora()
    tensors = get_peft_model_state_dict(model)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    lora_a, lora_b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    ours = from_lora(model, k=2).tensors
    A, B = ours[f"{name}.gralora_A"], ours[f"{name}.gralora_B"]
    for i in range(2):
        for j in range(2):
            assert torch.equal(A[j][:, i * 4 : i * 4 + 4], lora_a[:, j * 16 : j * 16 + 16].T)
            assert torch.equal(B[i][j * 4 : j * 4 + 4], lora_b[i * 16 : i * 16 + 16].T)


def test_a_lora_becomes_the_hybrid_part(tmp_path):
    model = lora()
    adapter = from_lora(model, tmp_path / "gralora", k=4, hybrid=True, r=8)
    assert (adapter.config["r"], adapter.config["hybrid_r"]) == (8, 4)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "gralora", is_trainable=True).eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=1e-6)
    loaded(TOKENS, labels=TOKENS).loss.backward()
    layer = next(m for m in loaded.modules() if isinstance(m, GraloraLayer))
    assert layer.gralora_A["default"].any()
    assert not layer.gralora_B["default"].any()
    assert layer.gralora_B["default"].grad.any()


def test_out_and_in_again_is_the_same_map(folder, tmp_path):
    to_lora(folder, tmp_path / "lora")
    from_lora(tmp_path / "lora", tmp_path / "again", k=2)
    models = [PeftModel.from_pretrained(tiny_llama(), path).eval() for path in (folder, tmp_path / "again")]
    torch.testing.assert_close(logits(models[0]), logits(models[1]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"use_dora": True}, {}, "`use_dora` must not be used in a LoRA to be converted; got use_dora=True"),
        (
            {},
            {"k": 5},
            r"`k` must divide in_features=48 and out_features=32 at 'model.layers.0.mlp.down_proj'; got k=5",
        ),
        ({}, {"k": 0}, "`k` must be a positive integer; got k=0"),
        ({}, {"r": 4}, "`r` must come with `hybrid`"),
        ({}, {"hybrid": True, "r": 3}, "`gralora_k` must divide `r`; got gralora_k=2 with r=3"),
        ({"rank_pattern": {"q_proj": 2}}, {"hybrid": True}, "`hybrid` must be off for a LoRA with `rank_pattern`"),
        ({"target_modules": ["embed_tokens"]}, {}, "must adapt linear layers alone; got .*lora_embedding_A"),
    ],
)
def test_a_lora_that_cannot_be_converted_is_refused(settings, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_lora(lora(**settings), tmp_path / "out", **arguments)
    assert not any(tmp_path.iterdir())


def test_a_damaged_lora_is_refused(tmp_path, folder):
    lora().save_pretrained(tmp_path / "lora")
    file = tmp_path / "lora/adapter_model.safetensors"
    whole = load_file(file)
    key = next(key for key in whole if "lora_A" in key)
    for change, message in (
        ({key: whole[key][:3].contiguous()}, "must have matrices of one rank"),
        ({key: whole[key] * math.nan}, "must be finite; it holds nan or inf"),
    ):
        save_file(whole | change, file)
        with pytest.raises(ValueError, match=message):
            from_lora(tmp_path / "lora")
    save_file({name: tensor for name, tensor in whole.items() if name != key}, file)
    with pytest.raises(ValueError, match="must hold `lora_A` and `lora_B` of every adapted module"):
        from_lora(tmp_path / "lora")
    wrong = {n: torch.cat([t, t], 0 if "lora_A" in n else 1) for n, t in whole.items()}
    save_file(wrong, file)
    with pytest.raises(ValueError, match="must be of rank 4, as its config says; got 8"):
        from_lora(tmp_path / "lora")
    with pytest.raises(ValueError, match="must hold a LoRA adapter; its config says peft_type='GRALORA'"):
        from_lora(folder)


# The authors' own repository.


class AuthorsLinear(nn.Module):
    """The forward pass of the authors' `Linear`, after its published text: `r` includes `hybrid_r`."""

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


@pytest.fixture
def original(tmp_path):
    """A folder as the authors' fork of PEFT writes it, and the model that it came from."""
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
    folder = tmp_path / "original"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, model


def test_an_adapter_of_the_authors_repository_is_imported(original, tmp_path):
    folder, model = original
    imported = import_original(folder, tmp_path / "ours")
    config = imported.config
    assert [config[name] for name in ("r", "hybrid_r", "alpha", "gralora_k")] == [6, 2, 20, 3]
    torch.manual_seed(0)
    base = MLP()
    for name in ("up", "down"):
        getattr(base, name).load_state_dict(getattr(model, name).base.state_dict())
    loaded = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(loaded(x), model(x), atol=1e-5, rtol=1e-5)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_importing_what_is_not_the_authors_is_refused(original, folder, tmp_path):
    with pytest.raises(ValueError, match="must be an adapter of the authors' repository, with `gralora_alpha`"):
        import_original(folder)
    source, _ = original
    with pytest.raises(ValueError, match=r"was written by the authors' repository. .*: gralora import .* OUT"):
        to_lora(source)
    config = source / "adapter_config.json"
    config.write_text(config.read_text().replace('"hybrid_r": 2', '"hybrid_r": 8'))
    with pytest.raises(ValueError, match="`r` must be above `hybrid_r`, which it includes; got r=8 with hybrid_r=8"):
        import_original(source, tmp_path / "out")
    config.write_text(config.read_text().replace('"hybrid_r": 8', '"hybrid_r": 5'))
    with pytest.raises(ValueError, match=r"original.*`gralora_A_general.weight` must fit|`gralora_A` must fit"):
        import_original(source, tmp_path / "out")
    shutil.rmtree(source)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        import_original(source)


# The command line.


def run(capsys, *arguments):
    from gralora.cli import main

    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def test_export_says_what_it_did_and_how_to_serve_it(folder, tmp_path, capsys):
    code, out, _ = run(capsys, "export", folder, tmp_path / "lora", "--base", "org/base", "--name", "mine")
    assert code == 0
    assert "read back: largest difference 0.00e+00, at model.layers." in out
    assert f"vllm serve org/base --enable-lora --lora-modules mine={tmp_path}/lora --max-lora-rank 16" in out
    assert "sglang.launch_server --model-path org/base" in out
    assert "llama-server -m BASE.gguf --lora OUT.gguf" in out
    assert open_lora_rank(tmp_path / "lora") == 16


def open_lora_rank(path):
    return json.loads((path / "adapter_config.json").read_text())["r"]


def test_export_prints_what_compression_costs(folder, tmp_path, capsys):
    code, out, _ = run(capsys, "export", folder, tmp_path / "lora", "--max-rank", 4)
    assert code == 0
    assert sum("rank 16 -> 4  relative error" in line for line in out.splitlines()) == 6
    assert "compressed: relative error" in out


def test_export_says_where_a_rank_is_too_high(tmp_path, capsys):
    model = adapted(lambda: tiny_llama(num_hidden_layers=1), r=264, gralora_k=2, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    code, out, _ = run(capsys, "export", tmp_path / "adapter", tmp_path / "lora")
    assert code == 0
    assert "vLLM       can not serve it: rank 528 is above its highest --max-lora-rank, 512" in out
    assert "ways out: --max-rank 512 compresses the adapter; `gralora merge` folds it into the model." in out


def test_export_writes_diffusers_and_peft(folder, tmp_path, capsys):
    assert run(capsys, "export", folder, tmp_path / "d", "--format", "diffusers")[0] == 0
    assert (tmp_path / "d/pytorch_lora_weights.safetensors").is_file()
    assert run(capsys, "export", folder, tmp_path / "p", "--for", "peft", "--dtype", "bfloat16")[0] == 0
    assert open_lora_rank(tmp_path / "p") == 16


@pytest.mark.parametrize("how", ["truncated", "a bit of the header flipped", "config truncated", "lora", "no config"])
def test_a_damaged_adapter_ends_with_one_line_and_status_2(how, folder, tmp_path, capsys):
    damage(folder, how)
    code, out, err = run(capsys, "export", folder, tmp_path / "lora")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx"], "`format` must be lora, gguf or diffusers; got format='onnx'."),
        (["--dtype", "int8"], "`dtype` must be float32, bfloat16 or float16; got dtype='int8'."),
        (["--format", "gguf", "--for", "peft"], "`for` must be serving with --format gguf; got for='peft'."),
        (["--for", "ollama"], "`target` must be 'serving' or 'peft'; got target='ollama'."),
    ],
)
def test_bad_options_end_with_status_2(arguments, message, folder, tmp_path, capsys):
    code, _, err = run(capsys, "export", folder, tmp_path / "out.gguf", *arguments)
    assert (code, err) == (2, f"error: {message}\n")


def test_import_takes_loras_and_the_authors_adapters(original, tmp_path, capsys):
    lora().save_pretrained(tmp_path / "lora")
    code, out, _ = run(capsys, "import", tmp_path / "lora", tmp_path / "a", "--k", 4)
    assert (code, out) == (0, f"wrote {tmp_path}/a: GraLoRA with r=16, hybrid_r=0, k=4, alpha=24\n")
    code, out, _ = run(capsys, "import", tmp_path / "lora", tmp_path / "b", "--hybrid", "--r", 8)
    assert (code, out) == (0, f"wrote {tmp_path}/b: GraLoRA with r=8, hybrid_r=4, k=2, alpha=18\n")
    code, out, _ = run(capsys, "import", original[0], tmp_path / "c")
    assert (code, out) == (0, f"wrote {tmp_path}/c: GraLoRA with r=6, hybrid_r=2, k=3, alpha=20\n")
    code, _, err = run(capsys, "import", tmp_path / "a", tmp_path / "d")
    assert code == 2
    assert "must be an adapter of the authors' repository" in err

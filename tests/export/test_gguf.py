"""An exported adapter in llama.cpp itself: the tuned answers, and the log-probabilities of transformers."""

import gc
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import randomise, tiny_llama
from mixtures import save_mixture_and_adapter
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gralora import GraloraConfig, get_peft_model, pretrained
from gralora.export import LoraOptions, to_gguf
from gralora.export.gguf import find_converter
from gralora.recipe.data import encode, encode_prompt, parse_rows
from gralora.recipe.tasks import support_rows

STEPS, BATCH = 24, 8

SPEAK = """
import json, sys
import xllamacpp as llama

model, adapter, prompts, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
params = llama.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = model, 256, 1, False, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.lora_adapters = [llama.CommonAdapterLoraInfo(adapter, 1.0)]
server = llama.Server(params)
answers = []
for prompt in prompts:
    for scale in (1.0, 0.0):
        answer = server.handle_completions({
            "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "n_probs": 20, "cache_prompt": False,
            "lora": [{"id": 0, "scale": scale}],
        })["choices"][0]
        top = answer["logprobs"]["content"][0]["top_logprobs"]
        answers.append({"text": answer["text"], "logprobs": {entry["id"]: entry["logprob"] for entry in top}})
print(json.dumps(answers))
"""


def speak(model, adapter, prompts, tokens):
    """What llama.cpp says with the adapter and without, in a process of its own: it brings its own threads."""
    command = [sys.executable, "-c", SPEAK, str(model), str(adapter), json.dumps(prompts), str(tokens)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    answers = json.loads(result.stdout.splitlines()[-1])
    return answers[::2], answers[1::2]


def write_base_gguf(folder, file):
    script = find_converter().with_name("convert_hf_to_gguf.py")
    arguments = [str(folder), "--outfile", str(file), "--outtype", "f32"]
    subprocess.run([sys.executable, str(script), *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """SmolLM2 tuned on the packaged task: the adapter's folder, held-out rows, and what transformers expects next."""
    torch.manual_seed(0)
    model, tokenizer = pretrained.load(dtype="bfloat16")
    model = get_peft_model(model, GraloraConfig(r=32, hybrid_r=4, gralora_k=2, alpha=72, target_modules="all-linear"))
    rows = [(f"row {i}", row) for i, row in enumerate(support_rows("train")[: STEPS * BATCH])]
    encoded = encode(parse_rows(rows, "task"), tokenizer, 256, "task")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS, pct_start=0.1)
    for step in range(STEPS):
        model(**_padded(encoded, range(step * BATCH, (step + 1) * BATCH))).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    adapter = tmp_path_factory.mktemp("tuned") / "adapter"
    model.peft_config["default"].base_model_name_or_path = pretrained.DEFAULT_MODEL
    model.save_pretrained(adapter, save_embedding_layers=False)
    del model, optimizer
    gc.collect()
    exact = PeftModel.from_pretrained(pretrained.load(dtype="float32")[0], adapter)
    held_out = support_rows("eval")[:8]
    prompts = [encode_prompt([{"role": "user", "content": row["prompt"]}], False, tokenizer) for row in held_out]
    with torch.no_grad():
        asked = torch.tensor([prompts[0]])
        expected = exact(asked).logits[0, -1].log_softmax(-1)
        with exact.disable_adapter():
            base = exact(asked).logits[0, -1].log_softmax(-1)
    return {"adapter": adapter, "prompts": prompts, "rows": held_out, "expected": expected, "base": base}


def _padded(encoded, chosen):
    rows = [(encoded.input_ids[i], encoded.labels[i]) for i in chosen]
    longest = max(len(tokens) for tokens, _ in rows)
    return {
        "input_ids": torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
    }


@pytest.fixture(scope="module")
def gguf_adapter(tuned):
    output = tuned["adapter"].with_name("adapter.gguf")
    export = to_gguf(tuned["adapter"], output, LoraOptions())
    assert export.rank == 68
    return output


def test_llama_cpp_gives_the_tuned_answers(tuned, gguf_adapter):
    with_adapter, without = speak(pretrained._default_gguf(), gguf_adapter, tuned["prompts"], 48)
    wanted = [row["completion"] for row in tuned["rows"]]
    right = sum(answer["text"].strip() == completion for answer, completion in zip(with_adapter, wanted, strict=True))
    assert right >= 6
    assert not any(answer["text"].strip() == completion for answer, completion in zip(without, wanted, strict=True))


def test_llama_cpp_gives_the_log_probabilities_of_transformers(tuned, gguf_adapter, tmp_path):
    # float32, since llama.cpp rounds activations for quantised weights.
    base = tmp_path / "base.gguf"
    write_base_gguf(pretrained.resolve(pretrained.DEFAULT_MODEL, torch.float32).location, base)
    (with_adapter,), (without,) = speak(base, gguf_adapter, tuned["prompts"][:1], 1)
    base.unlink()
    for spoken, expected in ((with_adapter, tuned["expected"]), (without, tuned["base"])):
        # The tail of a confident answer is noise: compare where there is probability.
        likely = {int(token): value for token, value in spoken["logprobs"].items() if value > -12}
        assert likely
        for token, value in likely.items():
            assert value == pytest.approx(float(expected[token]), abs=5e-4)
    assert (tuned["expected"] - tuned["base"]).abs().max() > 1


def small_llama(**sizes):
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48))


def small_mixtral(**sizes):
    return MixtralForCausalLM(MixtralConfig(**sizes, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2))


def small_qwen(**sizes):
    config = Qwen3MoeConfig(
        **sizes, head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True
    )
    return Qwen3MoeForCausalLM(config)


STACKS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.filterwarnings("ignore:This adapter uses `")
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (small_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
        (small_mixtral, {"target_modules": ["q_proj"], "target_parameters": STACKS}),
        (small_qwen, {"target_modules": [], "target_parameters": [*STACKS, "gate.weight"]}),
    ],
    ids=["embedding", "mixtral", "qwen"],
)
def test_llama_cpp_adapts_embeddings_and_experts(make, targets, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(pretrained.resolve(pretrained.DEFAULT_MODEL, torch.float32).location)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = make(**sizes, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tuned = randomise(get_peft_model(model, GraloraConfig(r=4, hybrid_r=2, **targets)), 0.3)
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    to_gguf(tmp_path / "adapter", tmp_path / "adapter.gguf", LoraOptions())
    write_base_gguf(tmp_path / "base", tmp_path / "base.gguf")
    ids = tokenizer("a parcel that never came")["input_ids"]
    (with_adapter,), (without,) = speak(tmp_path / "base.gguf", tmp_path / "adapter.gguf", [ids], 1)
    with torch.no_grad():
        expected = tuned(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        with tuned.disable_adapter():
            base = tuned(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    for spoken, wanted in ((with_adapter, expected), (without, base)):
        for token, value in spoken["logprobs"].items():
            assert value == pytest.approx(float(wanted[int(token)]), abs=5e-4)
    assert (expected - base).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:(This adapter uses|Model has) `")
def test_an_embedding_that_is_the_output_layer_too_is_refused(tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, GraloraConfig(r=4, target_modules=["embed_tokens"]))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"'model.embed_tokens' cannot be exported to GGUF: the base model's output l"):
        to_gguf(tmp_path / "adapter", tmp_path / "out.gguf", LoraOptions(), base=str(tmp_path / "base"))
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.filterwarnings("ignore:This adapter uses `")
@pytest.mark.parametrize("name", ["gpt_oss", "llama4"])
def test_experts_that_the_converter_does_not_know_are_refused(name, tmp_path):
    save_mixture_and_adapter(tmp_path, name)
    with pytest.raises((RuntimeError, ValueError), match=r"gralora merge|converter failed, nothing was"):
        to_gguf(tmp_path / "adapter", tmp_path / "out.gguf", LoraOptions())
    assert not (tmp_path / "out.gguf").exists()


@pytest.fixture
def tiny(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(base, GraloraConfig(r=8, gralora_k=2, target_modules=["q_proj", "up_proj"])))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_file_holds_the_factors(tiny, tmp_path):
    import gguf

    from gralora.export import to_lora

    export = to_gguf(tiny, tmp_path / "out.gguf", LoraOptions(), llama_cpp=find_converter().parent)
    assert export.path == tmp_path / "out.gguf"
    assert export.worst.measured.largest == 0
    lora = to_lora(tiny)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(tensors) == 2 * 4
    up = "base_model.model.model.layers.1.mlp.up_proj"
    assert torch.equal(tensors["blk.1.ffn_up.weight.lora_a"], lora.tensors[f"{up}.lora_A.weight"])
    assert torch.equal(tensors["blk.1.ffn_up.weight.lora_b"], lora.tensors[f"{up}.lora_B.weight"])
    assert float(reader.fields["adapter.lora.alpha"].parts[-1][0]) == lora.config["lora_alpha"]


def test_the_dtype_reaches_the_converter(tiny, tmp_path, monkeypatch):
    def stop(converter, arguments):
        raise RuntimeError(" ".join(arguments))

    monkeypatch.setattr("gralora.export.gguf._run", stop)
    for dtype, name in ((None, "f32"), (torch.bfloat16, "bf16"), (torch.float16, "f16")):
        with pytest.raises(RuntimeError, match=f"--base .*base --outtype {name} --outfile .*out.gguf .*lora$"):
            to_gguf(tiny, tmp_path / "out.gguf", LoraOptions(dtype=dtype))


def test_the_base_is_found_from_another_folder(tiny, tmp_path, monkeypatch):
    def stop(converter, arguments):
        raise RuntimeError(" ".join(arguments))

    config = tiny / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"{tmp_path / "base"}"', '"base"'))
    monkeypatch.setattr("gralora.export.gguf._run", stop)
    monkeypatch.chdir(tiny)
    with pytest.raises(RuntimeError, match=f"--base {tmp_path / 'base'} --outtype"):
        to_gguf(tiny, tmp_path / "out.gguf", LoraOptions())


def test_refusals(tiny, tmp_path):
    cases = [
        ({"output": tmp_path / "out"}, ValueError, r"`output` must end in \.gguf"),
        (
            {"llama_cpp": tmp_path},
            FileNotFoundError,
            "must be a checkout of llama.cpp; .* has no convert_lora_to_gguf.py",
        ),
        ({"base": str(tmp_path / "nowhere")}, FileNotFoundError, "there is no"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            to_gguf(**({"source": tiny, "output": tmp_path / "out.gguf", "options": LoraOptions()} | arguments))
    assert not (tmp_path / "out.gguf").exists()


def test_an_adapter_that_names_no_base_needs_one(tiny, tmp_path):
    config = tiny / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"{tmp_path / "base"}"', "null"))
    with pytest.raises(ValueError, match=r"`base` must be given: the adapter in .* names no base model\."):
        to_gguf(tiny, tmp_path / "out.gguf", LoraOptions())


def test_the_converters_last_words_are_told(tiny, tmp_path):
    (tmp_path / "base" / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with pytest.raises(RuntimeError, match=r"(?s)converter failed, nothing was written.*NoSuchModel"):
        to_gguf(tiny, tmp_path / "out.gguf", LoraOptions())
    assert [entry for entry in os.listdir(tmp_path) if "out" in entry] == []


def test_a_converter_that_drops_layers_is_caught(tiny, tmp_path):
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    real = find_converter()
    # The real converter, told of a folder in which a layer is missing.
    (checkout / real.name).write_text(
        "import subprocess, sys\n"
        "from pathlib import Path\n"
        "from safetensors.torch import load_file, save_file\n"
        "file = Path(sys.argv[-1]) / 'adapter_model.safetensors'\n"
        "tensors = load_file(file)\n"
        "save_file({k: v for k, v in tensors.items() if '.0.mlp' not in k}, file)\n"
        f"sys.exit(subprocess.run([sys.executable, {str(real)!r}, *sys.argv[1:]]).returncode)\n"
    )
    with pytest.raises(RuntimeError, match="wrote 3 of 4 adapted weights"):
        to_gguf(tiny, tmp_path / "out.gguf", LoraOptions(), llama_cpp=checkout)
    assert not (tmp_path / "out.gguf").exists()


def test_without_a_converter_the_message_has_the_command(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "gralora\[export\]", or name a checkout .* `llama_cpp`'):
        to_gguf(tiny, tmp_path / "out.gguf", LoraOptions())

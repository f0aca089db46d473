from gralora.export import rank_warning
from gralora.export.engines import gguf_engines, lora_engines, vllm_max_lora_rank


def test_vllm_takes_the_next_of_its_ranks():
    ranks = {1: 8, 8: 8, 9: 16, 64: 64, 129: 256, 257: 320, 321: 512, 512: 512, 513: None}
    assert {rank: vllm_max_lora_rank(rank) for rank in ranks} == ranks


def test_a_rank_that_vllm_cannot_serve_is_said():
    assert rank_warning(k=8, r=64) is None
    assert rank_warning(k=8, r=64, hybrid_r=1).startswith("The rank k·r + hybrid_r = 513 cannot be served by vLLM")
    message = rank_warning(k=8, r=128)
    assert "k·r = 1024" in message
    assert "--max-rank 512" in message
    assert "gralora merge" in message


def test_serve_commands():
    vllm, sglang, llama_cpp = lora_engines(68, "org/base", "mine", "out folder")
    assert vllm.command == "vllm serve org/base --enable-lora --lora-modules 'mine=out folder' --max-lora-rank 128"
    assert sglang.command == (
        "python -m sglang.launch_server --model-path org/base --enable-lora --lora-paths 'mine=out folder' "
        "--max-lora-rank 68"
    )
    vllm, sglang, llama_cpp = lora_engines(1024, "org/base", "mine", "out")
    assert vllm.command is None
    assert vllm.reason == "rank 1024 is above its highest --max-lora-rank, 512"
    assert sglang.command
    assert llama_cpp.command == "gralora export --format gguf, then llama-server -m BASE.gguf --lora OUT.gguf"
    assert gguf_engines(68, "org/base", "mine", "a b.gguf")[0].command == "llama-server -m BASE.gguf --lora 'a b.gguf'"


def test_experts_are_declared_to_vllm():
    kinds = {"linear layers", "experts"}
    stacked, sglang, llama_cpp = lora_engines(16, "org/base", "mine", "out", kinds)
    module = '{"name": "mine", "path": "out", "is_3d_lora_weight": true}'
    assert stacked.command == (
        f"vllm serve org/base --enable-lora --enable-mixed-moe-lora-format --lora-modules '{module}' --max-lora-rank 16"
    )
    assert "believes `is_3d_lora_weight` without looking at the file" in stacked.note
    assert (sglang.command, llama_cpp.reason) == (None, "")
    each, sglang, _ = lora_engines(16, "org/base", "mine", "out", kinds, "per-expert")
    assert '"is_3d_lora_weight": false' in each.command
    assert "--lora-strict-loading" in sglang.note
    unmarked, _, llama_cpp = lora_engines(16, "org/base", "mine", "out", {"transposed experts"})
    assert unmarked.reason == "these experts are stored transposed; `--experts per-expert` writes what it reads"
    assert llama_cpp.reason == "a GGUF adapter holds no transposed experts"


def test_programs_that_are_not_known_to_take_a_kind_say_so():
    vllm, sglang, llama_cpp = lora_engines(16, "org/base", "mine", "out", {"convolutions", "embeddings"})
    assert vllm.reason == sglang.reason == "it is not known to take adapters of convolutions and embeddings"
    assert llama_cpp.reason == "a GGUF adapter holds no convolutions"

"""Two processes that share a model: FSDP2, and DeepSpeed's ZeRO-3 out of a folder of its own."""

import shutil
import sys
from pathlib import Path

import pytest
from processes import run_two_processes

# The folder that the Makefile installs DeepSpeed into: where it is installed, accelerate and transformers import it.
DEEPSPEED = Path(sys.prefix) / "deepspeed"

SCRIPT = """
from torch.distributed.fsdp import fully_shard
from peft import PeftModel
from conftest import tiny_gpt2, tiny_llama
import gralora

way = arguments[0]
if way == "fsdp2 conv1d":
    base = tiny_gpt2()
    targets = ["c_attn", "c_proj", "c_fc"]
else:
    base = tiny_llama(tie_word_embeddings=way == "fsdp2 tied")
    targets = [f"{name}_proj" for name in [*"qkvo", "gate", "up", "down"]] + ["lm_head"]
config = gralora.GraloraConfig(r=8, hybrid_r=2, target_modules=targets, init_weights=False)
model = gralora.get_peft_model(base, config)
tokens = torch.arange(3, 13)[None]
expected = model(tokens).logits.detach()
alone = copy.deepcopy(model)
alone.merge_adapter()
merged_alone = {name: p.detach().clone() for name, p in alone.named_parameters() if "base_layer" in name}
start = {name: p.detach().clone() for name, p in model.named_parameters()}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def named(model):
    return {name: whole(p) for name, p in model.named_parameters()}


def same(parameters, wanted):
    assert wanted.keys() <= parameters.keys()
    return all(torch.equal(parameters[name], wanted[name]) for name in wanted)


def cycle(model):
    model.merge_adapter()
    assert same(named(model), merged_alone)
    model.unmerge_adapter()
    assert same(named(model), start)


if way.startswith("fsdp2"):
    blocks = model.base_model.model.transformer.h if "conv1d" in way else model.base_model.model.model.layers
    for block in blocks:
        fully_shard(block)
    forward = fully_shard(model)
    if way == "fsdp2 tied":
        refused(model.merge_adapter, "its base weight is sharded and tied to another one")
        sys.exit()
    cycle(model)
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(forward(tokens).logits, alone(tokens).logits, atol=1e-5, rtol=1e-5)
    model.reshard()
    model.unmerge_adapter()
    assert same(named(model), start)
    with torch.no_grad():
        forward(tokens)  # leaves the parameters outside of the blocks gathered
    if "conv1d" not in way:
        refused(model.merge_adapter, "its base weight is gathered for a forward pass")
    model.reshard()
    cycle(model)
    broken = next(m for m in model.modules() if isinstance(m, gralora.GraloraLayer)).gralora_B["default"]
    kept = broken.to_local().detach().clone()
    with torch.no_grad():
        broken.to_local()[:] = float("inf") if dist.get_rank() == 1 else broken.to_local()
    refused(model.merge_adapter, "no layer was merged", safe_merge=True)
    with torch.no_grad():
        broken.to_local()[:] = kept
    assert same(named(model), start)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    backward, step = torch.Tensor.backward, optimizer.step
else:
    import deepspeed

    forward, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    refused(model.merge_adapter, "only a shard of its base weight is here")
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        cycle(model)
    backward, step = forward.backward, forward.step

torch.testing.assert_close(forward(tokens).logits, expected, atol=1e-5, rtol=1e-5)
losses = []
for _ in range(3):
    loss = forward(tokens, labels=tokens).loss
    backward(loss)
    step()
    if way != "zero3":
        optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses

# Every process comes to `save_pretrained`, which gathers the shards.
trained = forward(tokens).logits.detach()
model.save_pretrained(f"{folder}/adapter", is_main_process=rank == 0)
dist.barrier()
again = PeftModel.from_pretrained(tiny_gpt2() if "conv1d" in way else tiny_llama(), f"{folder}/adapter")
torch.testing.assert_close(again(tokens).logits, trained, atol=2e-4, rtol=2e-4)
dist.barrier()
dist.destroy_process_group()
"""


NEEDS_A_COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("ninja")), reason="DeepSpeed compiles what it sends with on a CPU"
)


@pytest.mark.parametrize("way", ["fsdp2", "fsdp2 conv1d", "fsdp2 tied", pytest.param("zero3", marks=NEEDS_A_COMPILER)])
def test_a_sharded_model_trains_merges_and_saves(way, tmp_path):
    run_two_processes(SCRIPT, tmp_path, way, paths=[DEEPSPEED] if way == "zero3" else [])

"""Two processes that share a model: FSDP in both kinds, and DeepSpeed's ZeRO-3 out of a folder of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# The folder that the Makefile installs DeepSpeed into: where it is installed, accelerate and transformers import it.
DEEPSPEED = Path(sys.prefix) / "deepspeed"

SCRIPT = """
import copy
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from peft.utils.other import fsdp_auto_wrap_policy
from conftest import tiny_gpt2, tiny_llama
import gralora

way = sys.argv[1]
torch.set_num_threads(1)
os.environ["LOCAL_RANK"] = os.environ["RANK"]
dist.init_process_group("gloo")
if way == "fsdp2 conv1d":
    base = tiny_gpt2()
    targets = ["c_attn", "c_proj", "c_fc"]
else:
    base = tiny_llama(tie_word_embeddings=way == "fsdp2 tied")
    targets = [f"{name}_proj" for name in [*"qkvo", "gate", "up", "down"]] + ["lm_head"]
config = gralora.GraloraConfig(r=8, target_modules=targets, init_weights=False)
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
    return {name.replace("_fsdp_wrapped_module.", ""): whole(p) for name, p in model.named_parameters()}


def same(parameters, wanted):
    assert wanted.keys() <= parameters.keys()
    return all(torch.equal(parameters[name], wanted[name]) for name in wanted)


def refused(action, reason, **arguments):
    try:
        action(**arguments)
    except (RuntimeError, ValueError) as error:
        assert reason in str(error), error
    else:
        raise AssertionError("done where it should have been refused")


def cycle(model):
    model.merge_adapter()
    assert same(named(model), merged_alone)
    model.unmerge_adapter()
    assert same(named(model), start)


if way == "fsdp1":
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer"
    policy = fsdp_auto_wrap_policy(model)  # what transformers' Trainer takes for any PEFT model
    cpu = torch.device("cpu")
    forward = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
    refused(model.merge_adapter, "only a shard of its base weight is here")
    with FullyShardedDataParallel.summon_full_params(forward):
        cycle(model)
    optimizer = torch.optim.AdamW([p for p in forward.parameters() if p.requires_grad], lr=1e-2)
    backward, step = torch.Tensor.backward, optimizer.step
elif way.startswith("fsdp2"):
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
dist.barrier()
dist.destroy_process_group()
"""


NEEDS_A_COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("ninja")), reason="DeepSpeed compiles what it sends with on a CPU"
)


@pytest.mark.parametrize(
    "way", ["fsdp1", "fsdp2", "fsdp2 conv1d", "fsdp2 tied", pytest.param("zero3", marks=NEEDS_A_COMPILER)]
)
def test_a_sharded_model_trains_merges_and_unmerges(way, tmp_path):
    here = Path(__file__).parent
    paths = [str(here), *([str(DEEPSPEED)] if way == "zero3" else []), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "DS_ACCELERATOR": "cpu"}
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launch, tmp_path / "script.py", way],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]

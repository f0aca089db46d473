"""Tensor parallelism of transformers: two processes do what one does."""

import pickle

import pytest
from processes import run_two_processes
from torch import nn

from gralora.tuner.kinds import kind_for
from gralora.tuner.tensor_parallel import Layout, _by_block, parallel, placement_of

SCRIPT = """
import gralora
from conftest import randomise, tiny_llama
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

COLUMNS, ROWS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj", "down_proj"]
TOKENS = torch.arange(3, 13).repeat(2, 1) + torch.tensor([[0], [7]])
if rank == 0:
    tiny_llama(num_hidden_layers=1).save_pretrained(f"{folder}/base")
dist.barrier()


def base(parallel=True, plan="auto", dtype=torch.float64):
    parallelism = {"distributed_config": DistributedConfig(tp_size=2, tp_plan=plan)} if parallel else {}
    return AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=dtype, **parallelism)


def adapted(model, **changes):
    settings = {"r": 8, "target_modules": COLUMNS + ROWS, "init_weights": False}
    torch.manual_seed(rank)  # a start of its own in each process, as where nobody has seeded
    return gralora.get_peft_model(model, gralora.GraloraConfig(**(settings | changes)))


def adapter(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "gralora_" in name}


def assert_same_everywhere(model):
    for name, parameter in adapter(model).items():
        first = parameter.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, parameter), name


def in_one_process(model, dtype=torch.float64, **changes):
    one = adapted(base(parallel=False, dtype=dtype), **changes)
    one.load_state_dict(adapter(model), strict=False)
    return one


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def bits(model):
    return {name: p.to_local().clone() if hasattr(p, "to_local") else p.clone() for name, p in model.named_parameters()}


# Columns, rows, a layer whose output is gathered, and one that is not sliced; blocks smaller and as large as a slice.
for settings in (
    {"gralora_k": 2, "target_modules": [*COLUMNS, "lm_head"]},
    {"gralora_k": 4, "hybrid_r": 2, "target_modules": ROWS},
    {"gralora_k": 4, "hybrid_r": 2, "use_reentrant": True},
    {"gralora_k": 2, "hybrid_r": 2, "use_reentrant": False},
):
    use_reentrant = settings.pop("use_reentrant", None)
    model = adapted(base(), **settings)
    assert_same_everywhere(model)
    torch.manual_seed(1)
    randomise(model)
    one, start = in_one_process(model, **settings), adapter(model)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    close(model(TOKENS).logits, one(TOKENS).logits)
    losses, expected = (train(m.train(), TOKENS, steps=2) for m in (model, one))
    close(torch.tensor(losses), torch.tensor(expected))
    assert_same_everywhere(model)
    for name, parameter in adapter(one).items():
        assert not torch.equal(start[name], parameter)
        close(adapter(model)[name], parameter)

# The last of them is saved whole, and read by one process and by two.
model.eval()
one.eval()
model.save_pretrained(f"{folder}/adapter", is_main_process=rank == 0)
dist.barrier()
alone = PeftModel.from_pretrained(base(parallel=False), f"{folder}/adapter")
again = PeftModel.from_pretrained(base(), f"{folder}/adapter")
for name, parameter in adapter(model).items():
    assert torch.equal(adapter(alone)[name], parameter) and torch.equal(adapter(again)[name], parameter)
loaded = base()
loaded.load_adapter(f"{folder}/adapter")
expected = one(TOKENS).logits
for m in (alone, again, loaded):
    close(m(TOKENS).logits, expected)
greedy = {"max_new_tokens": 8, "do_sample": False}
wanted = one.generate(TOKENS, **greedy)
assert all(torch.equal(m.generate(TOKENS, **greedy), wanted) for m in (again, alone))
alone.merge_adapter()
before = bits(again)
again.merge_adapter()
close(again(TOKENS).logits, expected)
for name, parameter in again.named_parameters():
    if name.endswith("base_layer.weight"):
        close(parameter.full_tensor(), alone.get_parameter(name))
again.unmerge_adapter()
after = bits(again)
assert all(torch.equal(before[name], after[name]) for name in before)
close(again.merge_and_unload()(TOKENS).logits, expected)

# bfloat16: no further from float64 than one process is.
model = adapted(base(dtype=torch.bfloat16), gralora_k=4, hybrid_r=2)
torch.manual_seed(1)
randomise(model)
one = in_one_process(model, torch.bfloat16, gralora_k=4, hybrid_r=2)
exact = copy.deepcopy(one).double()
gradients = {}
for name, m in {"parallel": model, "one": one, "exact": exact}.items():
    m(TOKENS, labels=TOKENS).loss.backward()
    gradients[name] = torch.cat([p.grad.flatten().double() for n, p in m.named_parameters() if "gralora_" in n])
error, usual = ((gradients[name] - gradients["exact"]).norm() for name in ("parallel", "one"))
assert error < 1.5 * usual, (error, usual)

# Second derivatives of the adapter's part: the base's own are wrong in transformers.
from gralora.tuner.blocks import Factors, apply
from gralora.tuner.tensor_parallel import _own, in_slice_update, out_slice_update

mesh = dist.init_device_mesh("cpu", (2,))
torch.manual_seed(2)
leaves = [torch.randn(*shape, dtype=torch.float64) for shape in ((5, 8), (2, 4, 4), (2, 4, 6), (3, 8), (12, 3))]
rows, columns = _own(12, mesh), _own(8, mesh)


def penalty(update):
    x, *factors = (leaf.clone().requires_grad_() for leaf in leaves)
    first = torch.autograd.grad((update(x, Factors(*factors)) ** 3).sum(), factors, create_graph=True)
    return torch.autograd.grad(sum((g**2).sum() for g in first), factors)


exact = penalty(lambda x, factors: apply(x, factors, 1.0))
for update in (
    lambda x, factors: in_slice_update(x[:, columns.start : columns.stop], factors, columns, mesh),
    lambda x, factors: out_slice_update(x, factors, rows, mesh),
):
    for ours, wanted in zip(penalty(update), exact):
        close(ours, wanted)

# Dropout: one mask for an input that both processes hold, so that they still agree.
model = adapted(base(), gralora_dropout=0.5).train()
torch.manual_seed(rank)
train(model, TOKENS, steps=2)
assert_same_everywhere(model)
outputs = model(TOKENS).logits.detach()
other = outputs.clone()
dist.broadcast(other, 0)
assert torch.equal(outputs, other)

# What an adapter can't follow is refused, and the model is as it was.
model = base(plan={"model.layers.*.mlp.gate_proj": "packed_colwise", "model.layers.*.mlp.up_proj": "packed_colwise"})
refused(lambda: adapted(model), "must be one of 'colwise', 'rowwise'")
assert not any(isinstance(m, gralora.GraloraLayer) for m in model.modules())
model = base()
refused(lambda: adapted(model, target_modules=["q_proj"], modules_to_save=["lm_head"]), "must not be sliced")
assert not any(isinstance(m, gralora.GraloraLayer) for m in model.modules())
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

model = parallelize_module(base(parallel=False), mesh, {"model.layers.0.self_attn.q_proj": ColwiseParallel()})
refused(lambda: adapted(model), "must be in a tensor-parallel plan")
dist.destroy_process_group()
"""


def test_two_processes_do_what_one_does(tmp_path):
    run_two_processes(SCRIPT, tmp_path)


@pytest.mark.parametrize("features, width", [(range(4), 2), (range(3, 7), 5), (range(5, 6), 2), (range(9), 3)])
def test_slices_are_cut_along_blocks(features, width):
    found = [block * width + i for block, part in _by_block(features, width) for i in range(part.start, part.stop)]
    assert found == list(features)


def test_a_model_of_one_process_is_not_parallel():
    assert placement_of(nn.Sequential(nn.Linear(4, 4)), "0", nn.Linear(4, 4)) is None


@pytest.mark.parametrize("base", [nn.Linear(8, 4), nn.Conv2d(8, 4, 3)])
def test_a_parallel_layer_can_be_pickled(base):
    layer = parallel(kind_for(base, None))(base, None, Layout.WHOLE, None)
    copied = pickle.loads(pickle.dumps(layer))
    assert type(copied) is type(layer)
    assert copied.state_dict().keys() == layer.state_dict().keys()

"""FSDP1 with PEFT's wrap policy, as transformers' Trainer uses it: every factor is a unit of its own."""

from processes import run_two_processes

SCRIPT = """
import gralora
from conftest import randomise, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

TARGETS = {"target_modules": ["q_proj", "down_proj"], "r": 8}
TOKENS = torch.arange(3, 13)[None]


def adapted(config, dtype=torch.float32):
    return randomise(get_peft_model(tiny_llama(num_hidden_layers=1).to(dtype), config), 0.1)


def wrapped(model, use_orig_params):
    policy = fsdp_auto_wrap_policy(model)
    return FSDP(model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def gradient_elements(model):
    return sum(p.grad.numel() for p in model.parameters() if p.grad is not None)


def named(model):
    return {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in model.named_parameters()}


def step_gradients(model):
    model(TOKENS, labels=TOKENS).loss.backward()
    elements = gradient_elements(model)
    model.zero_grad()
    return elements


lora = wrapped(adapted(LoraConfig(**TARGETS)), True)
allowed = step_gradients(lora)
config = gralora.GraloraConfig(**TARGETS, gralora_k=4)
for use_orig_params, dtype, use_reentrant in (
    (False, torch.float32, None),
    (False, torch.bfloat16, True),
    (True, torch.float32, False),
    (True, torch.bfloat16, None),
):
    one = adapted(config, dtype)
    model = copy.deepcopy(one)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    forward = wrapped(model, use_orig_params)
    assert step_gradients(forward) == allowed
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    losses, expected = train(forward.train(), TOKENS), train(one.train(), TOKENS)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), atol=tolerance, rtol=0)

    model.save_pretrained(f"{folder}/adapter", is_main_process=rank == 0)
    dist.barrier()
    again = PeftModel.from_pretrained(tiny_llama(num_hidden_layers=1).to(dtype), f"{folder}/adapter").eval()
    saved, wanted = get_peft_model_state_dict(again), get_peft_model_state_dict(one)
    assert saved.keys() == wanted.keys()
    for key in saved:
        torch.testing.assert_close(saved[key], wanted[key], atol=tolerance, rtol=0)
    torch.testing.assert_close(again(TOKENS).logits, forward.eval()(TOKENS).logits, atol=tolerance, rtol=0)

    refused(model.merge_adapter, "only a shard of its base weight is here")
    again.merge_adapter()
    with FSDP.summon_full_params(forward):
        before = named(model)
        model.merge_adapter()
        merged = {name: p for name, p in again.named_parameters() if "base_layer" in name}
        assert all(torch.equal(named(model)[name], p) for name, p in merged.items()) and merged
        model.unmerge_adapter()
        after = named(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
dist.destroy_process_group()
"""


def test_trains_saves_and_merges_as_one_process_does(tmp_path):
    run_two_processes(SCRIPT, tmp_path)

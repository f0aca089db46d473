import json
import math

import pytest
import torch
from runs import Recorder, adapter_bytes
from safetensors.torch import load_file
from tiny_language_model import make_config, save_model, write_rows
from transformers import LlamaForCausalLM

from gralora.recipe.training import train

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


def rates(output):
    """The learning rate of each step, from the Trainer's own log."""
    newest = max((output / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    log = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [entry["learning_rate"] for entry in log if "learning_rate" in entry]


def test_one_step_moves_the_adapter(options, tmp_path):
    train(options(steps=1))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if "gralora_B" in name)


def test_the_rate_rises_from_the_first_step_and_falls_to_the_last(options, tmp_path):
    train(options(steps=8, warmup=2, lr=1.0e-3))
    # transformers' cosine, one step ahead: of nine steps, the first value (zero) is left out.
    expected = [0.5, 1.0, *((1 + math.cos(math.pi * (i - 2) / 7)) / 2 for i in range(3, 9))]
    assert rates(tmp_path / "out") == pytest.approx([1e-3 * rate for rate in expected], rel=1e-6)


@pytest.mark.parametrize(("scheduler", "first", "last"), [("constant", 1.0, 1.0), ("linear", 1.0, 1 / 4)])
def test_other_schedules(options, tmp_path, scheduler, first, last):
    train(options(steps=4, scheduler=scheduler, warmup=1, lr=1e-3))
    found = rates(tmp_path / "out")
    assert (found[0], found[-1]) == pytest.approx((first * 1e-3, last * 1e-3))


def test_accumulated_batches_are_one_batch(options, tmp_path):
    """Float32 sums in another order: the losses agree to rounding."""
    recorder = Recorder()
    plain = train(options(output=str(tmp_path / "plain"), batch_size=4, dropout=0.0))
    split = train(options(batch_size=2, grad_accumulation=2, dropout=0.0), recorder)
    assert recorder.summary.global_batch == 4
    assert split.losses == pytest.approx(plain.losses, rel=1e-5)
    assert (split.steps, plain.steps) == (8, 8)


def test_an_epoch_counts_accumulated_batches(options):
    """20 rows in batches of 2, 4 of them a step: 3 steps an epoch."""
    assert train(options(steps=None, epochs=2, batch_size=2, grad_accumulation=4)).steps == 6


def test_packed_rows_give_the_loss_and_the_gradient_of_single_rows(options, tmp_path):
    """A row must not see the rows before it in its sequence. One step over all rows; the optimizer follows the sign."""
    settings = {"steps": 1, "dropout": 0.0, "optimizer": "sgd", "lr": 1.0, "warmup": 0}
    settings |= {"trainer": {"max_grad_norm": 1e9}}
    plain = train(options(output=str(tmp_path / "plain"), batch_size=20, **settings))
    packed = train(options(batch_size=20, packing=True, max_length=128, **settings))
    assert packed.losses == pytest.approx(plain.losses, rel=1e-5)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "out"))
    for name, tensor in one.items():
        # Sums of float32 in another order.
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)


def test_weight_decay_and_optimizer_are_used(options, tmp_path):
    train(options(output=str(tmp_path / "plain"), steps=2))
    train(options(output=str(tmp_path / "decay"), steps=2, weight_decay=10.0))
    train(options(output=str(tmp_path / "other"), steps=2, optimizer="adafactor"))
    assert len({adapter_bytes(tmp_path / name) for name in ("plain", "decay", "other")}) == 3


def test_four_bits_train_a_float32_adapter(options, tmp_path):
    recorder = Recorder()
    result = train(options(load_in="4bit", target_modules="down_proj", steps=3), recorder)
    assert recorder.summary.dtype == "4bit, float32"
    assert all(math.isfinite(loss) for loss in result.losses)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_four_bits_are_trained_the_same_after_an_evaluation(options, tmp_path):
    """On a CPU, bitsandbytes repacks the weights in evaluation mode, and no gradient goes through them any more."""
    torch.manual_seed(7)
    config = make_config()
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 32})
    model = save_model(tmp_path / "model", LlamaForCausalLM(config))
    held_out = write_rows(tmp_path / "held-out.jsonl", count=2, start=30)
    settings = {"model": model, "load_in": "4bit", "dtype": "bfloat16", "steps": 4, "dropout": 0.0}
    plain = train(options(output=str(tmp_path / "plain"), **settings))
    scored = train(options(eval=held_out, eval_data=held_out, eval_steps=1, sample_every=1, **settings))
    assert scored.losses == plain.losses
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "plain")


def test_mixed_precision_computes_in_bfloat16_over_float32_weights(options, tmp_path):
    recorder = Recorder()
    plain = train(options(output=str(tmp_path / "plain"), steps=2))
    mixed = train(options(steps=2, mixed_precision="bf16"), recorder)
    assert recorder.summary.dtype == "float32"
    assert mixed.losses != plain.losses
    assert mixed.losses == pytest.approx(plain.losses, rel=1e-2)  # bfloat16 has eight bits


def test_an_attention_implementation_is_chosen(options, monkeypatch):
    seen = []
    monkeypatch.setattr(Recorder, "ready", lambda self, summary: seen.append(summary))
    with pytest.raises(ValueError, match=r"attention"):
        train(options(attention="flash_attention_9", steps=1))
    train(options(attention="eager", steps=1), Recorder())
    assert len(seen) == 1


def test_rows_of_several_files_are_joined(options, tmp_path):
    more = write_rows(tmp_path / "more.jsonl", count=4, start=50)
    recorder = Recorder()
    train(options(data=(options().data[0], more), steps=1), recorder)
    assert recorder.summary.train_rows == 24


def test_a_module_to_save_that_is_not_there_is_refused(options, tmp_path):
    with pytest.raises(ValueError, match=r"none is called 'lm_heat'\. Nearest: 'lm_head'\."):
        train(options(modules_to_save="lm_heat"))
    assert not (tmp_path / "out").exists()


def test_mixed_precision_keeps_the_weights_in_float32_unless_another_dtype_is_given(options, tmp_path, monkeypatch):
    monkeypatch.setattr("gralora.pretrained._fast_dtype", lambda: torch.bfloat16)
    found = {}
    for dtype, mixed in (("auto", None), ("auto", "bf16"), ("bfloat16", "bf16")):
        recorder = Recorder()
        output = str(tmp_path / f"{dtype}-{mixed}")
        train(options(steps=1, dtype=dtype, mixed_precision=mixed, output=output), recorder)
        found[dtype, mixed] = recorder.summary.dtype
    assert found == {("auto", None): "bfloat16", ("auto", "bf16"): "float32", ("bfloat16", "bf16"): "bfloat16"}

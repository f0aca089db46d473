"""Training by two processes: with DDP, FSDP2 and DeepSpeed, as accelerate's launcher starts them from its own files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import SETTINGS, adapter_bytes
from safetensors.torch import load_file
from tiny_language_model import write_rows

from gralora.recipe.options import TrainingOptions
from gralora.recipe.training import train

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")

# Where DeepSpeed is installed, accelerate and transformers import it: so it is in a folder of its own.
DEEPSPEED = Path(sys.prefix) / "deepspeed"
NEEDS_A_COMPILER = pytest.mark.skipif(
    not (DEEPSPEED.is_dir() and shutil.which("g++") and shutil.which("ninja")),
    reason="DeepSpeed compiles what it sends with on a CPU",
)
CONFIGURATIONS = {
    "DDP": {"distributed_type": "MULTI_GPU"},
    "FSDP2": {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": True,
        },
    },
    "ZeRO-2": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
    "ZeRO-3": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": True}},
}
ROWS = 3  # to score: one process has two of them, the other has one
SCRIPT = """
import json, os, signal, sys
from pathlib import Path

import torch
torch.set_num_threads(1)
from runs import SETTINGS, Recorder
from gralora.recipe import training
from gralora.recipe.answering import decoding, scoring
from gralora.recipe.options import TrainingOptions
from gralora.recipe.steps import StepCallback

folder, base, rows, held_out = Path(sys.argv[1]), *sys.argv[2:5]
rank, seen = int(os.environ["RANK"]), {}
generate, asked = scoring.generate_ids, []
scoring.generate_ids = lambda *a, **k: asked.append(len(a[2])) or generate(*a, **k)


def options(name, **changes):
    settings = SETTINGS | {"batch_size": 2, "steps": 4, "save_steps": 4}
    settings |= {"model": base, "data": rows, "output": str(folder / name)}
    return TrainingOptions(**settings | changes)


def refused(action):
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]


(folder / "bad.jsonl").write_text("{}\\n") if rank == 0 else None
seen["bad rows"] = refused(lambda: training.train(options("never", data=str(folder / "bad.jsonl"))))

recorder = Recorder()
result = training.train(options("scored", dropout=0.0, eval=held_out, steps=None, epochs=1), recorder)
seen["losses"], seen["steps"], seen["asked"] = result.losses, result.steps, asked
seen["events"] = [len(recorder.notes), recorder.summary is not None, len(recorder.scores)]
seen["rows of a step"] = recorder.summary and recorder.summary.global_batch

seen["unbroken"] = training.train(options("unbroken")).losses

begin = StepCallback.on_step_begin


def interrupting(self, args, state, *arguments, **given):
    begin(self, args, state, *arguments, **given)
    if state.global_step == 1 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)


StepCallback.on_step_begin = interrupting
result = training.train(options("broken"))
StepCallback.on_step_begin = begin
seen["interrupted"] = [result.interrupted, result.steps]

sees = Path.is_file
if rank == 1:  # as on another machine, which has a folder of its own there
    Path.is_file = lambda path: path.name != "trainer_state.json" and sees(path)
seen["unseen"] = refused(lambda: training.resume_run(str(folder / "broken")))
Path.is_file = sees
if rank == 1:
    os.chdir(folder.parent)  # the paths are those of the main process
else:
    os.chdir(folder)
seen["resumed"] = training.resume_run("broken").losses
seen["again"] = training.resume_run("broken").losses
(folder / f"{rank}.json").write_text(json.dumps(seen))
"""


def launch(folder, configuration, *command, processes=2):
    """Run `command` as two processes through accelerate's launcher, and return what they printed."""
    file = folder / "accelerate.yaml"
    file.write_text(
        json.dumps({"num_processes": processes, "num_machines": 1, "mixed_precision": "no", **configuration})
    )
    search = [Path(__file__).parent.parent, os.environ.get("PYTHONPATH", "")]
    search += [DEEPSPEED] if "deepspeed_config" in configuration else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, map(str, search))),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", "0"]
    done = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("held out") / "rows.jsonl", count=ROWS, start=20)


@pytest.fixture(scope="module")
def alone(base_model, rows_file, held_out, tmp_path_factory):
    """The result of one process with batches as large as those of two together, and its folder."""
    output = tmp_path_factory.mktemp("alone") / "out"
    settings = SETTINGS | {"dropout": 0.0, "steps": None, "epochs": 1, "eval": held_out}
    return train(TrainingOptions(**settings, model=base_model, data=rows_file, output=str(output))), output


@pytest.fixture(
    scope="module",
    params=["DDP", "FSDP2", *(pytest.param(kind, marks=NEEDS_A_COMPILER) for kind in ("ZeRO-2", "ZeRO-3"))],
)
def both(request, base_model, rows_file, held_out, tmp_path_factory):
    """What each of two processes saw, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    launch(folder, CONFIGURATIONS[request.param], folder / "script.py", folder, base_model, rows_file, held_out)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], folder


def test_two_processes_train_as_one_does(both, alone):
    seen, folder = both
    one, output = alone
    for process in seen:
        assert process["steps"] == one.steps == 5
        assert process["losses"] == pytest.approx(one.losses, abs=1e-5)
    expected, trained = (
        load_file(output / "adapter_model.safetensors"),
        load_file(folder / "scored" / "adapter_model.safetensors"),
    )
    assert expected.keys() == trained.keys()
    for name in expected:
        assert (expected[name] - trained[name]).abs().max() < 1e-4


def test_the_main_process_alone_reports_and_each_scores_its_part(both, alone):
    (main, other), folder = both
    assert main["rows of a step"] == 4
    assert main["events"][1:] == [True, 4]
    assert other["events"] == [0, False, 0]
    assert main["asked"] == [2, 2]
    assert other["asked"] == [1, 1]
    metrics = [json.loads((path / "metrics.json").read_text()) for path in (folder / "scored", alone[1])]
    assert metrics[0]["example"] == metrics[1]["example"]
    assert not (folder / "never").exists()
    assert not list((folder / "scored").glob(".*"))


def test_bad_rows_are_said_by_the_main_process(both):
    (main, other), _ = both
    assert main["bad rows"][0] == "ValueError"
    assert other["bad rows"] == ["StoppedTogetherError", main["bad rows"][1]]


def test_a_signal_to_one_process_stops_both_and_the_resumed_run_equals_an_unbroken_one(both):
    seen, folder = both
    for process in seen:
        assert process["interrupted"] == [True, 2]
        assert process["resumed"] == process["again"] == process["unbroken"]
    assert adapter_bytes(folder / "broken") == adapter_bytes(folder / "unbroken")


def test_a_checkpoint_that_a_process_does_not_see_is_said(both):
    for process, kind in zip(both[0], ("RuntimeError", "StoppedTogetherError"), strict=True):
        assert process["unseen"][0] == kind
        assert "`output` must be a folder that every process sees; there is no " in process["unseen"][1]

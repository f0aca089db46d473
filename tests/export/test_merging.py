import os
import subprocess
import sys

import pytest
import torch
from conftest import randomise, tiny_llama
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gralora import GraloraConfig, get_peft_model
from gralora.cli import main
from gralora.export.merged_model import MergeOptions, merge_to_folder
from gralora.files.atomic import mend

WIDTHS = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes' blocks of 64 must fit the rows
TOKENS = torch.arange(3, 23)[None]


@pytest.fixture
def folders(tmp_path):
    base = tiny_llama(**WIDTHS)
    base.save_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(base, GraloraConfig(r=8, hybrid_r=2, target_modules=["q_proj", "down_proj"])))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def tuned(folder, dtype=torch.float32):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    return PeftModel.from_pretrained(base, folder / "adapter").eval()


def run(folder, *arguments, verb="merge"):
    main([verb, str(folder / "base"), str(folder / "adapter"), str(folder / "out"), *arguments])


def test_a_plain_model_comes_out(folders, capsys):
    with pytest.raises(SystemExit) as ended:
        run(folders)
    assert ended.value.code in (None, 0)
    plain = AutoModelForCausalLM.from_pretrained(folders / "out")
    torch.testing.assert_close(plain(TOKENS).logits, tuned(folders)(TOKENS).logits, atol=1e-5, rtol=1e-5)
    out = capsys.readouterr().out
    assert "Merged 4 layers" in out
    assert " 3 layers read back: 0.00e+00" in out
    assert not [entry for entry in os.listdir(folders) if entry.startswith(".")]


def test_bfloat16_is_rounded_once(folders):
    report = merge_to_folder(
        MergeOptions(str(folders / "base"), (str(folders / "adapter"),), str(folders / "out"), dtype="bfloat16")
    )
    assert 0 < report.deviation < 2**-8
    plain = AutoModelForCausalLM.from_pretrained(folders / "out")
    assert plain.dtype == torch.bfloat16


def test_several_adapters_add_up_with_their_weights(folders):
    second = randomise(get_peft_model(tiny_llama(**WIDTHS), GraloraConfig(r=4, target_modules=["v_proj", "q_proj"])))
    second.save_pretrained(folders / "second")
    adapters = (str(folders / "adapter"), str(folders / "second"))
    merge_to_folder(MergeOptions(str(folders / "base"), adapters, str(folders / "out"), weights=(0.5, 2.0)))
    model = tuned(folders)
    model.load_adapter(folders / "second", adapter_name="second")
    model.base_model.set_adapter(["default", "second"])
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.5)
            layer.set_scale("second", 2.0)
    plain = AutoModelForCausalLM.from_pretrained(folders / "out")
    torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.fixture
def quantised(folders):
    for bits, settings in (("4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}), ("8", {"load_in_8bit": True})):
        config = BitsAndBytesConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(folders / "base", quantization_config=config, device_map="cpu")
        model.save_pretrained(folders / f"base{bits}")
    return folders


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_quantised_base_gives_16_bits_unless_asked(quantised, bits, capsys):
    out = str(quantised / "out")
    options = MergeOptions(str(quantised / f"base{bits}"), (str(quantised / "adapter"),), out)
    report = merge_to_folder(options)
    assert report.dequantised
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.dtype == torch.bfloat16
    assert not hasattr(plain.config, "quantization_config")
    again = merge_to_folder(MergeOptions(**(vars(options) | {"requantize": True, "output": out + "-q"})))
    assert len(again.requantisation) == 4
    assert all(0 < error < 0.2 for error in again.requantisation.values())
    kept = AutoModelForCausalLM.from_pretrained(out + "-q")
    assert kept.config.quantization_config is not None
    close = (kept(TOKENS).logits - plain(TOKENS).logits.float()).norm() / plain(TOKENS).logits.float().norm()
    assert close < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int4"], "`dtype` must be 'auto'"),
        (["--weight", "1", "--weight", "2"], "`weight` must be given once for each adapter; got 2 for 1"),
        (["--requantize"], "`requantize` needs a quantised base"),
        (["--adapter", "nowhere"], "`adapter` must be a folder with an adapter_config.json; 'nowhere'"),
    ],
)
def test_mistakes_are_named_and_write_nothing(folders, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        run(folders, *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (folders / "out").exists()


def test_an_output_that_exists_is_kept_unless_it_may_be_overwritten(folders, capsys):
    (folders / "out").mkdir()
    (folders / "out/config.json").write_text("{}")
    with pytest.raises(SystemExit):
        run(folders)
    assert "`output` must not exist" in capsys.readouterr().err
    assert (folders / "out/config.json").read_text() == "{}"
    with pytest.raises(SystemExit):
        run(folders, "--overwrite")
    assert AutoModelForCausalLM.from_pretrained(folders / "out")
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(folders / "base"), str(folders / "adapter"), str(folders / "base"), "--overwrite"])
    assert ended.value.code == 2


def test_a_non_finite_adapter_is_refused(folders, capsys):
    from safetensors.torch import load_file, save_file

    file = folders / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(SystemExit):
        run(folders)
    assert "must be finite" in capsys.readouterr().err
    assert not (folders / "out").exists()


def test_what_a_killed_run_left_is_mended(tmp_path):
    out = tmp_path / "out"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    workshop = tmp_path / f".out.{dead.pid}.x.partial"
    (workshop / "out.old").mkdir(parents=True)
    (workshop / "out.old/config.json").write_text("old")
    (workshop / "out").mkdir()
    mend(out)
    assert (out / "config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


MERGES = """
import json, os, random, signal, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from gralora.files.atomic import mend
from gralora.export.merged_model import MergeOptions, merge_to_folder

torch.set_num_threads(1)
folder = Path(sys.argv[1])
options = MergeOptions(str(folder / "base"), (str(folder / "adapter"),), str(folder / "out"), overwrite=True)

def merge(die_at=0):
    # In a process of its own, which kills itself at the given moment of its file system work.
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = 0
    moments = ("open", "os.rename", "os.mkdir", "shutil.rmtree", "os.rmdir", "os.chmod")
    def watch(event, args):
        nonlocal calls
        if event in moments and str(folder) in str(args[0]):
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    merge_to_folder(options)
    os._exit(calls)

def state():
    return AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()

moments = merge()
assert moments > 10, moments
new = state()
blank = AutoModelForCausalLM.from_pretrained(folder / "base")
old = {name: tensor * 0 for name, tensor in new.items()}
blank.load_state_dict(old)
for moment in sorted({moments - 1, *random.sample(range(1, moments), 9)}):
    blank.save_pretrained(folder / "out")
    assert merge(moment) == -signal.SIGKILL
    for config in folder.glob(".*/*/config.json"):  # what was left behind says that it is a model only if it is one
        AutoModelForCausalLM.from_pretrained(config.parent)
    mend(folder / "out")
    found = state()
    assert any(all(torch.equal(found[key], want[key]) for key in want) for want in (old, new)), moment
    assert {entry for entry in os.listdir(folder) if not entry.startswith(".")} == {"base", "adapter", "out"}
    assert json.loads((folder / "out/config.json").read_text())
assert merge() > 10
assert not [entry for entry in os.listdir(folder) if entry.startswith(".")]
print("held at", moments, "moments")
"""


def test_killed_at_any_moment_there_is_the_old_or_the_new(folders):
    """SIGKILL at ten random moments of the file system work, spread over the whole run."""
    done = subprocess.run([sys.executable, "-c", MERGES, str(folders)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "held at" in done.stdout

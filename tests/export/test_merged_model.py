import subprocess
import sys

import pytest
import torch
from adapters import TOKENS, WIDTHS, save_base_and_adapter, save_original, tuned_base
from conftest import randomise, tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gralora import GraloraConfig, get_peft_model
from gralora.export.merged_model import MergeOptions, merge_to_folder


@pytest.fixture
def folders(tmp_path):
    return save_base_and_adapter(tmp_path)


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
    model = tuned_base(folders)
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


def test_an_adapter_with_modules_of_its_own_is_merged_alone(folders):
    config = GraloraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(tiny_llama(**WIDTHS), config).save_pretrained(folders / "second")
    adapters = (str(folders / "adapter"), str(folders / "second"))
    with pytest.raises(ValueError, match="only if they hold factors alone; number 2 has whole modules"):
        merge_to_folder(MergeOptions(str(folders / "base"), adapters, str(folders / "out")))
    assert not (folders / "out").exists()


def test_the_format_of_the_authors_repository_is_refused(folders):
    original, _ = save_original(folders / "original")
    with pytest.raises(ValueError, match="was written by the authors' repository"):
        merge_to_folder(MergeOptions(str(folders / "base"), (str(original),), str(folders / "out")))


MERGES = """
import json, os, random, signal, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from gralora.files.atomic import clean_up_killed_runs
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
    clean_up_killed_runs(folder / "out")
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

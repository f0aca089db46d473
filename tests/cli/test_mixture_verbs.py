"""The verbs on an adapter of the experts of a mixture, with the folders of a base and an adapter alone."""

import json

import pytest
import torch
from adapters import TOKENS, run
from mixtures import moe_config, tiny
from peft import PeftModel
from transformers import AutoModelForCausalLM

from gralora import get_peft_model

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:This adapter uses")]


@pytest.fixture(params=["mixtral", "gpt_oss"])
def folders(request, tmp_path):
    tiny(request.param, torch.float32).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, moe_config(target_modules=["q_proj"], hybrid_r=2)).save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_merge_writes_a_plain_model(folders, capsys):
    status, out, err = run(capsys, "merge", folders / "base", folders / "adapter", folders / "out")
    assert status == 0, err
    assert "Merged 6 layers" in out
    assert "3 layers read back" in out
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    adapted = PeftModel.from_pretrained(base, folders / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(folders / "out").eval()
    # A merged float32 weight is rounded once more than W and Δ apart, and experts sum their rows in another order.
    torch.testing.assert_close(merged(TOKENS).logits, adapted(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_a_merge_that_wrote_something_else_is_seen(folders, capsys, monkeypatch):
    model = type(AutoModelForCausalLM.from_pretrained(folders / "base"))
    real = model.save_pretrained

    def spoilt(self, *args, **kwargs):
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "experts" in name and "bias" not in name:
                    parameter += 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(model, "save_pretrained", spoilt)
    _, out, _ = run(capsys, "merge", folders / "base", folders / "adapter", folders / "out")
    assert "read back: 1.0" in out.replace("\n", " ")


def test_inspect_shows_the_stacks(folders, capsys):
    status, out, _ = run(capsys, "inspect", folders / "adapter", "--json")
    report = json.loads(out)
    assert status == 0
    targets = {layer["target"]: layer["experts"] for layer in report["layers"]}
    assert targets["model.layers.0.mlp.experts.gate_up_proj"] == 4
    assert targets["model.layers.0.self_attn.q_proj"] is None
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    adapted = PeftModel.from_pretrained(base, folders / "adapter")
    layer = adapted.base_model.model.model.layers[1].mlp.experts
    norms = {entry["target"]: entry["norm"] for entry in report["layers"]}
    expected = layer.get_delta_weight("default").norm()
    assert norms["model.layers.1.mlp.experts.down_proj"] == pytest.approx(float(expected), rel=1e-5)

"""Training state-space models, whose mixers read some weights instead of calling the layers."""

import pytest
import torch
from runs import Recorder
from tiny_language_model import save_model
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig

from gralora import pretrained
from gralora.recipe.training import train

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"vocab_size": 259, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 3, "pad_token_id": 0}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "mamba": (MambaConfig(**SIZES), "3 of 'x_proj', 3 of 'dt_proj', 3 of 'out_proj'"),
    "mamba2": (
        Mamba2Config(**SIZES, num_heads=4, head_dim=8, n_groups=2, chunk_size=8),
        ", ".join(f"'backbone.layers.{i}.mixer.out_proj'" for i in range(3)),
    ),
}


@pytest.mark.filterwarnings("always:`target_modules='all-linear'` leaves out")
@pytest.mark.parametrize("name", MODELS)
def test_what_can_be_adapted_is_and_the_rest_is_said_once(name, options, tmp_path):
    config, left_out = MODELS[name]
    base = save_model(tmp_path / "base", AutoModelForCausalLM.from_config(config))
    recorder = Recorder()
    train(options(model=base, steps=2), recorder)
    assert recorder.summary.targets == {"in_proj": 3}
    reason = f"models of type {name!r} read the weight without calling the layer"
    said = [note for note in recorder.notes if "leaves out" in note]
    assert said == [
        f"note: `target_modules='all-linear'` leaves out {left_out}: {reason}. Name them in `exclude_modules` to "
        "silence this."
    ]
    ids = torch.arange(3, 20)[None]
    before = pretrained.load(base, "float32")[0](ids).logits
    after = pretrained.load_adapter(pretrained.load(base, "float32")[0], tmp_path / "out")(ids).logits
    assert (after - before).abs().max() > 1e-3

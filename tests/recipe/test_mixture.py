"""Training a mixture of experts."""

import pytest
from mixtures import MODELS
from peft import PeftModel
from runs import Recorder, adapter_bytes, interrupt
from tiny_language_model import save_mixture, save_model
from transformers import AutoModelForCausalLM

from gralora.recipe.answering.scoring import score_exact_match
from gralora.recipe.training import resume_run, train
from gralora.tuner.layer import gralora_layers

pytest_plugins = ["run_fixtures"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`target_modules='all-linear'` adapts the experts too"),
    pytest.mark.filterwarnings("ignore:This adapter uses `target_parameters`"),
]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return save_mixture(tmp_path_factory.mktemp("mixture"))


def test_the_experts_are_adapted_by_default_and_the_table_says_so(options, mixture, tmp_path):
    recorder = Recorder()
    train(options(model=mixture, steps=2, dtype="bfloat16"), recorder)
    names = {"experts.gate_up_proj (4 experts each)": 2, "experts.down_proj (4 experts each)": 2}
    assert recorder.summary.targets == names | dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 2)
    assert recorder.summary.dtype == "bfloat16"
    base = AutoModelForCausalLM.from_pretrained(mixture)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    moved = [
        layer.gralora_B["default"].abs().sum(dim=(1, 2, 3))
        for layer in gralora_layers(loaded).values()
        if layer.experts
    ]
    assert len(moved) == 4
    assert all((of_expert > 0).any() for of_expert in moved)


def test_an_interrupted_run_ends_as_an_unbroken_one_bit_for_bit(options, mixture, tmp_path):
    unbroken = train(options(model=mixture, steps=4, output=str(tmp_path / "unbroken")))
    partial = train(options(model=mixture, steps=4), Recorder(1, interrupt))
    assert partial.interrupted
    whole = resume_run(str(tmp_path / "out"))
    assert whole.losses == unbroken.losses
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "unbroken")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_run_with_router_losses_scores_before_and_after(name, options, rows_file, tmp_path, monkeypatch):
    model = save_model(tmp_path / "base", AutoModelForCausalLM.from_config(mixture_config(name)))
    seen = []

    def score(model, *arguments, **further):
        seen.append(model.config.output_router_logits)
        return score_exact_match(model, *arguments, **further)

    monkeypatch.setattr("gralora.recipe.run.score_exact_match", score)
    result = train(options(model=model, steps=1, eval=rows_file))
    assert (result.before, result.after) == (0, 0)
    assert seen == [True, True]


def mixture_config(name):
    config = MODELS[name]()
    # The default of both models, with which TRL turns the loss on.
    assert config.router_aux_loss_coef > 0
    return type(config)(**(config.to_dict() | {"vocab_size": 259, "max_position_embeddings": 512}))

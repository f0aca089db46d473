import pytest
import torch
from mixtures import tiny
from tiny_language_model import make_tokenizer

from gralora.recipe.answering.decoding import generate_ids

pytestmark = pytest.mark.usefixtures("one_thread")


def generate(model):
    # Two prompts of different lengths: the mask is then longer than the tokens of one step.
    return generate_ids(model, make_tokenizer(), [[3, 4, 5], [6, 7]], 4, do_sample=False)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_mixture_that_is_trained_with_router_losses_generates(name):
    model = tiny(name, torch.float32)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    expected = generate(model)
    model.config.output_router_logits = True
    tokens = torch.tensor([[3, 4, 5]])
    assert model(tokens, labels=tokens).aux_loss > 0
    assert torch.equal(generate(model), expected)
    assert model.config.output_router_logits is True
    model.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        generate(model)
    assert model.config.output_router_logits is True

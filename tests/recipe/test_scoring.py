import pytest
import torch
from tiny_language_model import make_tokenizer

from gralora.recipe.data import parse_rows
from gralora.recipe.scoring import score_exact_match


class Parrot(torch.nn.Module):
    """Answers a prompt "say x" with x, and counts its batches."""

    device = torch.device("cpu")
    generation_config = None

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer, self.limits, self.batches = tokenizer, [], []

    def generate(self, input_ids, attention_mask, generation_config, **_):
        assert not self.training
        assert generation_config.do_sample is False
        self.limits.append(generation_config.max_new_tokens)
        self.batches.append(len(input_ids))
        prompts = [self.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        answers = [prompt.partition("say ")[2].partition("<|im_end|>")[0] for prompt in prompts]
        ends = [self.tokenizer(answer + "<|im_end|>")["input_ids"] for answer in answers]
        longest = max(map(len, ends))
        padded = torch.tensor([ids + [self.tokenizer.pad_token_id] * (longest - len(ids)) for ids in ends])
        return torch.cat([input_ids, padded], dim=1)


def rows_of(*pairs):
    return parse_rows([(f"line {i}", {"prompt": p, "completion": c}) for i, (p, c) in enumerate(pairs)], "rows")


@pytest.mark.parametrize("was_training", [True, False])
def test_answers_are_compared_with_their_own_references(was_training):
    tokenizer = make_tokenizer()
    model = Parrot(tokenizer).train(was_training)
    done = []
    rows = rows_of(("say longer", "longer"), ("say b", " b\n"), ("say no", "yes"))
    score = score_exact_match(model, tokenizer, rows, batch_size=2, on_rows_done=done.append)
    assert score.answers == ("longer", "b", "no")
    assert (score.correct, score.rows, score.exact_match) == (2, 3, 2 / 3)
    assert (model.batches, done) == ([2, 1], [2, 3])
    assert set(model.limits) == {len("longer") + 8}
    assert model.training is was_training

import pytest
import torch
from tiny_language_model import make_tokenizer

from gralora.recipe.answering.scoring import score_exact_match
from gralora.recipe.data import parse_rows
from gralora.recipe.processes import Processes


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


class Second(Processes):
    """The second of two processes, whose other one has found `others`."""

    def __init__(self, others, kind="DDP"):
        super().__init__()
        self.count, self.rank, self.others, self.kind = 2, 1, others, kind

    def gathered(self, items):
        return [*self.others, *items]


def test_each_process_answers_its_part_and_all_know_the_whole():
    tokenizer = make_tokenizer()
    model = Parrot(tokenizer)
    rows = rows_of(("say longest", "longest"), ("say b", "b"), ("say long", "no"))
    done = []
    processes = Second([(1, "b"), (0, "longest")])
    score = score_exact_match(model, tokenizer, rows, on_rows_done=done.append, processes=processes)
    assert (model.batches, done) == ([1], [3])
    assert score.answers == ("longest", "b", "long")
    assert score.correct == 2


@pytest.mark.parametrize("kind, batches", [("FSDP2", [1]), ("DDP", [])])
def test_a_process_without_rows_generates_only_where_others_need_its_part_of_the_model(kind, batches):
    tokenizer = make_tokenizer()
    model = Parrot(tokenizer)
    rows = rows_of(("say b", "b"))
    score = score_exact_match(model, tokenizer, rows, processes=Second([(0, "b")], kind))
    assert model.batches == batches
    assert score.answers == ("b",)

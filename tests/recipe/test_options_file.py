import pytest

from gralora.recipe.options import TrainingOptions
from gralora.recipe.options_file import option_types, read_options_file
from gralora.recipe.training import train

pytest_plugins = ["run_fixtures"]


def written(tmp_path, content):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    return str(file)


def test_an_empty_file_holds_no_options(tmp_path):
    assert read_options_file(written(tmp_path, "# nothing yet\nlr:\n")) == {}


def test_every_option_has_a_type():
    assert set(option_types().values()) == {int, float, str, bool, tuple, dict}


def test_lists_mappings_and_short_names(tmp_path):
    content = """
data: [a.jsonl, b.jsonl]
eval: held-out.jsonl
rank: 8
target-modules: [q_proj, v_proj]
layers_to_transform: [0, 1]
rank_pattern: {q_proj: 16}
weight-decay: 1
trainer: {max_grad_norm: 0.5}
adapter: {ensure_weight_tying: true}
"""
    options = TrainingOptions(**read_options_file(written(tmp_path, content)))
    assert options.data == ("a.jsonl", "b.jsonl")
    assert options.eval == ("held-out.jsonl",)
    assert (options.r, options.weight_decay) == (8, 1.0)
    assert options.rank_pattern == ("q_proj=16",)
    assert options.layers_to_transform == "0,1"
    config = options.adapter_config()
    assert (config.target_modules, config.layers_to_transform) == ({"q_proj", "v_proj"}, [0, 1])
    assert (options.trainer, options.adapter) == ({"max_grad_norm": 0.5}, {"ensure_weight_tying": True})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [a, b]", "must have text for model"),
        ("data: [1]", "must have text or a list of texts for data"),
        ("trainer: 3", "must have a mapping for trainer"),
        ("packing: 1", "must have true or false for packing"),
        ("output_dir: x", "got 'output_dir'"),
    ],
)
def test_a_wrong_value_is_said(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_options_file(written(tmp_path, content))


def test_the_file_that_a_run_writes_makes_the_same_run(options, tmp_path):
    first = options(steps=1, validation_share=0.2, trainer={"max_grad_norm": 0.5}, target_modules="q_proj,v_proj")
    train(first)
    read = read_options_file(str(tmp_path / "out" / "config.yaml"))
    assert TrainingOptions(**read, output=first.output) == first

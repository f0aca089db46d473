import pytest
from runs import Recorder

from gralora.recipe.training import dry_run, train

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_dry_run_shows_what_the_run_will_be_and_writes_nothing(options, tmp_path):
    before = sorted(tmp_path.iterdir())
    dry, real = Recorder(), Recorder()
    summary = dry_run(options(), dry)
    assert sorted(tmp_path.iterdir()) == before
    train(options(), real)
    assert dry.summary.memory
    assert {**vars(summary), "memory": None} == vars(real.summary)


def test_the_estimate_counts_weights_adapter_and_activations(options):
    short = dry_run(options(batch_size=2)).memory
    long = dry_run(options(batch_size=4)).memory
    trained = dry_run(options()).trainable_parameters
    assert short["adapter, gradients, optimizer"] == trained * 16
    assert short["frozen weights"] == long["frozen weights"] > 259 * 16 * 4
    assert 1.8 < long["activations"] / short["activations"] < 2.2
    checkpointed = dry_run(options(batch_size=4, gradient_checkpointing=True)).memory
    assert checkpointed["activations"] < long["activations"] / 2


def test_a_dry_run_finds_what_the_run_would_find(options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        dry_run(options())
    with pytest.raises(ValueError, match="must be a folder that can be written"):
        dry_run(options(output=str(tmp_path / "out" / "mine" / "deeper")))
    with pytest.raises(ValueError, match="truncated away"):
        dry_run(options(output=str(tmp_path / "other"), max_length=4))

import pytest

from gralora.recipe.training import train

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_loss_that_is_not_finite_stops_the_run(options, tmp_path):
    with pytest.raises(RuntimeError, match=r"not finite at step \d.*lower `lr` .*, or with `dtype=\"float32\"`"):
        train(options(lr=1e30))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()

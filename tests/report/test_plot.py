import pytest
from mixtures import save_mixture_and_adapter

from gralora.report import inspect
from gralora.report.plot import plot


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures(adapter_folder, base_folder, tmp_path, suffix):
    report = inspect(adapter_folder, base_folder)
    plot(report, tmp_path / f"out{suffix}", layer="model.layers.1.mlp.down_proj")
    head = (tmp_path / f"out{suffix}").read_bytes()[:400]
    assert head.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in head
    with pytest.raises(ValueError, match="`output` must not exist"):
        plot(report, tmp_path / f"out{suffix}")
    with pytest.raises(ValueError, match=r"`output` must end in \.png or \.svg"):
        plot(report, tmp_path / "out.pdf")
    with pytest.raises(ValueError, match=r"`layer` must be an adapted one; got layer='nowhere'. The first is 'model"):
        plot(report, tmp_path / "new.png", layer="nowhere")
    assert not (tmp_path / "new.png").exists()


def test_a_picture_of_experts(tmp_path):
    save_mixture_and_adapter(tmp_path)
    report = inspect(tmp_path / "adapter")
    text = plot(report, tmp_path / "p.svg", layer="model.layers.1.mlp.experts.down_proj").read_text()
    for label in ("gate_up_proj", "down_proj", "q_proj", "model.layers.1.mlp.experts.down_proj (4 experts)"):
        assert f"<!-- {label} -->" in text

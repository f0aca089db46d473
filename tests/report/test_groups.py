from types import SimpleNamespace

import pytest

from gralora.report.groups import by_kind, shortened


def layers(*names):
    return [SimpleNamespace(target=name) for name in names]


def test_layers_that_differ_in_numbers_are_one_group():
    found = by_kind(layers("model.layers.0.attn.q", "model.layers.0.mlp.up", "model.layers.1.attn.q", "head"))
    assert [(group.name, [layer.target for layer in group.layers]) for group in found] == [
        ("q", ["model.layers.0.attn.q", "model.layers.1.attn.q"]),
        ("up", ["model.layers.0.mlp.up"]),
        ("head", ["head"]),
    ]


def test_groups_of_one_last_part_have_longer_names():
    names = ["text.0.attn.q", "text.1.attn.q", "vision.0.attn.q", "q"]
    assert [group.name for group in by_kind(layers(*names))] == ["text.*.attn.q", "vision.*.attn.q", "q"]


NAMES = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.experts.down_proj")]


@pytest.mark.parametrize(
    ("width", "first"),
    [
        (40, "model.layers.11.mlp.experts.down_proj"),
        (34, "…layers.11.mlp.experts.down_proj"),
        (28, "…11.mlp.experts.down_proj"),
        (23, "…11…experts.down_proj"),
        (20, "…11…down_proj"),
    ],
)
def test_names_lose_what_most_of_them_share(width, first):
    short = shortened(NAMES, width)
    assert short[-1] == first
    assert max(map(len, short)) <= width
    assert len(set(short)) == len(NAMES)


def test_a_last_part_that_is_too_long_is_cut_in_its_middle():
    assert shortened(["a_very_long_name_of_a_module"], 11) == ["a_ver…odule"]
    assert shortened(["short"], 3) == ["s…t"]

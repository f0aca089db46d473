import pytest
from adapters import edit_config
from mixtures import save_mixture_and_adapter

from gralora.files.checkpoint import open_adapter
from gralora.files.layer_record import LayerRecord


def test_a_record_is_read_with_its_defaults():
    assert LayerRecord.of({"kind": "conv", "shape": [8, 2, 3, 3], "groups": 2}, "0", "x") == LayerRecord(
        "conv", shape=(8, 2, 3, 3), groups=2
    )
    written = {"kind": "parameter", "parameter": "gate_up_proj", "transposed": True, "interleaved": True, "new": 1}
    assert LayerRecord.of(written, "0", "x") == LayerRecord(
        "parameter", "gate_up_proj", transposed=True, interleaved=True
    )
    assert LayerRecord.of({"kind": "somebody's"}, "0", "x").kind == "somebody's"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, "`layer_kinds` must say the kind of '0'; got None in 'x'"),
        ({"shape": [2, 3]}, r"must say the kind of '0'; got {'shape': \[2, 3\]}"),
        ({"kind": "parameter"}, "must have a valid 'parameter' for the parameter '0'; got None"),
        ({"kind": "embedding", "shape": [13]}, r"must have a valid 'shape' for the embedding '0'; got \[13\]"),
        ({"kind": "conv", "shape": [8, 0, 3]}, r"must have a valid 'shape' for the conv '0'; got \[8, 0, 3\]"),
        ({"kind": "conv", "shape": [8, 2, 3], "groups": "2"}, "must have a valid 'groups' for the conv '0'; got '2'"),
    ],
)
def test_a_damaged_record_is_refused(written, message):
    with pytest.raises(ValueError, match=message):
        LayerRecord.of(written, "0", "x")


def test_kinds_that_are_no_table_are_refused(tmp_path):
    save_mixture_and_adapter(tmp_path)
    edit_config(tmp_path / "adapter", '"layer_kinds": {', '"layer_kinds": ["x"], "other": {')
    with pytest.raises(ValueError, match=r"`layer_kinds` must map names of layers to records; got \['x'\]"):
        open_adapter(tmp_path / "adapter")

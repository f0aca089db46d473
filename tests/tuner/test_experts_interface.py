"""Every class of transformers that follows its experts interface, with a config that answers any question."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
import transformers.models
from mixtures import Block, routing
from torch import nn

from gralora import GraloraConfig, get_peft_model
from gralora.tuner.experts import Experts, follows_interface

HIDDEN, INTERMEDIATE, EXPERTS = 12, 24, 4


class AnyConfig:
    """A config of whatever names a class asks for."""

    _experts_implementation = "eager"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if "act" in name and "factor" not in name:
            return "silu"
        if "limit" in name or "alpha" in name or "eps" in name or "factor" in name:
            return 1.5
        if "expert" in name:
            return EXPERTS if "size" not in name and "dim" not in name else INTERMEDIATE
        if "latent" in name:
            return None
        return INTERMEDIATE if "intermediate" in name or "ffn" in name else HIDDEN


def classes():
    """The names of the decorated classes, found in the sources without importing all of transformers."""
    for module in pkgutil.iter_modules(transformers.models.__path__):
        for file in sorted((Path(transformers.models.__path__[0]) / module.name).glob("modeling_*.py")):
            for name in re.findall(r"@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)", file.read_text()):
                yield f"transformers.models.{module.name}.{file.stem}", name


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("module", "name"), list(classes()), ids=lambda value: value.rpartition(".")[2])
def test_the_factors_give_what_merged_weights_give(module, name):
    experts = getattr(importlib.import_module(module), name)(AnyConfig()).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    assert follows_interface(experts)
    names = Experts.projections(experts)
    config = GraloraConfig(
        r=4, target_modules=[], target_parameters=[f"layer.{name}" for name in names], init_weights=False
    )
    model, x = get_peft_model(Block(experts), config), torch.randn(7, HIDDEN, dtype=torch.float64)
    layer = model.base_model.model.layer
    assert type(layer) is Experts
    plain, found = layer.get_base_layer()(x, *routing(x)), model(x)
    assert (found - plain).norm() > 1e-3 * plain.norm()
    model.merge_adapter()
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-6)  # some classes compute in float32 in between

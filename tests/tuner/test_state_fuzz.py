"""Random sequences of operations on a model: outputs and base bits must match a simple model of the state.

`GRALORA_FUZZ_SEQUENCES` sets the number of sequences, 200 by default.
"""

import copy
import os
import tempfile

import oracle
import pytest
import torch
from conftest import mlp_config
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from interrupts import interrupted_at
from peft import load_peft_weights, set_peft_model_state_dict
from torch import nn

from gralora import get_peft_model

ADAPTERS = ["default", "second"]
CONFIGS = {"default": {"hybrid_r": 2}, "second": {"r": 4, "gralora_k": 2}}
DTYPES = [torch.float32, torch.bfloat16]


class Tied(nn.Module):
    """Two adapted layers, and one without an adapter that shares the weight of the second."""

    def __init__(self, dtype):
        super().__init__()
        self.up, self.down = nn.Linear(12, 24, dtype=dtype), nn.Linear(24, 12, dtype=dtype)
        self.twin = nn.Linear(24, 12, dtype=dtype)
        self.twin.weight = self.down.weight

    def forward(self, x):
        h = torch.relu(self.up(x))
        return self.down(h), self.twin(h)


class Account:
    """What one layer must be: its original weight, and by adapter the factors and scale that were merged."""

    def __init__(self, layer):
        self.original = layer.base_layer.weight.detach().clone()
        self.merged = {}
        self.bits = self.original

    def convert(self, dtype):
        self.original, self.bits = self.original.to(dtype), self.bits.to(dtype)


def snapshot(layer, name):
    return [None if f is None else f.detach().clone() for f in layer.factors(name)], layer.scaling[name]


class Sequences(RuleBasedStateMachine):
    @initialize(dtype=st.sampled_from(DTYPES))
    def begin(self, dtype):
        torch.manual_seed(0)
        self.model = get_peft_model(Tied(dtype), mlp_config(**CONFIGS["default"]))
        self.x = torch.randn(5, 12, dtype=dtype)
        self.accounts = {name: Account(layer) for name, layer in self.layers().items()}
        self.disabled, self.saved = False, {}
        self.coarse = dtype == torch.bfloat16  # something was rounded to 8 bits since the merge

    def layers(self):
        return {name: getattr(self.model.base_model.model, name) for name in ("up", "down")}

    def known(self, names):
        return [name for name in sorted(names) if name in self.model.peft_config]

    def note_unmerged(self, name):
        account = self.accounts[name]
        account.merged, account.bits = {}, account.original

    # Merging ----------------------------------------------------------------------------------------------------------

    def account_for_merge(self, names):
        """Return what is expected of each layer once `names` are merged."""
        return {
            key: {n: snapshot(layer, n) for n in names if n not in layer.merged_adapters} | self.accounts[key].merged
            for key, layer in self.layers().items()
        }

    @rule(names=st.sets(st.sampled_from(ADAPTERS), min_size=1), own=st.booleans(), safe=st.booleans())
    def merge(self, names, own, safe):
        if not (names := self.known(names)):
            return
        expected = self.account_for_merge(names)
        self.model.base_model.merge_adapter(names, safe_merge=safe, own_weights=own)
        if not self.disabled:
            self.note_merged(expected)

    def note_merged(self, expected):
        for key, layer in self.layers().items():
            account = self.accounts[key]
            if account.merged.keys() != expected[key].keys():
                account.merged, account.bits = expected[key], layer.base_layer.weight.detach().clone()
            exact = account.original.double()
            for factors, scale in account.merged.values():
                exact = exact + oracle.dense(*factors, scale)
            step = 2**-8 if self.coarse else 2**-20
            assert (account.bits.double() - exact).abs().max() <= step * (1 + exact.abs().max())

    @rule(names=st.sets(st.sampled_from(ADAPTERS), min_size=1), line=st.integers(1, 900))
    def merge_interrupted(self, names, line):
        names = self.known(names)
        if not names or self.disabled:
            return
        expected = self.account_for_merge(names)
        if not interrupted_at(line, lambda: self.model.merge_adapter(names)):
            self.note_merged(expected)

    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        for key in self.accounts:
            self.note_unmerged(key)

    @rule(line=st.integers(1, 250))
    def unmerge_interrupted(self, line):
        interrupted_at(line, self.model.unmerge_adapter)
        for key, layer in self.layers().items():
            assert set(layer.merged_adapters) in (set(), set(self.accounts[key].merged))
            if not layer.merged:
                self.note_unmerged(key)

    # Adapters ---------------------------------------------------------------------------------------------------------

    @rule(names=st.sets(st.sampled_from(ADAPTERS), min_size=1))
    def activate(self, names):
        if names := self.known(names):
            self.model.base_model.set_adapter(names)
            for key in self.accounts:
                self.note_unmerged(key)

    @rule()
    def disable(self):
        self.model.base_model.disable_adapter_layers()
        self.disabled = True
        for key in self.accounts:
            self.note_unmerged(key)

    @rule()
    def enable(self):
        self.model.base_model.enable_adapter_layers()
        self.disabled = False

    @precondition(lambda self: "second" not in self.model.peft_config)
    @rule()
    def add(self):
        self.model.add_adapter("second", mlp_config(**CONFIGS["second"]))  # sets the active ones again
        for key in self.accounts:
            self.note_unmerged(key)

    @precondition(lambda self: "second" in self.model.peft_config)
    @rule()
    def delete(self):
        layers = self.layers()
        if any("second" in layer.merged_adapters for layer in layers.values()):
            with pytest.raises(ValueError, match="while they are merged"):
                self.model.delete_adapter("second")
            return
        self.model.delete_adapter("second")
        self.saved.pop("second", None)
        for key, layer in layers.items():
            if not layer.merged:  # another adapter became active
                self.note_unmerged(key)

    @rule(name=st.sampled_from(ADAPTERS), factor=st.sampled_from([0.0, 0.5, 2.0, -1.0]), how=st.integers(0, 2))
    def scale(self, name, factor, how):
        for layer in self.layers().values():
            if how == 0:
                layer.set_scale(name, factor)
            elif how == 1:
                layer.scale_layer(factor)
            else:
                layer.unscale_layer()

    @rule()
    def train(self):
        outputs = self.model(self.x)
        if not outputs[0].requires_grad:
            return
        self.model.zero_grad()
        outputs[0].float().square().mean().backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    # Steps of a bounded size: fifteen of them must not leave the range of float32.
                    parameter -= 0.05 * parameter.grad / (1 + parameter.grad.abs().max())

    @rule(name=st.sampled_from(ADAPTERS))
    def save(self, name):
        if name in self.model.peft_config:
            with tempfile.TemporaryDirectory() as folder:
                self.model.save_pretrained(folder, selected_adapters=[name])
                inside = folder if name == "default" else os.path.join(folder, name)
                self.saved[name] = load_peft_weights(inside)
            for key, layer in self.layers().items():
                for factor, tensor in zip(layer.adapter_layer_names, layer.factors(name), strict=True):
                    stored = [
                        t
                        for k, t in self.saved[name].items()
                        if f".{key}.{factor}" in k and t.dim() == tensor_dim(tensor)
                    ]
                    assert tensor is None or any(torch.equal(t, tensor) for t in stored)

    @rule(name=st.sampled_from(ADAPTERS))
    def load(self, name):
        if name in self.saved and name in self.model.peft_config:
            result = set_peft_model_state_dict(self.model, self.saved[name], name)
            assert not result.unexpected_keys

    # The model --------------------------------------------------------------------------------------------------------

    @rule()
    def move_to_where_it_is(self):
        self.model.to("cpu")

    @rule(dtype=st.sampled_from(DTYPES))
    def convert(self, dtype):
        self.coarse = self.coarse or dtype == torch.bfloat16
        self.model.to(dtype)
        self.x = self.x.to(dtype)
        for account in self.accounts.values():
            account.convert(dtype)

    @rule()
    def copy(self):
        self.model = copy.deepcopy(self.model)

    # What must hold ---------------------------------------------------------------------------------------------------

    @invariant()
    def weights_are_what_the_account_says(self):
        if not hasattr(self, "model"):
            return
        for key, layer in self.layers().items():
            account = self.accounts[key]
            assert set(layer.merged_adapters) == set(account.merged)
            assert torch.equal(layer.base_layer.weight, account.bits)
        twin, down = self.model.base_model.model.twin.weight, self.layers()["down"]
        assert torch.equal(twin, self.accounts["down"].original)
        assert down.merged or down.base_layer.weight is twin

    @invariant()
    def outputs_are_those_of_the_oracle(self):
        if not hasattr(self, "model"):
            return
        up, down = self.layers().items()
        h = torch.relu(self.exact(*up, self.x.double()))
        twin = self.model.base_model.model.twin
        y_twin = h @ self.accounts["down"].original.double().T + twin.bias.double()
        step = 2**-5 if self.coarse else 1e-5  # some roundings, relative to the largest output
        for found, exact in zip(self.model(self.x), (self.exact(*down, h), y_twin), strict=True):
            assert found.dtype == self.x.dtype
            assert (found.double() - exact).abs().max() <= step * (1 + exact.abs().max() + h.abs().max())

    def exact(self, key, layer, x):
        account = self.accounts[key]
        y = x @ account.original.double().T + layer.base_layer.bias.double()
        for factors, scale in account.merged.values():
            y = y + oracle.apply(x, *factors, scale)
        for name in [] if self.disabled else layer.active_adapters:
            if name in layer.gralora_A and name not in account.merged:
                y = y + oracle.apply(x, *snapshot(layer, name)[0], layer.scaling[name])
        return y


def tensor_dim(tensor):
    return 0 if tensor is None else tensor.dim()


TestSequences = pytest.mark.usefixtures("one_thread")(
    pytest.mark.filterwarnings("ignore::UserWarning")(Sequences.TestCase)
)
TestSequences.settings = settings(
    deadline=None,
    max_examples=int(os.environ.get("GRALORA_FUZZ_SEQUENCES", "200")),
    stateful_step_count=15,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # sequences are short; shrinking one takes minutes
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)

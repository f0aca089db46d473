"""One adapter for two modules with one weight: an embedding, and the output layer that reads its weight transposed.

The output layer holds no parameters. Its factors are those of the embedding, transposed at each use, so that no
optimizer steps twice, no cast breaks the tie, and a file holds them once.
"""

import re
from typing import Any

from torch import Tensor, nn

from gralora.tuner import blocks
from gralora.tuner.config import GraloraConfig
from gralora.tuner.factor import Factor, TransposedFactor
from gralora.tuner.layer import GraloraLayer
from gralora.tuner.linear import Linear
from gralora.tuner.targets import Target


class TiedLinear(Linear):
    """GraLoRA on an output layer `[V, d]`, with the factors of the embedding that it is tied to."""

    def tie(self, adapter_name: str, source: GraloraLayer) -> None:
        """Take over one adapter of `source`."""
        # The factors of ΔWᵀ: A of B, B of A, and the hybrid part likewise.
        for container, holder in zip(self._containers(), _in_turned_order(source._holders(adapter_name)), strict=True):
            if holder is not None:
                container[adapter_name] = TransposedFactor(holder)
        for name in self.other_param_names:
            if name != "gralora_dropout":
                getattr(self, name)[adapter_name] = getattr(source, name)[adapter_name]
        self.gralora_dropout[adapter_name] = nn.Identity()  # an embedding has none
        self._active_adapter = source._active_adapter
        self._disable_adapters = source._disable_adapters

    def update(self, x: Tensor, factors: blocks.Factors) -> Tensor:
        """Return the adapter's output `[..., V]`; the last block may reach beyond the vocabulary."""
        return blocks.apply(x, factors)[..., : self.out_features]

    def add(self, result: Tensor, x: Tensor, factors: blocks.Factors) -> Tensor:
        """Return `result + update(x)`."""
        return super().add(result, x, factors) if self._fits(factors) else GraloraLayer.add(self, result, x, factors)

    def fused(self, x: Tensor, adapter_name: str, factors: blocks.Factors) -> Tensor | None:
        """Return the output of base and adapter as one autograd function, where that is the same function."""
        return super().fused(x, adapter_name, factors) if self._fits(factors) else None

    def get_delta_weight(self, adapter_name: str, expert: int | None = None) -> Tensor:
        """Return ΔW `[V, d]` of one adapter."""
        return super().get_delta_weight(adapter_name)[: self.out_features]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: PEFT's conversion would untie the two."""
        return False

    def _fits(self, factors: blocks.Factors) -> bool:
        return factors.out_features == self.out_features


def _in_turned_order(holders: list[Factor | None]) -> list[Factor | None]:
    A, B, A_general, B_general = holders
    return [B, A, B_general, A_general]


def tied_targets(
    model: nn.Module, found: list[Target], outputs: list[str], embedding: list[Target], config: GraloraConfig
) -> list[Target]:
    """Return `found` without the tied output layers, and with the embedding that they are tied to.

    Args:
        model: The model.
        found: What `config` chooses.
        outputs: Names of the modules that are tied to the input embedding.
        embedding: The input embedding as a target.
        config: Config of the adapter.

    Raises:
        ValueError: An output layer with a bias or of another kind than nn.Linear.
    """
    (source,) = embedding
    chosen = {target.places[0][0] for target in found}
    if not chosen & {source.places[0][0], *outputs}:
        return found
    for name in outputs:
        module = model.get_submodule(name)
        base = module.get_base_layer() if isinstance(module, GraloraLayer) else module
        if type(base) is not nn.Linear:
            raise ValueError(
                f"`ensure_weight_tying` needs an output layer that is an nn.Linear; {name!r} is a "
                f"{type(base).__name__}."
            )
        if isinstance(module, GraloraLayer) and not isinstance(module, TiedLinear):
            raise ValueError(
                f"`ensure_weight_tying` must be the same for all adapters on {name!r}; there is one of its own."
            )
    add_target(config, source.places[0][0])
    kept = [target for target in found if target.places[0][0] not in outputs]
    return kept if source.places[0][0] in chosen else [*kept, source]


def add_target(config: Any, name: str) -> None:
    """Add a module to the targets of `config`, unless they name it already."""
    asked = config.target_modules
    if isinstance(asked, str):
        if not re.fullmatch(asked, name):
            config.target_modules = f"(?:{asked})|{re.escape(name)}"
    elif not any(name == target or name.endswith(f".{target}") for target in asked):
        config.target_modules = {*asked, name}


def tie_outputs(model: nn.Module, outputs: list[str], adapter_name: str) -> None:
    """Put the adapter of the input embedding on the output layers that are tied to it."""
    source: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    if not (isinstance(source, GraloraLayer) and source.has_adapter(adapter_name)):
        return
    for name in outputs:
        module = model.get_submodule(name)
        if not isinstance(module, TiedLinear):
            path, _, last = name.rpartition(".")
            module = TiedLinear(module)
            setattr(model.get_submodule(path), last, module)
        module.tie(adapter_name, source)

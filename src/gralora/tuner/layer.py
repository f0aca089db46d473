"""The tuner layer: adapters on a frozen layer, whatever kind of layer that is. The mathematics is in `blocks`."""

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, Self
from weakref import WeakSet

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from gralora.tuner import blocks
from gralora.tuner.config import LayerSettings
from gralora.tuner.dtypes import compute_dtype, update_dtype, without_autocast
from gralora.tuner.factor import Factor, FactorDict, tensor_of
from gralora.tuner.initialise import STARTS
from gralora.tuner.mergeable import MergeableLayer
from gralora.tuner.merging.dense_update import Part, delta, delta_dtype
from gralora.tuner.numerics import pinned_numerics


class GraloraLayer(MergeableLayer):
    """A frozen layer and the GraLoRA adapters on it (PEFT's contract for tuner layers).

    It holds its base and is no `nn.Linear` itself: tools that swap linears by type find the base.

    What differs between kinds of layers is in the hooks that a subclass overrides: `noun`, `can_be_sliced`,
    `pads_inputs`, `covers`, `refusal`, `parameters_of`, `features`, `weight_ref`, `record` and `update`;
    `compute_dtype`, `inputs` and `scaled`, where `update` does not take x and the factors themselves; `fill`, where
    adapters start otherwise; `add` and `fused`, where the kind has a faster way.

    Attributes:
        gralora_A: Adapter name to parameter `[k, n, r]`.
        gralora_B: Adapter name to parameter `[k, r, m]`.
        gralora_A_general: Adapter name to parameter `[hybrid_r, in]`, held as `.weight`.
        gralora_B_general: Adapter name to parameter `[out, hybrid_r]`, held as `.weight`.
        in_features, out_features: Widths of the base weight as a matrix.
        experts: `(number of experts,)` where the weight is a stack of matrices, and the factors likewise; else `()`.
        parameter_name: Name of the base weight in the base layer.
        r, hybrid_r, alpha, gralora_k, scaling: Adapter name to number.
    """

    adapter_layer_names = ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general")
    other_param_names = ("r", "hybrid_r", "alpha", "gralora_k", "scaling", "initial_scaling", "gralora_dropout")
    noun: ClassVar[str]  # what an error calls the base layers of this kind, in the plural
    can_be_sliced: ClassVar[bool] = False  # whether tensor parallelism may slice the features of the base
    pads_inputs: ClassVar[bool] = False  # whether the last input block may reach beyond the input's features
    pads_outputs: bool = False  # whether factors tied to those of an embedding reach beyond the output
    experts: tuple[int, ...] = ()
    # All living layers, copies and unpickled ones included. Kept when this module is reloaded.
    alive: ClassVar[WeakSet["GraloraLayer"]] = globals().setdefault("_alive", WeakSet())

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Create a layer and add it to `alive`: `gc` cannot list objects that `gc.freeze` hides."""
        layer = super().__new__(cls)
        cls.alive.add(layer)
        return layer

    def __init__(
        self,
        base_layer: nn.Module,
        quantization_backend: QuantizationBackend | None = None,
        parameter_name: str = "weight",
    ) -> None:
        super().__init__(base_layer, quantization_backend)
        self.parameter_name = parameter_name
        self.in_features, self.out_features = self.features(self.get_base_layer(), parameter_name)
        self.gralora_A = FactorDict()
        self.gralora_B = FactorDict()
        self.gralora_A_general = nn.ModuleDict()
        self.gralora_B_general = nn.ModuleDict()
        self.gralora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.hybrid_r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.gralora_k: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self.cast_input_dtype_enabled = True  # set by PEFT and diffusers; x is never cast up, so nothing depends on it
        self._active_adapter = []

    @classmethod
    def covers(cls, base: nn.Module, backend: QuantizationBackend | None) -> bool:
        """Return whether this kind is for layers like `base`."""
        raise NotImplementedError

    @classmethod
    def refusal(cls, base: nn.Module) -> str | None:
        """Return why this `base`, of a kind that is covered, cannot be adapted; None where it can."""
        return None

    @classmethod
    def parameters_of(cls, base: nn.Module) -> tuple[str, ...]:
        """Return the names of the weights in `base` that are adapted, each by a layer of its own around the others."""
        return ("weight",)

    @classmethod
    def features(cls, base: nn.Module, parameter_name: str = "weight") -> tuple[int, int]:
        """Return the widths `in, out` of a weight of `base` as a matrix."""
        raise NotImplementedError

    def record(self) -> dict[str, Any] | None:
        """Return what an adapter's config keeps of this layer, since its factors do not tell it; None for nothing.

        A record has "kind", and what reading the adapter without its base model needs: see `GraloraConfig.layer_kinds`.
        """
        return None

    def fill(self, init_weights: bool, factors: blocks.Factors) -> None:
        """Give `factors` their starting values, in place."""
        STARTS[init_weights](factors)

    def weight_name(self, name: str) -> str:
        """Return the name of the adapted weight, given the full name of this layer: that of a parameter has its own."""
        return name

    def nest(self) -> "dict[str, GraloraLayer]":
        """Return the layers of all adapted weights of the base by their names, the outermost first."""
        return {self.parameter_name: self}

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype in which the base layer computes on `x`."""
        return compute_dtype(x)

    def inputs(self, x: Tensor, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """Return what `update` gets of `x`: after dropout, in `dtype`."""
        return self.gralora_dropout[adapter_name](x).to(dtype)

    def scaled(self, factors: blocks.Factors, scale: float, dtype: torch.dtype, device: torch.device) -> blocks.Factors:
        """Return what `update` gets of `factors`: on `device` in `dtype`, with B and B_general times `scale`."""
        return factors.scaled(scale, dtype, device)

    def update(self, x: Tensor, factors: blocks.Factors) -> Tensor:
        """Return the adapter's output, in the shape of the base's output.

        Args:
            x: Input after dropout, in the compute dtype.
            factors: Factors as `scaled` returns them.
        """
        raise NotImplementedError

    def add(self, result: Tensor, x: Tensor, factors: blocks.Factors) -> Tensor:
        """Return `result + update(x, factors)` in the dtype of `result`. `result` is not modified."""
        return (result + self.update(x, factors)).to(result.dtype)

    def fused(self, x: Tensor, adapter_name: str, factors: blocks.Factors) -> Tensor | None:
        """Return the output of the base and one adapter, computed together; None to take the plain path.

        Args:
            x: Input of the layer, before dropout.
            adapter_name: Name of the adapter.
            factors: Factors as they are stored.
        """
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output plus the update of every active adapter that is not merged.

        Args:
            x: Input of the base layer.
            *args: Further arguments of the base layer.
            **kwargs: Further keyword arguments of the base layer.

        Returns:
            Output of the base's own shape and dtype.

        Raises:
            NotImplementedError: `adapter_names` asks for a different adapter in each row.
        """
        if kwargs.pop("adapter_names", None) is not None:
            raise NotImplementedError(
                "`adapter_names`, a different adapter for each row of a batch, cannot be used yet."
            )
        result = None
        for name in self._applied_adapters():
            factors = self.factors(name, call=True)
            if result is None and not (args or kwargs):
                result = self.fused(x, name, factors)
                if result is not None:
                    continue
            if result is None:
                result = self.base_layer(x, *args, **kwargs)
            result = self._add_update(result, x, name, factors)
        return self.base_layer(x, *args, **kwargs) if result is None else result

    def _applied_adapters(self) -> list[str]:
        if self._disable_adapters:
            return []
        held = self.gralora_A._modules
        merged = self.merged_adapters if self._merges else ()
        return [name for name in self.active_adapters if name in held and name not in merged]

    def _add_update(self, result: Tensor, x: Tensor, adapter_name: str, factors: blocks.Factors) -> Tensor:
        if result.is_nested:  # PyTorch's transformer encoder makes nested tensors of padded batches
            parts = zip(result.unbind(), x.unbind(), strict=True)
            return torch.nested.as_nested_tensor(
                [self._add_update(*part, adapter_name, factors) for part in parts], layout=result.layout
            )
        # Small tensors follow the big ones: the factors go to the compute dtype; x goes up in float16 alone.
        dtype = update_dtype(self.compute_dtype(x), factors)
        scaled = self.scaled(factors, self.scaling[adapter_name], dtype, x.device)
        inputs = self.inputs(x, adapter_name, dtype)
        with without_autocast(x):
            return self.add(result, inputs, scaled)

    def add_adapter(self, adapter_name: str, settings: LayerSettings, on_meta: bool = False) -> None:
        """Create the parameters of one adapter, on the device and in the dtype of the base.

        Args:
            adapter_name: Name of the adapter; one of that name is replaced.
            settings: Ranks, blocks, scale and initialisation.
            on_meta: Create them without storage, to be assigned by loading.

        Raises:
            ValueError: `gralora_k` does not divide `r` or a width of the layer.
        """
        if refusal := settings.width_refusal(self.in_features, self.out_features, self.pads_inputs):
            raise ValueError(refusal)
        device = torch.device("meta") if on_meta else None
        k, r, hybrid_r = settings.gralora_k, settings.r, settings.hybrid_r
        shapes = blocks.factor_shapes(k, r, hybrid_r, self.in_features, self.out_features, self.experts)
        factors = blocks.Factors(*(shape and torch.empty(*shape, device=device) for shape in shapes))
        self.fill(settings.init_weights, factors)
        for container, tensor in zip(self._containers(), factors, strict=True):
            if tensor is not None:
                container[adapter_name] = Factor(tensor)
        self.r[adapter_name] = r
        self.hybrid_r[adapter_name] = hybrid_r
        self.alpha[adapter_name] = settings.alpha
        self.gralora_k[adapter_name] = k
        self.scaling[adapter_name] = self.initial_scaling[adapter_name] = settings.scale
        p = settings.gralora_dropout
        self.gralora_dropout[adapter_name] = nn.Dropout(p) if p else nn.Identity()
        # Under accelerate's offloading the base weight itself is on meta; its hook knows where it computes.
        offload = getattr(self.get_base_layer(), "_hf_hook", None)
        self._move_adapter_to_device_of_base_layer(adapter_name, device=getattr(offload, "execution_device", None))

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        # PEFT looks for a weight of that name only.
        parameter = self.weight_ref().parameter if self.quantization_backend is None else None
        if parameter is None:
            return super()._get_base_layer_device_and_dtype(base_layer)
        return parameter.device, parameter.dtype

    def has_adapter(self, adapter_name: str) -> bool:
        """Return whether this layer has an adapter of that name."""
        return adapter_name in self.gralora_A

    def factors(self, adapter_name: str, call: bool = False) -> blocks.Factors:
        """Return the tensors of an adapter as they are stored.

        Args:
            adapter_name: Name of the adapter.
            call: Fetch them by calling their holders, as a forward pass must where these have hooks.
        """
        return blocks.Factors(
            *(
                holder if holder is None else holder() if call else tensor_of(holder)
                for holder in self._holders(adapter_name)
            )
        )

    def get_delta_weight(self, adapter_name: str, expert: int | None = None) -> Tensor:
        """Return ΔW of one adapter, in the shape in which the base stores its weight.

        Computed in float32 whatever the parameters are, in float64 for float64, outside autocast.

        Args:
            adapter_name: Name of the adapter.
            expert: Which matrix of a stack to return; all by default.
        """
        with pinned_numerics():
            part, ref = self.part(adapter_name), self.weight_ref()
            dtype = delta_dtype(part.factors.A.dtype)
            if not self.experts:
                return ref.stored(delta([part], dtype, 0, self.out_features)[:, : self.in_features])
            if expert is not None:
                return ref.stored(delta([part.expert(expert)], dtype))
            return torch.stack([ref.stored(delta([part.expert(e)], dtype)) for e in range(*self.experts)])

    def part(self, adapter_name: str) -> Part:
        """Return the factors and the scale of an adapter, as a merge takes them."""
        # Call the holders, so that a hook or parametrization that changes a factor is seen here as in a forward pass.
        # Not where calling frees the tensor again: offloaded holders and those wrapped by FSDP1.
        calls = all(
            h is None or (type(h) is Factor and not hasattr(h, "_hf_hook")) for h in self._holders(adapter_name)
        )
        return Part.gathered(self.factors(adapter_name, call=calls), self.scaling[adapter_name])

    def _holders(self, adapter_name: str) -> list[Factor | None]:
        return [container._modules.get(adapter_name) for container in self._containers()]

    def _containers(self) -> Iterator[nn.ModuleDict]:
        return (self._modules[name] for name in self.adapter_layer_names)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; a merged layer is unmerged first."""
        if self.merged:
            warnings.warn("The layer is merged: unmerging it before the adapter is set.", stacklevel=2)
            self.unmerge()
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; switching off unmerges."""
        if enabled:
            super().set_adapter(self.active_adapters)  # for `requires_grad`; a merged layer stays merged
            self._disable_adapters = False
            return
        if self.merged:
            warnings.warn("The adapters are merged: unmerging them to disable them.", stacklevel=2)
            self.unmerge()
        super().enable_adapters(False)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scaling of one adapter to `scale` times its configured one (PEFT's scale API)."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of every active adapter by `scale`."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of every active adapter by `scale`; None restores the configured one."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.initial_scaling[name] if scale is None else self.scaling[name] / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True: the update is additive."""
        return True

    def extra_repr(self) -> str:
        """Show the widths, and the quantisation of the base."""
        backend = self.quantization_backend
        quantised = f", quantization_backend={backend.backend_name!r}" if backend else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{quantised}"

    def __repr__(self) -> str:
        return "gralora." + super().__repr__()


def gralora_layers(model: nn.Module) -> dict[str, GraloraLayer]:
    """Return the GraLoRA layers in `model` by their full names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GraloraLayer)}

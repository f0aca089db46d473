"""The tuner layer: parameters, active adapters, dropout, dtype. The mathematics is in `blocks`."""

import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self
from weakref import WeakSet

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from gralora.tuner import blocks, fused
from gralora.tuner.config import LayerSettings
from gralora.tuner.merging import merge
from gralora.tuner.merging.dense_update import Part, delta, delta_dtype
from gralora.tuner.merging.quantised import PackedRecord, packed_fingerprint, packed_weight
from gralora.tuner.merging.records import CHANGED, ForgottenRecord, MergeRecord, Place
from gralora.tuner.merging.rows import fingerprint, window_of
from gralora.tuner.merging.sharing import UNSHARED, Sharing, is_alone, sharing_in
from gralora.tuner.numerics import pinned_numerics


class Factor(nn.Module):
    """Holder of one tensor, which calling it returns.

    A parameter inside a module that is called meets the hooks of accelerate and FSDP, and its name,
    `….gralora_A.default.weight`, is one that TRL finds when it copies an adapter.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        """Return the tensor."""
        weight = self.weight
        # PEFT's FSDP1 policy makes this a unit of its own, whose weight is a view of memory that is freed on return.
        return weight if type(weight) is nn.Parameter else weight.clone()


class FactorDict(nn.ModuleDict):
    """Adapter name to parameter, stored as `Factor` modules.

    `factors["default"]` is the parameter itself; `items()` and `values()` give the holders, as PEFT
    expects of a ModuleDict. Assigning a tensor gives a leaf that keeps the `requires_grad` of the
    parameter it replaces.
    """

    def __getitem__(self, key: str) -> nn.Parameter:
        return self._modules[key].weight

    def __setitem__(self, key: str, value: Tensor | nn.Module) -> None:
        if isinstance(value, nn.Module):
            super().__setitem__(key, value)
            return
        requires_grad = self[key].requires_grad if key in self else value.requires_grad
        if key not in self:
            super().__setitem__(key, Factor(value.detach()))
        self._modules[key].weight = nn.Parameter(value.detach(), requires_grad=requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A state dict of PEFT's own tuner has `gralora_A.<name>` where ours has `gralora_A.<name>.weight`.
        for name in self:
            if prefix + name in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


class GraloraLayer(nn.Module, BaseTunerLayer):
    """A frozen layer and the GraLoRA adapters on it (PEFT's contract for tuner layers).

    It holds its base and is no `nn.Linear` itself: tools that swap linears by type find the base.

    Attributes:
        gralora_A: Adapter name to parameter `[k, n, r]`.
        gralora_B: Adapter name to parameter `[k, r, m]`.
        gralora_A_general: Adapter name to parameter `[hybrid_r, in]`, held as `.weight`.
        gralora_B_general: Adapter name to parameter `[out, hybrid_r]`, held as `.weight`.
        r, hybrid_r, alpha, gralora_k, scaling: Adapter name to number.
    """

    adapter_layer_names = ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general")
    other_param_names = ("r", "hybrid_r", "alpha", "gralora_k", "scaling", "initial_scaling", "gralora_dropout")
    # Every layer, copies and unpickled ones too; a reload of this module keeps those of the class before.
    alive: ClassVar[WeakSet["GraloraLayer"]] = globals().setdefault("_alive", WeakSet())

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make a layer, and note that it is alive: the garbage collector does not see what `gc.freeze` hides."""
        layer = super().__new__(cls)
        cls.alive.add(layer)
        return layer

    def __init__(
        self,
        base_layer: nn.Module,
        in_features: int,
        out_features: int,
        quantization_backend: QuantizationBackend | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features = in_features
        self.out_features = out_features
        self.quantization_backend = quantization_backend
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
        self._sharing = UNSHARED  # as it was found last, for where there is no model to look at
        self._model: weakref.ref[nn.Module] | None = None
        self._merges: list[MergeRecord] = []
        self._active_adapter = []

    def add_adapter(self, adapter_name: str, settings: LayerSettings, on_meta: bool = False) -> None:
        """Create the parameters of one adapter, on the device and in the dtype of the base.

        Args:
            adapter_name: Its name; an adapter of that name is replaced.
            settings: Ranks, blocks, scale and initialisation.
            on_meta: Create them without storage, to be assigned by loading.

        Raises:
            ValueError: `gralora_k` divides `r` or a width of the layer with a remainder.
        """
        if remainder := self.misfit(settings.gralora_k, settings.r, self.in_features, self.out_features):
            raise ValueError(remainder)
        device = torch.device("meta") if on_meta else None
        k, r, q = settings.gralora_k, settings.r, settings.hybrid_r
        factors = blocks.Factors(
            A=torch.empty(k, self.in_features // k, r, device=device),
            B=torch.empty(k, r, self.out_features // k, device=device),
            A_general=torch.empty(q, self.in_features, device=device) if q else None,
            B_general=torch.empty(self.out_features, q, device=device) if q else None,
        )
        blocks.initialise_(factors, identity=settings.init_weights)
        for container, tensor in zip(self._containers(), factors, strict=True):
            if tensor is not None:
                container[adapter_name] = Factor(tensor)
        self.r[adapter_name] = r
        self.hybrid_r[adapter_name] = q
        self.alpha[adapter_name] = settings.alpha
        self.gralora_k[adapter_name] = k
        self.scaling[adapter_name] = self.initial_scaling[adapter_name] = settings.scaling
        p = settings.gralora_dropout
        self.gralora_dropout[adapter_name] = nn.Dropout(p) if p else nn.Identity()
        # Under accelerate's offloading the base weight itself is on meta; its hook knows where it computes.
        offload = getattr(self.get_base_layer(), "_hf_hook", None)
        self._move_adapter_to_device_of_base_layer(adapter_name, device=getattr(offload, "execution_device", None))

    @staticmethod
    def misfit(k: int, r: int, in_features: int, out_features: int) -> str | None:
        """Return why `k` blocks per side don't fit a layer of these widths, or None where they do."""
        for name, value in (("r", r), ("in_features", in_features), ("out_features", out_features)):
            if value % k:
                fitting = [d for d in range(1, r + 1) if not (r % d or in_features % d or out_features % d)]
                return (
                    f"`gralora_k` must divide `{name}`; got gralora_k={k} with {name}={value}. "
                    f"Values that fit r={r}, in_features={in_features}, out_features={out_features}: "
                    f"{', '.join(map(str, fitting))}."
                )
        return None

    def factors(self, adapter_name: str, call: bool = False) -> blocks.Factors:
        """Return the tensors of an adapter as they are stored.

        Args:
            adapter_name: Its name.
            call: Fetch them by calling their holders, as a forward pass must where these have hooks.
        """
        return blocks.Factors(
            *(
                holder if holder is None else holder() if call else holder.weight
                for holder in self._holders(adapter_name)
            )
        )

    def _holders(self, adapter_name: str) -> list[Factor | None]:
        return [container._modules.get(adapter_name) for container in self._containers()]

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return ΔW of one adapter, `[out, in]` (`[in, out]` where the base stores it so).

        Computed in float32 whatever the parameters are, in float64 for float64, outside autocast.
        """
        with pinned_numerics():
            part = self._part(adapter_name)
            update = delta([part], delta_dtype(part.factors.A.dtype))
        return update.T if self.fan_in_fan_out else update

    def _part(self, adapter_name: str) -> Part:
        # Whatever changes a factor when its holder is called changes it for a forward pass: a merge and a delta are to
        # agree with that. Of offloaded holders, and of those that FSDP1 wraps, a call would take the tensor away again.
        calls = all(
            h is None or (type(h) is Factor and not hasattr(h, "_hf_hook")) for h in self._holders(adapter_name)
        )
        return Part.gathered(self.factors(adapter_name, call=calls), self.scaling[adapter_name])

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base stores its weight as `[in, out]`, as transformers' Conv1D does."""
        return isinstance(self.get_base_layer(), Conv1D)

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into the base weight, in the order of merging."""
        return [name for record in self._merges for name in record.adapter_names]

    def obstacle_to_merging(self) -> str | None:
        """Return why the base weight can't be merged into, or None where it can."""
        return merge.obstacle_to_merging(self.get_base_layer(), self.quantization_backend)

    def refusal_to_merge(self, own_weights: bool = False) -> str | None:
        """Return why no merge is possible at the moment, and the way out; None where one is."""
        if obstacle := self.obstacle_to_merging():
            return f"{obstacle}. Training and inference still work."
        return self._absence() or merge.separation_refusal(self.get_base_layer(), self._sharing, own_weights)

    def refusal_to_unmerge(self) -> str | None:
        """Return why the merges can't be undone, or None.

        Costs one reading of the weight; where several merges lie one on another, all of their undoing but the writing.
        """
        if not self._merges:
            return None
        if absence := self._absence():
            return f"this layer can't be unmerged: {absence}"
        if len(self._merges) > 1 and (reason := self._history()[1]):
            return self._no_way_back(reason).obstacle(self, Place.now(self))
        return self._merges[-1].obstacle(self, Place.now(self))

    def _absence(self) -> str | None:
        if self.quantization_backend is not None:
            return None
        if self._merges and self.obstacle_to_merging():
            return f"{CHANGED}. Load the base model again."
        return merge.absence(self.get_base_layer())

    def fingerprint(self, place: Place) -> tuple[int, ...]:
        """Return the fingerprint of the weight that `place` holds; records compare it."""
        if self.quantization_backend is not None:
            return packed_fingerprint(place.base)
        return fingerprint(window_of(place.values, self.fan_in_fan_out).rows)

    def note_sharing(self, sharing: Sharing, model: nn.Module) -> None:
        """Remember what others in `model` hold of the base."""
        self._sharing, self._model = sharing, weakref.ref(model)

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        keep_base: bool = True,
        own_weights: bool = False,
    ) -> None:
        """Fold adapters into the base weight, all of them or none.

        Args:
            safe_merge: Refuse a result that is not finite.
            adapter_names: Which; the active ones by default. Those merged already are skipped.
            keep_base: Keep what `unmerge` needs to give the base weight its bits back.
            own_weights: Write to a new parameter, whoever holds the old one. By default that is done where another
                part of the model does.

        Raises:
            ValueError: A non-finite result with `safe_merge`.
            RuntimeError: The base weight can't be read or rewritten.
        """
        if self._disable_adapters:
            warnings.warn("The adapters are disabled: nothing is merged. Enable them first.", stacklevel=2)
            return
        model = None if self._model is None else self._model()
        if is_alone(self):
            self._sharing = UNSHARED
        elif model is not None:
            self._sharing = sharing_in(model, [self])[self]
        elif not isinstance(getattr(self.get_base_layer(), "weight", None), DTensor):
            self._sharing = self._sharing._replace(weight=True)  # nobody knows: the safe side
        self.merge_knowing_holders(safe_merge, adapter_names, keep_base, own_weights)

    def merge_knowing_holders(
        self, safe_merge: bool, adapter_names: list[str] | None, keep_base: bool = True, own_weights: bool = False
    ) -> None:
        """Do what `merge` does, enabled or not, where `note_sharing` was told just before."""
        wanted = check_adapters_to_merge(self, adapter_names)
        names = [name for name in dict.fromkeys(wanted) if name in self.gralora_A]
        if not names:
            return
        if refusal := self.refusal_to_merge(own_weights):
            raise RuntimeError(f"this layer can't be merged: {refusal}")
        parts = [self._part(name) for name in names]
        sharing = self._sharing._replace(weight=True) if own_weights else self._sharing
        self._write_merge(*merge.prepare(self, names, parts, safe_merge, keep_base, sharing))

    def _write_merge(self, record: MergeRecord, write: Callable[[], None]) -> None:
        earlier = self._merges
        final = isinstance(record, ForgottenRecord)
        if final:  # what was merged before can't be reached any more
            record.adapter_names = [*self.merged_adapters, *record.adapter_names]
        # The record first, so that no moment has a merged weight and no way back.
        try:
            self._merges = [record] if final else [*earlier, record]
            write()
        except BaseException:
            if not final:
                self.undo_merges(len(earlier))
            elif self.fingerprint(Place.now(self)) != record.after:
                self._merges = earlier
            raise

    def names_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """Return which of the named adapters, by default the active ones, this layer has and has not merged yet."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        return [name for name in wanted if name in self.gralora_A and name not in self.merged_adapters]

    def unmerge(self) -> None:
        """Undo every merge, or none; the base weight gets its bits back.

        Raises:
            RuntimeError: The base weight is not here as a whole, or was changed since; nothing has changed then.
        """
        if not self._merges:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.undo_merges()

    def undo_merges(self, depth: int = 0) -> None:
        """Undo all merges but the first `depth`, or none.

        Raises:
            RuntimeError: As in `unmerge`.
        """
        if len(self._merges) <= depth:
            return
        if absence := self._absence():
            raise RuntimeError(f"this layer can't be unmerged: {absence}")
        place = Place.now(self)
        for record in reversed(self._merges[depth:]):
            place = record.recover(self, place)
        try:
            place.put_back(self)
            self._merges = self._merges[:depth]
        except BaseException:  # an interrupt: the rest is two assignments
            place.put_back(self)
            self._merges = self._merges[:depth]
            raise

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, merged or as it was (PEFT calls this from `merge_and_unload` and `unload`)."""
        if merge:
            if missing := self.names_to_merge(adapter_names):
                self.merge_knowing_holders(safe_merge, missing)
        elif self.merged:
            self.unmerge()
        return self.get_base_layer()

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
        """Divide the scaling of every active adapter by `scale`; None goes back to the configured one."""
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

    def _containers(self) -> Iterator[nn.ModuleDict]:
        return (self._modules[name] for name in self.adapter_layer_names)

    def __getstate__(self) -> dict[str, Any]:
        # Deepcopy and pickle: what undoes a merge must not depend on the machine that made it.
        history, reason = self._history()
        merges = [record.portable(self, earlier) for record, earlier in reversed(history)]
        return self.__dict__ | {"_model": None, "_merges": merges if reason is None else [self._no_way_back(reason)]}

    def _history(self) -> tuple[list[tuple[MergeRecord, Any]], str | None]:
        """Return every merge, the latest first, with the weight from before it; or why that is not known."""
        history, place = [], Place.now(self)
        for record in reversed(self._merges):
            if isinstance(record, ForgottenRecord):
                return [], record.reason
            try:
                place = record.recover(self, place)
            except RuntimeError:
                return [], CHANGED
            history.append((record, place))
        return history, None

    def _no_way_back(self, reason: str) -> ForgottenRecord:
        return ForgottenRecord(self.merged_adapters, (), (), reason)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GraloraLayer":
        # `.to`, `.half`, `.cuda` of a merged layer: both the merged weight and the one that comes back are converted.
        if self._merges:
            weight = packed_weight(self.get_base_layer())
            with torch.no_grad():
                probe = fn(torch.empty(0, dtype=weight.dtype, device=weight.device))
            if (probe.dtype, probe.device) != (weight.dtype, weight.device):
                self._convert_merged(fn, recurse, to_meta=probe.is_meta)
                return self
        super()._apply(fn, recurse)
        return self

    def _convert_merged(self, fn: Callable[[Tensor], Tensor], recurse: bool, to_meta: bool) -> None:
        history, reason = self._history()
        reason = "its weights were moved to the meta device" if to_meta else reason
        if reason is not None:
            super()._apply(fn, recurse)
            self._merges = [self._no_way_back(reason)]
            return
        if isinstance(self._merges[0], PackedRecord):
            merges: list[Any] = self._merges
            self.undo_merges()
            super()._apply(fn, recurse)
            for record in merges:
                self._write_merge(*merge.prepare(self, record.adapter_names, record.parts, sharing=self._sharing))
            return
        # What only the record holds is converted here; a parameter that other modules hold too, by them or here.
        converted = [None if place.values is place.parameter else fn(place.values) for _, place in history]
        parameter = self.get_base_layer().weight
        super()._apply(fn, recurse)
        now, merges = Place.now(self), []
        for (record, place), values in zip(history, converted, strict=True):
            if place.parameter is parameter:
                place = place._replace(parameter=now.parameter)
            elif (place.parameter.dtype, place.parameter.device) != (now.values.dtype, now.values.device):
                place.parameter.data = fn(place.parameter.data)
            earlier = place._replace(values=place.parameter if values is None else values)
            merges.insert(0, record.converted(self, earlier, now))
            now = earlier
        self._merges = merges


class Linear(GraloraLayer):
    """GraLoRA on `nn.Linear`, transformers' `Conv1D`, and what PEFT has a linear quantisation backend for."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output plus the update of every active adapter that is not merged.

        Args:
            x: Input `[..., in]`, any number of leading dimensions, none included.
            *args: Passed on to the base layer.
            **kwargs: Likewise.

        Returns:
            Output `[..., out]` in the dtype of the base's own output.

        Raises:
            NotImplementedError: `adapter_names` asks for a different adapter in each row.
        """
        if kwargs.pop("adapter_names", None) is not None:
            raise NotImplementedError(
                "`adapter_names`, a different adapter for each row of a batch, can't be used yet."
            )
        result = None
        for name in self._applied_adapters():
            factors = self.factors(name, call=True)
            if result is not None:
                result = self._add_update(result, x, name, factors)
            elif not (args or kwargs) and fused.applies(self.base_layer, x, factors):
                result = self._fused(x, name, factors)
            else:
                result = self._add_update(self.base_layer(x, *args, **kwargs), x, name, factors)
        return self.base_layer(x, *args, **kwargs) if result is None else result

    def _applied_adapters(self) -> list[str]:
        if self._disable_adapters:
            return []
        held = self.gralora_A._modules
        merged = self.merged_adapters if self._merges else ()
        return [name for name in self.active_adapters if name in held and name not in merged]

    def _fused(self, x: Tensor, adapter_name: str, factors: blocks.Factors) -> Tensor:
        base: Any = self.base_layer
        dropout = self.gralora_dropout._modules[adapter_name]
        rows = x.reshape(-1, self.in_features)
        dropped = dropout(rows) if dropout.training and type(dropout) is not nn.Identity else None
        y = fused.linear(rows, dropped, base.weight, base.bias, factors, self.scaling[adapter_name])
        return y.view(*x.shape[:-1], self.out_features)

    def _add_update(self, result: Tensor, x: Tensor, adapter_name: str, factors: blocks.Factors) -> Tensor:
        if result.is_nested:  # PyTorch's transformer encoder packs padded batches so
            parts = zip(result.unbind(), x.unbind(), strict=True)
            return torch.nested.as_nested_tensor(
                [self._add_update(*part, adapter_name, factors) for part in parts], layout=result.layout
            )
        inputs, factors = self._operands(x, adapter_name, factors)
        rows = result.reshape(-1, self.out_features)
        with fused.without_autocast(x):
            if result.dtype == inputs.dtype:
                updated = blocks.add(rows, inputs, factors, 1.0)
            else:
                updated = (rows + blocks.apply(inputs, factors, 1.0)).to(result.dtype)
        return updated.view(result.shape)

    def _operands(self, x: Tensor, adapter_name: str, factors: blocks.Factors) -> tuple[Tensor, blocks.Factors]:
        """Return what is multiplied: the rows of x after dropout, and the factors, the scale on the B's."""
        # Small tensors follow the big ones: the factors go to the compute dtype; x goes up in float16 alone.
        dtype = fused.update_dtype(fused.compute_dtype(x), factors)
        rows = self.gralora_dropout[adapter_name](x).reshape(-1, x.shape[-1]).to(dtype)
        return rows, factors.scaled(self.scaling[adapter_name], dtype, x.device)


def resolve_base(module: nn.Module, **quantization: Any) -> QuantizationBackend | None:
    """Return the quantisation backend of a layer that `Linear` can extend, None for a plain one.

    Raises:
        TypeError: `Linear` can't extend it.
    """
    try:
        backend = resolve_quantization_backend(module, **quantization)
    except ValueError:  # torchao without transformers' quantizer, whose recipe a merge would need
        backend = ForwardOnlyQuantizationBackend("torchao")
    if backend is None and not isinstance(module, nn.Linear | Conv1D):
        raise TypeError(
            f"GraLoRA adapts nn.Linear and transformers' Conv1D, quantised or not; got {type(module).__name__}."
        )
    if backend is not None and backend.layer_type != "linear":
        raise TypeError(f"GraLoRA adapts linear layers; got {type(module).__name__}.")
    return backend

"""GraloraModel: finds the targets, checks them all, then puts the layers in."""

import copy
import difflib
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    onload_layer,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper, TaskType
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from gralora.tuner import tensor_parallel
from gralora.tuner.config import GraloraConfig, LayerSettings
from gralora.tuner.layer import GraloraLayer, Linear, resolve_base
from gralora.tuner.merging.merge import agreed
from gralora.tuner.merging.sharing import sharing_in
from gralora.tuner.saving import check_complete, check_whole, gathered, plain_name
from gralora.tuner.targets import exact_targets

# Modules whose caller reads their weight instead of calling them, by transformers' `model_type`: an
# adapter there would train and do nothing.
_MAMBA = {"out_proj", "conv1d"}
_WEIGHT_READERS = {
    "mamba": _MAMBA | {"x_proj", "dt_proj"},
    "falcon_mamba": _MAMBA | {"x_proj", "dt_proj"},
    "mamba2": _MAMBA,
    "nemotron_h": _MAMBA,
    "falcon_h1": _MAMBA,
    "bamba": _MAMBA,
    "granitemoehybrid": _MAMBA,
    "zamba2": _MAMBA,
    "wavlm": {"q_proj", "k_proj", "v_proj", "out_proj"},
}


# Heads that PEFT trains whole, by `task_type`, and adds to `modules_to_save` only after injection.
_HEADS = {
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


@dataclass
class _Target:
    """A module that an adapter is about to be put on.

    One module may hang at several places of the model. Its first name is the one that PEFT knows.
    """

    module: nn.Module
    places: list[tuple[str, nn.Module]]  # full name and parent

    @property
    def name(self) -> str:
        return self.places[0][0]

    @property
    def parents(self) -> list[nn.Module]:
        return [parent for _, parent in self.places]

    def settings(self, config: GraloraConfig) -> LayerSettings:
        """Return what the adapter is on this module, whose names must agree on it."""
        settings = {config.settings_for(name) for name, _ in self.places}
        if len(settings) > 1:
            names = ", ".join(repr(name) for name, _ in self.places)
            raise ValueError(
                "a module has one adapter, and `rank_pattern`, `alpha_pattern` and `k_pattern` give different values "
                f"to its names {names}. Write keys that match all of them."
            )
        return settings.pop()

    def misfit(self, config: GraloraConfig) -> str | None:
        settings = self.settings(config)
        in_features, out_features = _widths(self.module)
        return GraloraLayer.misfit(settings.gralora_k, settings.r, in_features, out_features)

    def is_trained_whole(self, config: GraloraConfig) -> bool:
        """Whether PEFT trains a copy of it: it takes each module whose name ends in one of `modules_to_save`."""
        endings = (*_HEADS.get(config.task_type, ()), *(config.modules_to_save or ()))
        return any(part.endswith(endings) for name, _ in self.places for part in _paths(name))


class GraloraModel(BaseTuner):
    """A model with GraLoRA adapters on some of its layers (PEFT's contract for tuners).

    Made by `get_peft_model` and `PeftModel.from_pretrained`; everything is checked before the model is
    touched, and a failure leaves it as it was.
    """

    prefix = "gralora_"
    tuner_layer_cls = GraloraLayer
    _places: dict[int, list[tuple[str, nn.Module]]] = {}  # by the module's id, as of the latest walk
    _names: dict[str, list[str]] = {}
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put the adapter `adapter_name` on `model` (PEFT's contract), or leave it as it was.

        A config of ours is kept, as PEFT changes it later, and `target_modules` is resolved in it; one of PEFT's
        own class is converted.

        Raises:
            ValueError: A width that `gralora_k` can't divide, a layer whose weight is read by its caller, or a head
                that PEFT trains whole.
            TypeError: A module of a kind that GraLoRA can't adapt.
            RuntimeError: A base weight that lies on disk.
        """
        # A plain assignment, not an item of `other_param_names`: BaseTuner offers no way to pass it on.
        self._create_on_meta = low_cpu_mem_usage
        with _all_or_nothing(model, self.peft_config, adapter_name):
            config = self.peft_config[adapter_name] = GraloraConfig.adopt(self.peft_config[adapter_name])
            asked, all_linear = config.target_modules, config.asks_for_all_linear
            config = self._prepare_adapter_config(config, self.get_model_config(model))
            self._places = _places(model)
            self._names = {places[0][0]: [name for name, _ in places] for places in self._places.values()}
            targets = self._find_targets(model, config, state_dict)
            if all_linear:
                targets = targets if state_dict else self._leave_out_misfits(targets, config)
                config.target_modules = self._exact_targets(targets, model)
            elif isinstance(asked, set) and state_dict is None:
                _warn_of_unmatched_names(asked, self._places)
            for target in targets:
                self._check_target(target, config, model)
            for name, module in model.named_modules():
                if _Target(module, [(name, module)]).is_trained_whole(config):
                    tensor_parallel.check_trained_whole(model, name, module)
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            self._mark_shared_weights()
            _announce_unmergeable(target for target in targets if not isinstance(target.module, GraloraLayer))
        self._places = {}

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        keep_base: bool = True,
        own_weights: bool = False,
    ) -> None:
        """Merge adapters into the base weights, in every layer or in none.

        A base weight is written in place, unless another part of the model holds it, or some of its memory, too:
        then the adapted layer gets a parameter of its own. Looked at are the parameters, buffers and tensor
        attributes of all its modules. What lies elsewhere, in another model that shares weights with this one, a list
        or a variable, is not seen; `own_weights=True` leaves the weights of those alone.

        Args:
            adapter_names: Which; the active ones by default.
            safe_merge: Refuse a result that is not finite.
            keep_base: Keep what `unmerge_adapter` needs to give the base weights their bits back. Without,
                the merge is final, and all or nothing only against what can be found beforehand.
            own_weights: Write every merged weight to a new parameter, of which only this model knows.

        Raises:
            ValueError: An adapter that does not exist, or with `safe_merge` a non-finite result.
            RuntimeError: A base weight that can't be read or rewritten.
        """
        layers = self._gralora_layers()
        if any(layer.disable_adapters for layer in layers.values()):
            warnings.warn("The adapters are disabled: nothing is merged. Enable them first.", stacklevel=2)
            return
        self._merge(layers, adapter_names, safe_merge, keep_base, own_weights)

    def _merge(
        self,
        layers: dict[str, GraloraLayer],
        adapter_names: list[str] | None,
        safe_merge: bool,
        keep_base: bool = True,
        own_weights: bool = False,
    ) -> None:
        if unknown := sorted(set(adapter_names or ()) - set(self.peft_config)):
            raise ValueError(
                f"`adapter_names` must name adapters of this model, {sorted(self.peft_config)}; got {unknown}."
            )
        self._mark_shared_weights()
        for name, layer in layers.items():
            if refusal := layer.refusal_to_merge(own_weights):
                raise RuntimeError(f"Nothing was merged: {name!r} can't be, because {refusal}")
            if safe_merge and not keep_base:
                _check_finite_update(name, layer, adapter_names)
        depths = [(layer, len(layer._merges)) for layer in layers.values()]
        name, done = "", 0
        try:
            for name, layer in layers.items():  # noqa: B007 (read where an error is told)
                with onload_layer(layer):
                    layer.merge_knowing_holders(safe_merge, adapter_names, keep_base, own_weights)
                done += 1
        except BaseException as error:
            for merged, depth in reversed(depths if keep_base else []):
                with onload_layer(merged):
                    merged.undo_merges(depth)
            undone = "no layer was merged" if keep_base else f"{done} layers before it are merged for good"
            where = f"at {name!r}; {undone}"
            if type(error) in (ValueError, RuntimeError):
                raise type(error)(f"{error} ({where})") from error
            error.add_note(where)
            raise

    def unmerge_adapter(self) -> None:
        """Undo every merge: in every layer, whose base weights get their bits back, or in none.

        Raises:
            RuntimeError: A base weight that is not here as a whole, was changed since it was merged, or was merged
                with `keep_base=False`.
        """
        merged = {name: layer for name, layer in self._gralora_layers().items() if layer.merged}
        if not merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        for name, layer in merged.items():
            with onload_layer(layer):
                refusal = layer.refusal_to_unmerge()
                everywhere = agreed(refusal is None, getattr(layer.get_base_layer(), "weight", None))
            if not everywhere:
                raise RuntimeError(f"Nothing was unmerged: at {name!r}, {refusal or 'another process refuses.'}")
        for layer in merged.values():
            with onload_layer(layer):
                layer.undo_merges()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters (PEFT's contract); a merged model is unmerged first."""
        self._unmerge_to("set the adapter")
        super().set_adapter(adapter_name, inference_mode)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off (PEFT's contract); a merged model is unmerged first, and stays so."""
        self._unmerge_to("disable the adapters")
        super().disable_adapter_layers()

    def _unmerge_to(self, purpose: str) -> None:
        if any(layer.merged for layer in self._gralora_layers().values()):
            warnings.warn(f"The adapters are merged. Unmerging the model first, to {purpose}.", stacklevel=3)
            self.unmerge_adapter()

    def _gralora_layers(self) -> dict[str, GraloraLayer]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, GraloraLayer)}

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        # Merging or unmerging first, over all layers, keeps the whole atomic; what follows only swaps modules.
        layers = self._gralora_layers()
        if merge:
            missing = {name: layer for name, layer in layers.items() if layer.names_to_merge(adapter_names)}
            self._merge(missing, adapter_names, safe_merge)
        elif any(layer.merged for layer in layers.values()):
            self.unmerge_adapter()
        return self._unload(merge, progressbar, safe_merge, adapter_names)

    def _unload(self, merge: bool, progressbar: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        tied = self.get_model_config(self.model).get("tie_word_embeddings")
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if tied and not self.get_model_config(model).get("tie_word_embeddings"):
            _untie(model)
        return model

    def unload_merged(self, adapter_names: list[str]) -> nn.Module:
        """Return the base model without the tuner layers, whose adapters were merged one by one before."""
        return self._unload(True, False, False, adapter_names)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not yet: combining adapters.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("`add_weighted_adapter` can't be used with GraLoRA yet.")

    def _check_merge_allowed(self) -> None:
        """Tied weights need no warning: a merge gives the adapted module a parameter of its own."""

    def _check_target(self, target: _Target, config: GraloraConfig, model: nn.Module) -> None:
        try:
            if target.is_trained_whole(config):
                raise ValueError("PEFT trains this module whole, by `modules_to_save` or `task_type`.")
            for name, parent in target.places:
                self._check_target_module_compatiblity(config, model, name.rpartition(".")[2])
                if isinstance(parent, nn.MultiheadAttention):
                    raise TypeError("nn.MultiheadAttention reads this layer's weight instead of calling it.")
            if not isinstance(target.module, GraloraLayer):
                resolve_base(target.module, **get_quantization_kwargs(model))
            if misfit := target.misfit(config):
                raise ValueError(misfit)
        except (TypeError, ValueError) as error:
            way_out = "Take it out of `target_modules`, or name it in `exclude_modules`."
            raise type(error)(f"{target.name!r} can't be adapted: {error} {way_out}") from None
        weight = getattr(target.module, "weight", None)
        on_disk = isinstance(weight, Tensor) and weight.device.type == "meta" and not hasattr(target.module, "_hf_hook")
        if on_disk and "disk" in getattr(model, "hf_device_map", {}).values():
            raise RuntimeError(
                f"{target.name!r} can't be adapted: its weight is offloaded to disk, and PEFT's loading over disk "
                "offload knows LoRA's names only. Load the base model with more CPU memory (`max_memory`), or put "
                "the adapter on with `get_peft_model` and load its weights with `set_peft_model_state_dict`."
            )

    def _check_target_module_compatiblity(self, peft_config: GraloraConfig, model: nn.Module, target_name: str) -> None:
        model_type = self.get_model_config(model).get("model_type")
        if target_name in _WEIGHT_READERS.get(model_type, ()):
            raise ValueError(
                f"models of type {model_type!r} read the weight of {target_name!r} instead of calling it, so that an "
                "adapter there does nothing."
            )

    def _check_target_module_exists(self, peft_config: GraloraConfig, key: str) -> Any:
        # PEFT asks for the first name of a module; the others count as well.
        matches = [check_target_module_exists(peft_config, name) for name in self._names.get(key, [key])]
        return next((match for match in matches if isinstance(match, _ExcludedModule)), any(matches))

    def _find_targets(
        self, model: nn.Module, config: GraloraConfig, state_dict: dict[str, Tensor] | None
    ) -> list[_Target]:
        """Return the modules that `config` or the keys of `state_dict` choose, without changing anything.

        `"all-linear"` chooses modules; other targets choose names, as PEFT matches them.
        """
        modules = dict(model.named_modules())
        if state_dict is None:
            resolved = copy.copy(config)
            _maybe_include_all_linear_layers(resolved, model)
            chosen = [name for name in modules if self._check_target_module_exists(resolved, name)]
            if config.asks_for_all_linear:
                chosen = [name for name in chosen if name in resolved.target_modules]
        else:
            named = {key.rsplit(f".{self.prefix}", 1)[0].removeprefix("_orig_mod.") for key in state_dict}
            chosen = [name for name in modules if name.removeprefix("_orig_mod.") in named]
        inside = _inside_tuner_layers(model)
        return [
            _Target(modules[name], self._places[id(modules[name])])
            for name in chosen
            if name and not name.startswith(inside)
        ]

    def _leave_out_misfits(self, targets: list[_Target], config: GraloraConfig) -> list[_Target]:
        """Return the targets that fit; say once which of "all linear layers" do not."""
        targets = [target for target in targets if not target.is_trained_whole(config)]
        readers = _WEIGHT_READERS.get(self.get_model_config(self.model).get("model_type"), ())
        fitting, left_out = [], []
        for target in targets:
            is_read = any(
                isinstance(p, nn.MultiheadAttention) or n.rpartition(".")[2] in readers for n, p in target.places
            )
            (left_out if is_read or target.misfit(config) else fitting).append(target)
        if targets and not fitting:
            reason = targets[0].misfit(config) or "its weight is read without calling it."
            raise ValueError(
                f"`target_modules='all-linear'` must find a layer that can be adapted; none of {len(targets)} can. "
                f"{targets[0].name!r}: {reason}"
            )
        if left_out:
            names = ", ".join(repr(target.name) for target in left_out[:8])
            more = f" and {len(left_out) - 8} more" if len(left_out) > 8 else ""
            warnings.warn(
                f"`target_modules='all-linear'` leaves out {names}{more}: `gralora_k={config.gralora_k}` does not "
                "divide their widths, or their weight is read without calling them. Name them in `exclude_modules` to "
                "silence this.",
                stacklevel=2,
            )
        return fitting

    def _exact_targets(self, targets: list[_Target], model: nn.Module) -> set[str] | str:
        chosen, inside = {id(target.module) for target in targets}, _inside_tuner_layers(model)
        others = (name for key, places in self._places.items() if key not in chosen for name, _ in places)
        return exact_targets([target.name for target in targets], [n for n in others if not n.startswith(inside)])

    def _create_and_replace(
        self,
        peft_config: GraloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer, found = target, _Target(target, self._places_of(target))
        if not isinstance(layer, GraloraLayer):
            backend = resolve_base(target, **get_quantization_kwargs(self.model))
            if placement := tensor_parallel.placement_of(
                self.model, current_key, target, quantised=backend is not None
            ):
                layer = tensor_parallel.TensorParallelLinear(target, *_widths(target), *placement, backend)
            else:
                layer = Linear(target, *_widths(target), quantization_backend=backend)
            if any(isinstance(parent, nn.TransformerEncoderLayer) for parent in found.parents):
                # PyTorch's inference fast path reads the weights of its linears; a hook on one turns it off.
                layer.register_forward_pre_hook(_do_nothing)
        layer.add_adapter(adapter_name, found.settings(peft_config), on_meta=self._create_on_meta)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies `weight` over, which a head that is a container of modules does not have, and
        # replaces a module that hangs at several places at one of them.
        places = self._places_of(child)
        setattr(parent, child_name, new_module)
        for name, owner in places:
            if owner._modules.get(name.rpartition(".")[2]) is child:
                setattr(owner, name.rpartition(".")[2], new_module)

    def _places_of(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        if id(module) not in self._places:
            self._places = _places(self.model)
        return self._places[id(module)]

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                "`adapter_names`, a different adapter for each row of a batch, can't be used yet."
            )
        yield

    def _mark_shared_weights(self) -> None:
        for layer, sharing in sharing_in(self.model, list(self._gralora_layers().values())).items():
            layer.note_sharing(sharing, self.model)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: GraloraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        if any(isinstance(module, GraloraLayer) and module.merged for module in model.modules()):
            warnings.warn(
                "The adapter is merged; what is saved is the adapter alone. For the merged model, save what "
                "`merge_and_unload()` returns.",
                stacklevel=2,
            )
        # A model that PEFT's own tuner adapted before ours was registered is saved by this, too.
        layers = {
            plain_name(name): module
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer) and hasattr(module, "gralora_A")
        }
        containers = {f"{layer}.{container}" for layer in layers for container in GraloraLayer.adapter_layer_names}

        def is_adapters(key: str) -> bool:
            if key == "bias" or key.endswith(".bias"):
                of_layer = key.removesuffix(".base_layer.bias") in layers
                return config.bias == "all" or (config.bias == "gralora_only" and of_layer)
            # `….gralora_A.<adapter>.weight`; of PEFT's own tuner without the last part
            return key.rsplit(".", 2)[0] in containers or key.rsplit(".", 1)[0] in containers

        tensors = gathered(model, {key: tensor for key, tensor in state_dict.items() if is_adapters(key)})
        check_whole(tensors)
        if any(f".{cls.prefix}" in key for key in state_dict):  # a process that saves nothing passes an empty one
            check_complete(layers, adapter_name, tensors)
        # What else is saved, PEFT takes out of `state_dict` after this.
        beside = _embeddings(model)
        others = tuple(
            f"{plain_name(name)}."
            for name, module in model.named_modules()
            if isinstance(module, AuxiliaryTrainingWrapper) or any(module is e for e in beside)
        )
        state_dict |= gathered(model, {key: tensor for key, tensor in state_dict.items() if key.startswith(others)})
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: GraloraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # A module at several places is saved under its first name, and looked for under each.
        names = {at[0][0]: [name for name, _ in at[1:]] for at in _places(model).values() if len(at) > 1}
        for key, tensor in list(found.items()):
            holder, _, parameter = key.rpartition(".")
            found |= {f"{name}.{parameter}": tensor for name in names.get(holder, ())}
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for factor in ("gralora_A", "gralora_B"):
            for ending in (f".{factor}.{adapter_name}.weight", f".{factor}.{adapter_name}"):
                if key.endswith(ending):
                    return key.removesuffix(ending) + f".{factor}"
        return super()._remove_adapter_name_from_key(key, adapter_name)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scaling of every active GraLoRA adapter in `model` while the context lasts.

    Args:
        model: Any module with GraLoRA layers in it.
        multiplier: A finite number.

    Raises:
        ValueError: No GraLoRA layer in `model`, or a multiplier that is not a finite number.
    """
    layers = [module for module in model.modules() if isinstance(module, GraloraLayer)]
    if not layers:
        raise ValueError(f"`model` must have GraLoRA layers; got {type(model).__name__} without any.")
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float) or not abs(multiplier) < float("inf"):
        raise ValueError(f"`multiplier` must be a finite number; got multiplier={multiplier!r}.")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(multiplier)
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def _places(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Return the full name and the parent of each place where a module hangs, by its id."""
    places: dict[int, list[tuple[str, nn.Module]]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if name:
            places.setdefault(id(module), []).append((name, modules[name.rpartition(".")[0]]))
    return places


def _inside_tuner_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the beginnings of all names inside tuner layers."""
    named = model.named_modules(remove_duplicate=False)
    return tuple(f"{name}." for name, module in named if isinstance(module, BaseTunerLayer))


def _paths(name: str) -> list[str]:
    """Return `name` and the names of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


@contextmanager
def _all_or_nothing(model: nn.Module, configs: dict[str, Any], adapter_name: str) -> Iterator[None]:
    """Put the module tree, `requires_grad`, the adapter's settings and the config back if the body raises."""
    config = configs[adapter_name]
    fields = dict(vars(config))
    children = [(module, dict(module._modules)) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = [(m, m._active_adapter) for m in model.modules() if isinstance(m, GraloraLayer)]
    try:
        yield
    except BaseException:
        configs.pop(adapter_name, None)
        vars(config).clear()
        vars(config).update(fields)
        for module, submodules in children:
            module._modules.clear()
            module._modules.update(submodules)
        for parameter, requires_grad in trainable:
            parameter.requires_grad = requires_grad
        for layer, names in active:
            layer._active_adapter = names
            for attribute in layer.other_param_names:
                settings = getattr(layer, attribute)
                if isinstance(settings, dict):
                    settings.pop(adapter_name, None)
        raise


def _check_finite_update(name: str, layer: GraloraLayer, adapter_names: list[str] | None) -> None:
    """Refuse a non-finite update before a merge that can't be undone."""
    for adapter in layer.active_adapters if adapter_names is None else adapter_names:
        if adapter in layer.gralora_A and not torch.isfinite(layer.get_delta_weight(adapter)).all():
            raise ValueError(
                f"the merged weight must be finite; {adapter!r} has a non-finite update "
                f"(at {name!r}; no layer was merged)"
            )


def _warn_of_unmatched_names(asked: set[str], places: dict[int, list[tuple[str, nn.Module]]]) -> None:
    """Name the entries of a target list that match nothing; where nothing matches at all, PEFT raises."""
    names = [name for module_places in places.values() for name, _ in module_places]
    unmatched = sorted(t for t in asked if not any(name == t or name.endswith(f".{t}") for name in names))
    if not unmatched or len(unmatched) == len(asked):
        return
    parents = {id(parent) for module_places in places.values() for _, parent in module_places}
    last_parts = {at[0][0].rpartition(".")[2] for key, at in places.items() if key not in parents}
    hints = []
    for target in unmatched:
        near = difflib.get_close_matches(target.rpartition(".")[2], sorted(last_parts), n=3)
        hints.append(f"{target!r}" + (f" (nearest: {', '.join(map(repr, near))})" if near else ""))
    warnings.warn(f"`target_modules` names that match no module: {'; '.join(hints)}.", stacklevel=2)


def _announce_unmergeable(targets: Iterator[_Target]) -> None:
    obstacles = Counter()
    for target in targets:
        layer = getattr(target.parents[0], target.name.rpartition(".")[2])
        if isinstance(layer, GraloraLayer) and (obstacle := layer.obstacle_to_merging()):
            obstacles[obstacle] += 1
    for obstacle, count in obstacles.items():
        warnings.warn(
            f"{count} adapted layers cannot be merged: {obstacle}. Training and inference still work.", stacklevel=2
        )


def _untie(model: nn.Module) -> None:
    """Give every module its own parameters: a model that is loaded as untied ties none of them again."""
    seen = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            seen.add(id(parameter))


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the input and output embeddings, which PEFT may save with an adapter; a model may have none."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, getter, lambda: None)())
        except NotImplementedError:  # transformers' answer for a vision model, say
            continue
    return [module for module in found if module is not None]


def _widths(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, GraloraLayer):
        return module.in_features, module.out_features
    if isinstance(module, nn.Linear):  # PEFT takes those of the slice under tensor parallelism
        return module.in_features, module.out_features
    return _get_in_out_features(module)


def _do_nothing(*_: Any) -> None:
    return None

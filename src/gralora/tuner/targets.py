"""The modules that get an adapter: which ones, where they are in the model, and why one is refused."""

import copy
import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TaskType
from peft.utils.quantization_utils import QuantizationBackend, get_quantization_kwargs
from torch import Tensor, nn

from gralora.tuner import tensor_parallel
from gralora.tuner.config import GraloraConfig, LayerSettings
from gralora.tuner.exact_targets import exact_targets
from gralora.tuner.expert_names import parameters_to_name
from gralora.tuner.experts import expert_stacks
from gralora.tuner.kinds import kind_for, kind_refusal, parameter_kind
from gralora.tuner.layer import GraloraLayer
from gralora.tuner.merging.quantised import backend_of
from gralora.tuner.parameters import ParameterLayer, shape_of

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
_NAMED_IN_FULL = 8


class Places:
    """All places of all modules of a model: full names and parents."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[tuple[str, nn.Module]]] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, module in modules.items():
            if name:
                self._places.setdefault(id(module), []).append((name, modules[name.rpartition(".")[0]]))
        self._names = {places[0][0]: [name for name, _ in places] for places in self._places.values()}

    def of(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the places of a module; the first name is the one that PEFT knows."""
        return self._places[id(module)]

    def names(self, first: str) -> list[str]:
        """Return all names of the module whose first name is `first`."""
        return self._names.get(first, [first])

    def names_without(self, modules: Iterable[nn.Module]) -> list[str]:
        """Return all names of all modules but these."""
        without = set(map(id, modules))
        return [name for key, places in self._places.items() if key not in without for name, _ in places]

    def leaf_names(self) -> list[str]:
        """Return the last parts of the names of modules without children."""
        parents = {id(parent) for places in self._places.values() for _, parent in places}
        return sorted({p[0][0].rpartition(".")[2] for key, p in self._places.items() if key not in parents})


@dataclass
class Target:
    """A weight that is to get an adapter, with all places of the module that holds it.

    Attributes:
        module: The module, which may be a layer of ours with other adapters.
        places: Full names and parents.
        backend: PEFT's access to a quantised module.
        kind: The kind of layer that it gets; None where no kind covers it.
        parameter_name: Name of the weight in the module.
        by_parameter: Whether the weight itself was asked for, not its module.
        tied: Whether it gets the adapter of the input embedding, transposed where it is a linear layer.
    """

    module: nn.Module
    places: list[tuple[str, nn.Module]]
    backend: QuantizationBackend | None
    kind: type[GraloraLayer] | None
    parameter_name: str = "weight"
    by_parameter: bool = False
    tied: bool = False

    @property
    def name(self) -> str:
        """The name that PEFT knows; of a parameter, with its own name."""
        return self.names[0]

    @property
    def names(self) -> list[str]:
        """All names, of all places."""
        parameter = self.kind is not None and issubclass(self.kind, ParameterLayer)
        return [f"{name}.{self.parameter_name}" if parameter else name for name, _ in self.places]

    @property
    def parents(self) -> list[nn.Module]:
        """The modules that hold it."""
        return [parent for _, parent in self.places]

    @property
    def base(self) -> nn.Module:
        """The module without layers of ours."""
        return self.module.get_base_layer() if isinstance(self.module, GraloraLayer) else self.module

    @property
    def layer(self) -> GraloraLayer | None:
        """The layer that is on this weight already."""
        return self.module.nest().get(self.parameter_name) if isinstance(self.module, GraloraLayer) else None

    def settings(self, config: GraloraConfig) -> LayerSettings:
        """Return the settings of the adapter on this weight; all its names must agree on them.

        Raises:
            ValueError: They do not.
        """
        modules = (name for name, _ in self.places)
        settings = {config.settings_for(*names) for names in zip(self.names, modules, strict=True)}
        if len(settings) > 1:
            names = ", ".join(map(repr, self.names))
            raise ValueError(
                "a module has one adapter, and `rank_pattern`, `alpha_pattern` and `k_pattern` give different values "
                f"to its names {names}. Write keys that match all of them."
            )
        return settings.pop()

    def kind_refusal(self) -> str | None:
        """Return why no kind of layer takes the weight, or None."""
        if self.layer is not None:
            return None
        if self.kind is None or not issubclass(self.kind, ParameterLayer):
            return kind_refusal(self.base, self.backend)
        return self.kind.refusal(self.base) or self.kind.parameter_refusal(self.base, self.parameter_name)

    def nest_refusal(self, found: "list[Target]") -> str | None:
        """Return why the adapters of a module do not fit together, or None.

        The layers of a module's parameters lie around each other, and their order is in the names of the tensors.
        """
        if not isinstance(self.module, GraloraLayer):
            return None
        asked = sorted(target.parameter_name for target in found if target.module is self.module)
        if asked == sorted(self.module.nest()):
            return None
        return (
            "all adapters on a module must adapt the same of its parameters; the ones on it adapt "
            f"{sorted(self.module.nest())}, got {asked}."
        )

    def dropout_refusal(self, config: GraloraConfig) -> str | None:
        """Return why the input of the weight cannot be dropped out, or None where it need not be."""
        if not config.gralora_dropout or self.kind is None or not issubclass(self.kind, ParameterLayer):
            return None
        return self.kind.dropout_refusal(self.base, self.parameter_name)

    def bias_refusal(self, config: GraloraConfig) -> str | None:
        """Return why the biases of the module cannot be trained with the adapter, or None."""
        if config.bias != "gralora_only" or getattr(self.base, "in_proj_bias", None) is None:
            return None
        return (
            "`bias='gralora_only'` trains the parameter `bias` of an adapted module; nn.MultiheadAttention has "
            "`in_proj_bias` and `out_proj.bias`. Use `bias='none'`, or `bias='all'`, which trains the second one."
        )

    def width_refusal(self, config: GraloraConfig) -> str | None:
        """Return why the blocks do not fit the widths of the weight, or None."""
        if self.kind is None or self.tied:
            return None
        widths = self.kind.features(self.base, self.parameter_name)
        return self.settings(config).width_refusal(*widths, self.kind.pads_inputs)

    def attention_refusal(self) -> str | None:
        """Return why an adapter would do nothing inside PyTorch's attention, or None."""
        if any(isinstance(parent, nn.MultiheadAttention) for parent in self.parents):
            attention = self.places[0][0].rpartition(".")[0]
            return (
                "nn.MultiheadAttention reads this layer's weight instead of calling it. Adapt the attention as a "
                f"whole: name {attention!r} in `target_modules`."
            )
        return None

    def reader_refusal(self, model_type: str | None) -> str | None:
        """Return why an adapter would do nothing in models of this type, or None."""
        for name, _ in self.places:
            if (last_part := name.rpartition(".")[2]) in _WEIGHT_READERS.get(model_type, ()):
                return (
                    f"models of type {model_type!r} read the weight of {last_part!r} instead of calling it, so an "
                    "adapter there does nothing."
                )
        return None

    def placement_refusal(self, model: nn.Module) -> str | None:
        """Return why an adapter cannot follow a tensor-parallel slice, or None."""
        if isinstance(self.module, GraloraLayer) or self.kind is None:
            return None
        name = self.places[0][0]
        return tensor_parallel.placement_refusal(model, name, self.module, self.kind, self.backend is not None)

    def disk_refusal(self, model: nn.Module) -> str | None:
        """Return why an adapter cannot be loaded here, since the weight is on disk, or None."""
        weight = getattr(self.module, self.parameter_name, None)
        on_disk = isinstance(weight, Tensor) and weight.device.type == "meta" and not hasattr(self.module, "_hf_hook")
        if on_disk and "disk" in getattr(model, "hf_device_map", {}).values():
            return (
                "its weight is offloaded to disk, and PEFT's loading over disk offload knows LoRA's names only. Load "
                "the base model with more CPU memory (`max_memory`), or put the adapter on with `get_peft_model` and "
                "load its weights with `set_peft_model_state_dict`."
            )
        return None


def check_target(
    target: Target, found: list[Target], config: GraloraConfig, model: nn.Module, model_type: str | None
) -> None:
    """Check that `target`, one of those that were `found`, can be adapted, before anything is changed.

    Raises:
        ValueError: A width that `gralora_k` does not divide, a weight that its caller reads, a module that PEFT trains
            whole, or a slice that no adapter can follow.
        TypeError: A module of a kind that GraLoRA cannot adapt.
        RuntimeError: A base weight that is offloaded to disk.
    """
    try:
        if any(is_trained_whole(name, config) for name, _ in target.places):
            raise ValueError("PEFT trains this module whole, by `modules_to_save` or `task_type`.")
        if refusal := target.reader_refusal(model_type):
            raise ValueError(refusal)
        if refusal := target.attention_refusal() or target.kind_refusal():
            raise TypeError(refusal)
        unfit = target.bias_refusal(config), target.dropout_refusal(config), target.width_refusal(config)
        refusals = target.nest_refusal(found), *unfit
        if refusal := next(filter(None, refusals), None) or target.placement_refusal(model):
            raise ValueError(refusal)
    except (TypeError, ValueError) as error:
        way_out = "Take it out of `target_modules`, or name it in `exclude_modules`."
        raise type(error)(f"{target.name!r} cannot be adapted: {error} {way_out}") from None
    if refusal := target.disk_refusal(model):
        raise RuntimeError(f"{target.name!r} cannot be adapted: {refusal}")


def check_trained_whole(model: nn.Module, config: GraloraConfig) -> None:
    """Check that PEFT can train whole the modules that `config` names for it.

    Raises:
        ValueError: Tensor parallelism has sliced one.
    """
    for name, module in model.named_modules():
        if is_trained_whole(name, config) and (refusal := tensor_parallel.whole_training_refusal(model, name, module)):
            raise ValueError(f"{name!r} cannot be trained whole: {refusal}")


def is_trained_whole(name: str, config: GraloraConfig) -> bool:
    """Return whether PEFT trains a copy of a module, or of one around it.

    It takes each module whose name ends in one of `modules_to_save`, or in a head's name by `task_type`.
    """
    endings = (*_HEADS.get(config.task_type, ()), *(config.modules_to_save or ()))
    parts = name.split(".") if endings else ()
    return any(".".join(parts[:end]).endswith(endings) for end in range(1, len(parts) + 1))


def matches(config: GraloraConfig, names: list[str]) -> bool | _ExcludedModule:
    """Return whether `config` chooses a module by any of its names; an exclusion by one of them wins."""
    found = [check_target_module_exists(config, name) for name in names]
    return next((match for match in found if isinstance(match, _ExcludedModule)), any(found))


def find_targets(
    model: nn.Module, places: Places, config: GraloraConfig, state_dict: dict[str, Tensor] | None
) -> list[Target]:
    """Return the modules that `config` or the keys of `state_dict` choose, without changing anything.

    `"all-linear"` chooses modules; other targets choose names, as PEFT matches them.
    """
    modules = dict(model.named_modules())
    if state_dict is None:
        resolved = copy.copy(config)
        _maybe_include_all_linear_layers(resolved, model)
        chosen = [name for name in modules if matches(resolved, places.names(name))]
        if config.asks_for_all_linear:
            chosen = [name for name in chosen if name in resolved.target_modules]
    else:
        named = {key.rsplit(".gralora_", 1)[0].removeprefix("_orig_mod.") for key in state_dict}
        chosen = [name for name in modules if name.removeprefix("_orig_mod.") in named]
    inside, quantisation = _inside_tuner_layers(model), get_quantization_kwargs(model)
    found: list[Target] = []
    for name, module in modules.items():
        if not name or name.startswith(inside):
            continue
        base = module.get_base_layer() if isinstance(module, GraloraLayer) else module
        backend = None if base is not module else backend_of(module, **quantisation)
        kind, at = kind_for(base, backend), places.of(module)
        parameters = _chosen_parameters(config, places.names(name), base)
        if name in chosen:
            asked = ("weight",) if kind is None else kind.parameters_of(base)
            found += [Target(module, at, backend, kind, parameter) for parameter in asked]
            parameters = [parameter for parameter in parameters if parameter not in asked]
        for parameter in parameters:
            found.append(Target(module, at, backend, parameter_kind(base, parameter, backend), parameter, True))
    return found


def _chosen_parameters(config: GraloraConfig, names: list[str], base: nn.Module) -> list[str]:
    """Return which parameters `config` chooses of the module `base` that is called `names`."""
    asked: Any = copy.copy(config)
    asked.target_modules = set(config.target_parameters or ())
    if config.asks_for_all_linear:
        asked.target_modules |= set(expert_stacks(base))
    if not asked.target_modules or isinstance(matches(asked, names), _ExcludedModule):
        return []
    return [p for p in base._parameters if matches(asked, [f"{name}.{p}" for name in names]) is True]


def leave_out_misfits(targets: list[Target], config: GraloraConfig, model_type: str | None) -> list[Target]:
    """Return those of "all linear layers" that fit, and warn once of the others.

    Raises:
        ValueError: None fits.
    """
    targets = [target for target in targets if not any(is_trained_whole(name, config) for name, _ in target.places)]
    fitting: list[Target] = []
    left_out: dict[str, list[str]] = {}
    for target in targets:
        if reason := _misfit(target, config, model_type):
            left_out.setdefault(reason, []).append(target.name)
        else:
            fitting.append(target)
    if targets and not fitting:
        reason = targets[0].width_refusal(config) or "its weight is read without calling it, or it is no linear layer."
        raise ValueError(
            f"`target_modules='all-linear'` must find a layer that can be adapted; none of {len(targets)} can. "
            f"{targets[0].name!r}: {reason}"
        )
    if left_out:
        groups = "; ".join(f"{_listed(names)}: {reason}" for reason, names in left_out.items())
        warnings.warn(
            f"`target_modules='all-linear'` leaves out {groups}. Name them in `exclude_modules` to silence this.",
            stacklevel=2,
        )
    return fitting


def _misfit(target: Target, config: GraloraConfig, model_type: str | None) -> str | None:
    """Return why "all linear layers" leave a target out, in words that fit several targets, or None."""
    if target.reader_refusal(model_type):
        return f"models of type {model_type!r} read the weight without calling the layer"
    if target.attention_refusal():
        return "nn.MultiheadAttention reads the weight without calling the layer"
    if target.width_refusal(config):
        return f"`gralora_k={config.gralora_k}` does not divide the widths"
    if target.kind is not None and target.kind_refusal():
        return "not a plain linear layer"
    return None


def _listed(names: list[str]) -> str:
    """Return a few names in full, and many by their last parts."""
    if len(names) <= _NAMED_IN_FULL:
        return ", ".join(map(repr, names))
    kinds = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{count} of {kind!r}" for kind, count in kinds.items())


def is_parameter(target: Target) -> bool:
    """Return whether the target is a parameter, which `target_parameters` names."""
    return target.by_parameter and target.kind is not None and issubclass(target.kind, ParameterLayer)


def names_of(targets: list[Target], places: Places, model: nn.Module) -> set[str] | str:
    """Return `target_modules` that means the modules among `targets` and no other module of `model`."""
    inside = _inside_tuner_layers(model)
    chosen = [target for target in targets if not is_parameter(target)]
    others = places.names_without(target.module for target in chosen)
    names = dict.fromkeys(target.places[0][0] for target in chosen)
    return exact_targets(names, [name for name in others if not name.startswith(inside)])


def parameter_names_of(targets: list[Target], model: nn.Module) -> list[str] | None:
    """Return `target_parameters` that means the parameters among `targets` and no other of `model`."""
    chosen = [target.name for target in targets if is_parameter(target)]
    taken = set(chosen)
    names = exact_targets(chosen, [name for name, _ in model.named_parameters() if name not in taken])
    return (sorted(names) if isinstance(names, set) else chosen) or None


def announce_experts(targets: list[Target]) -> None:
    """Say how many stacks of experts "all linear layers" include."""
    stacks = [t for t in targets if is_parameter(t) and len(shape_of(t.base, t.parameter_name)) == 3]
    if stacks:
        names = ", ".join(sorted({repr(target.parameter_name) for target in stacks}))
        experts = shape_of(stacks[0].base, stacks[0].parameter_name)[0]
        warnings.warn(
            f"`target_modules='all-linear'` adapts the experts too: {len(stacks)} stacks of {experts} experts "
            f"({names}). Name them in `exclude_modules` to leave them out.",
            stacklevel=2,
        )


def warn_of_unmatched_names(asked: set[str], places: Places, config: GraloraConfig, model: nn.Module) -> None:
    """Name the entries of a target list that match nothing; where nothing matches at all, PEFT raises."""
    names = places.names_without([])
    unmatched = sorted(t for t in asked if not any(name == t or name.endswith(f".{t}") for name in names))
    stacks = [] if config.target_parameters else parameters_to_name(model)
    if not unmatched or (len(unmatched) == len(asked) and not stacks):
        return
    hints = []
    for target in unmatched:
        near = difflib.get_close_matches(target.rpartition(".")[2], places.leaf_names(), n=3)
        hints.append(f"{target!r}" + (f" (nearest: {', '.join(map(repr, near))})" if near else ""))
    experts = f" The experts of this model are parameters: `target_parameters={stacks}` adapts them." if stacks else ""
    warnings.warn(f"`target_modules` names that match no module: {'; '.join(hints)}.{experts}", stacklevel=2)


def warn_of_unused_settings(config: GraloraConfig, found: list[Target], places: Places, model: nn.Module) -> None:
    """Warn of patterns that match no target, and of exclusions that exclude nothing."""
    names = {name for target in found for name in (*target.names, *(place for place, _ in target.places))}
    for field in ("rank_pattern", "alpha_pattern", "k_pattern"):
        unused = sorted(
            key
            for key in getattr(config, field) or ()
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in names)
        )
        if unused:
            warnings.warn(f"`{field}` has keys that match no target: {', '.join(map(repr, unused))}.", stacklevel=3)
    everything = (*places.names_without([]), *(name for name, _ in model.named_parameters()))
    excludes = any(isinstance(check_target_module_exists(config, name), _ExcludedModule) for name in everything)
    if config.exclude_modules and not excludes:
        warnings.warn(f"`exclude_modules={config.exclude_modules!r}` excludes nothing.", stacklevel=3)


def announce_unmergeable(targets: Iterable[Target]) -> None:
    """Warn once for each reason why new layers at `targets` can never be merged."""
    refusals = Counter[str]()
    for target in targets:
        outermost = getattr(target.parents[0], target.places[0][0].rpartition(".")[2])
        layer = outermost.nest()[target.parameter_name] if isinstance(outermost, GraloraLayer) else None
        if layer is not None and (refusal := layer.rewrite_refusal()):
            refusals[refusal] += 1
    for refusal, count in refusals.items():
        warnings.warn(
            f"{count} adapted layers cannot be merged: {refusal}. Training and inference still work.", stacklevel=2
        )


def _inside_tuner_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the beginnings of all names inside tuner layers."""
    named = model.named_modules(remove_duplicate=False)
    return tuple(f"{name}." for name, module in named if isinstance(module, BaseTunerLayer))

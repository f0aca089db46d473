"""GraloraModel: checks every target, then puts the layers in; merges over the whole model, in every layer or none."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from gralora.checks import is_number
from gralora.tuner import expert_names, replication, saving, targets, tensor_parallel, tying
from gralora.tuner.config import GraloraConfig
from gralora.tuner.layer import GraloraLayer, gralora_layers
from gralora.tuner.merging.dense import agreed
from gralora.tuner.merging.quantised import keep_trainable
from gralora.tuner.merging.sharing import sharing_in
from gralora.tuner.targets import Places


class GraloraModel(BaseTuner):
    """A model with GraLoRA adapters on some of its layers (PEFT's contract for tuners).

    Made by `get_peft_model` and `PeftModel.from_pretrained`; everything is checked before the model is
    touched, and a failure leaves it as it was.
    """

    prefix = "gralora_"
    tuner_layer_cls = GraloraLayer
    _places: Places | None = None  # while layers are put in or taken out
    _targets: dict[int, list[targets.Target]]  # by the id of the module, while layers are put in
    _tied_to: targets.Target | None = None  # the input embedding, while layers are put in that are tied to it
    _tied: frozenset[str] = frozenset()  # their names
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Inject the adapter `adapter_name` into `model` (PEFT's contract), or leave the model as it was.

        A config of ours is kept, as PEFT changes it later, and `target_modules` is resolved in it; one of PEFT's
        own class is converted.

        Raises:
            ValueError: A width that `gralora_k` cannot divide, a layer whose weight is read by its caller, or a head
                that PEFT trains whole.
            TypeError: A module of a kind that GraLoRA cannot adapt.
            RuntimeError: A base weight that is offloaded to disk.
        """
        # A plain assignment, not an item of `other_param_names`: BaseTuner offers no way to pass it on.
        self._create_on_meta = low_cpu_mem_usage
        with replication.settings_restored(model), _all_or_nothing(model, self.peft_config, adapter_name):
            config = self.peft_config[adapter_name] = GraloraConfig.adopt(self.peft_config[adapter_name])
            model_type = self.get_model_config(model).get("model_type")
            others: Any = [other for name, other in self.peft_config.items() if name != adapter_name]
            replication.replicate(model, config, others)
            expert_names.rewrite_targets(config, model, model_type)
            asked, all_linear = config.target_modules, config.asks_for_all_linear
            if config.target_modules is None and config.target_parameters:
                config.target_modules = set()
            config: Any = self._prepare_adapter_config(config, self.get_model_config(model))
            with self._knowing_places(model) as places:
                found = targets.find_targets(model, places, config, state_dict)
                if all_linear:
                    found = found if state_dict else targets.leave_out_misfits(found, config, model_type)
                    targets.announce_experts(found)
                    config.target_modules = targets.names_of(found, places, model)
                    config.target_parameters = targets.parameter_names_of(found, model)
                elif isinstance(asked, set) and state_dict is None:
                    targets.warn_of_unmatched_names(asked, places, config, model)
                if config.ensure_weight_tying:
                    found, self._tied_to = tying.tie_targets(model, places, config, found, self._tied_names())
                    self._tied = frozenset(target.name for target in found if target.tied)
                for target in found:
                    targets.check_target(target, found, config, model, model_type)
                targets.check_trained_whole(model, config)
                self._targets = {}
                for target in found:
                    self._targets.setdefault(id(target.module), []).append(target)
                new = [target for target in found if target.layer is None]
                if state_dict is None:
                    targets.warn_of_unused_settings(config, found, places, model)
                with _without_warnings_of_unused_settings():
                    super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            layers = {name: layer for name, layer in gralora_layers(model).items() if layer.has_adapter(adapter_name)}
            records = {
                name: tying.record(layers, layer, adapter_name) or layer.record() for name, layer in layers.items()
            }
            config.layer_kinds = {name: record for name, record in records.items() if record} or None
            self._mark_shared_weights()
            if not config.inference_mode:
                keep_trainable(model)
            targets.announce_unmergeable(new)

    @contextmanager
    def _knowing_places(self, model: nn.Module) -> Iterator[Places]:
        self._places = Places(model)
        try:
            yield self._places
        finally:
            self._places, self._targets, self._tied_to, self._tied = None, {}, None, frozenset()

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        keep_base: bool = True,
        own_weights: bool = False,
    ) -> None:
        """Merge adapters into the base weights, in every layer or in none.

        A base weight is written in place, unless another part of the model holds it, or some of its memory, too:
        then the adapted layer gets a parameter of its own. The search covers parameters, buffers and tensor attributes
        of all modules. It does not cover another model that shares weights with this one, a list or a variable;
        `own_weights=True` leaves the weights of those alone.

        Args:
            adapter_names: Names of the adapters; the active ones by default.
            safe_merge: Refuse a result that is not finite.
            keep_base: Keep what `unmerge_adapter` needs to give the base weights their bits back. Without,
                the merge is final, and all or nothing only against what can be found beforehand.
            own_weights: Write every merged weight to a new parameter that only this model holds.

        Raises:
            ValueError: An adapter that does not exist, or with `safe_merge` a non-finite result.
            RuntimeError: A base weight that cannot be read or rewritten.
        """
        layers = gralora_layers(self.model)
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
            if refusal := layer.merge_refusal(own_weights):
                raise RuntimeError(f"Nothing was merged: {name!r} cannot be, because {refusal}")
            if safe_merge and not keep_base:
                _check_finite_update(name, layer, adapter_names)
        leaders = tying.leaders(layers, adapter_names)
        layers = dict(sorted(layers.items(), key=lambda item: item[1] in leaders))  # a leader is merged first
        depths = [(layer, len(layer._merges)) for layer in layers.values()]
        name, done = "", 0
        try:
            for name, layer in layers.items():  # noqa: B007 (read where an error is told)
                with onload_layer(layer):
                    leader = leaders.get(layer)
                    layer.merge_with_known_sharing(safe_merge, adapter_names, keep_base, own_weights, leader)
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
        merged = {name: layer for name, layer in gralora_layers(self.model).items() if layer.merged}
        if not merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        for name, layer in merged.items():
            with onload_layer(layer):
                refusal = layer.unmerge_refusal()
                everywhere = agreed(refusal is None, layer.weight_ref().parameter)
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
        if any(layer.merged for layer in gralora_layers(self.model).values()):
            warnings.warn(f"The adapters are merged. Unmerging the model first, to {purpose}.", stacklevel=3)
            self.unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        # Merging or unmerging first, over all layers, keeps the whole atomic; what follows only swaps modules.
        layers = gralora_layers(self.model)
        if merge:
            missing = {name: layer for name, layer in layers.items() if layer.names_to_merge(adapter_names)}
            self._merge(missing, adapter_names, safe_merge)
        elif any(layer.merged for layer in layers.values()):
            self.unmerge_adapter()
        return self._unload(merge, progressbar, safe_merge, adapter_names)

    def _unload(self, merge: bool, progressbar: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        tied = self.get_model_config(self.model).get("tie_word_embeddings")
        replicated = any(getattr(config, "layer_replication", None) for config in self.peft_config.values())
        with self._knowing_places(self.model):
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if tied and not self.get_model_config(model).get("tie_word_embeddings"):
            _untie(model)
        if merge and replicated:
            replication.give_own_weights(model)
        return model

    def unload_merged(self, adapter_names: list[str]) -> nn.Module:
        """Return the base model without the tuner layers, whose adapters were merged one by one before."""
        return self._unload(True, False, False, adapter_names)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: combining adapters is not supported yet.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("`add_weighted_adapter` cannot be used with GraLoRA yet.")

    def _tied_names(self) -> list[str]:
        """Return the names of the modules that the model ties to its input embedding, as far as it says."""
        return self._get_module_names_tied_with_embedding() if tying.input_embedding(self.model) is not None else []

    def _check_merge_allowed(self) -> None:
        """Do nothing: tied weights need no warning, since a merge gives the adapted module its own parameter."""

    def _check_target_module_compatiblity(self, peft_config: GraloraConfig, model: nn.Module, target_name: str) -> None:
        """Do nothing: every target was checked before the first one was changed."""

    def _check_target_module_exists(self, peft_config: GraloraConfig, key: str) -> Any:
        if key in self._tied:  # put in with the input embedding, and without tensors in a state dict
            return False
        # PEFT asks for the first name of a module; the others count as well.
        return targets.matches(peft_config, self._places.names(key) if self._places else [key])

    def _check_tied_modules(self, model: nn.Module, peft_config: GraloraConfig) -> None:
        if not peft_config.ensure_weight_tying:
            super()._check_tied_modules(model, peft_config)  # warns
        elif self._tied_to is None and not tying.tie_modules_to_save(model, peft_config, self._tied_names()):
            warnings.warn(
                "`ensure_weight_tying` finds nothing to tie: no target, and none of `modules_to_save`, shares its "
                "weight with the input embedding.",
                stacklevel=2,
            )

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
        layer = target
        for found in self._targets.pop(id(target), ()):
            if found.layer is not None:
                self._give_adapter(found.layer, found, peft_config, adapter_name)
                continue
            kind: Any = found.kind
            if placement := tensor_parallel.placement_of(self.model, found.places[0][0], found.base):
                layer = tensor_parallel.parallel(kind)(layer, found.backend, *placement)
            else:
                layer = kind(layer, found.backend, found.parameter_name)
            if any(isinstance(parent, nn.TransformerEncoderLayer) for parent in found.parents):
                # PyTorch's inference fast path reads the weights of its linears; a hook on one turns it off.
                layer.register_forward_pre_hook(_do_nothing)
            self._give_adapter(layer, found, peft_config, adapter_name)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        if self._tied_to is not None and target is self._tied_to.module:
            for tied in [found for all_found in self._targets.values() for found in all_found if found.tied]:
                (key, holder), *_ = tied.places
                self._create_and_replace(
                    peft_config, adapter_name, tied.module, key.rpartition(".")[2], holder, current_key=key
                )

    def _give_adapter(self, layer: Any, found: targets.Target, config: GraloraConfig, adapter_name: str) -> None:
        if found.tied:
            embedding: Any = tying.input_embedding(self.model)
            tying.tie(layer, embedding, adapter_name, config.gralora_dropout)
        else:
            layer.add_adapter(adapter_name, found.settings(config), on_meta=self._create_on_meta)

    def _inject_parameters(
        self, peft_config: GraloraConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        # What PEFT matches by name was found before; what is left of it are the parameters.
        names = []
        for found in [first for first, *_ in self._targets.values()]:
            key, parent = found.places[0]
            names += [target.name for target in self._targets[id(found.module)]]
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(
                    peft_config, adapter_name, found.module, key.rpartition(".")[2], parent, current_key=key
                )
        return names

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies `weight` over, which a head that is a container of modules does not have, and
        # replaces a module that hangs at several places at one of them.
        places = (self._places or Places(self.model)).of(child)
        setattr(parent, child_name, new_module)
        for name, owner in places:
            if owner._modules.get(name.rpartition(".")[2]) is child:
                setattr(owner, name.rpartition(".")[2], new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                "`adapter_names`, a different adapter for each row of a batch, cannot be used yet."
            )
        yield

    def _mark_shared_weights(self) -> None:
        for layer, sharing in sharing_in(self.model, list(gralora_layers(self.model).values())).items():
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
        if any(layer.merged for layer in gralora_layers(model).values()):
            warnings.warn(
                "The adapter is merged; what is saved is the adapter alone. For the merged model, save what "
                "`merge_and_unload()` returns.",
                stacklevel=2,
            )
        tensors = saving.adapter_tensors(model, config.bias, adapter_name, state_dict)
        # What else is saved, PEFT takes out of `state_dict` after this.
        state_dict |= saving.extra_tensors(model, state_dict)
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: GraloraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if refusal := expert_names.checkpoint_refusal(list(state_dict), model):
            raise ValueError(refusal)
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # A module at several places is saved under its first name, and looked for under each.
        places = Places(model)
        for key, tensor in list(found.items()):
            holder, _, parameter = key.rpartition(".")
            found |= {f"{name}.{parameter}": tensor for name in places.names(holder)}
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
    layers = list(gralora_layers(model).values())
    if not layers:
        raise ValueError(f"`model` must have GraLoRA layers; got {type(model).__name__} without any.")
    if not is_number(multiplier) or not abs(multiplier) < float("inf"):
        raise ValueError(f"`multiplier` must be a finite number; got multiplier={multiplier!r}.")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(multiplier)
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


@contextmanager
def _without_warnings_of_unused_settings() -> Iterator[None]:
    """Silence PEFT's warnings of settings that match no module: those of parameters match none."""
    with warnings.catch_warnings():
        for message in ("The following (rank|alpha)_pattern keys", "You have passed exclude_modules="):
            warnings.filterwarnings("ignore", message)
        yield


@contextmanager
def _all_or_nothing(model: nn.Module, configs: dict[str, Any], adapter_name: str) -> Iterator[None]:
    """Put the module tree, `requires_grad`, the adapter's settings and the config back if the body raises."""
    config = configs[adapter_name]
    fields = dict(vars(config))
    children = [(module, dict(module._modules)) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = [(layer, layer._active_adapter) for layer in gralora_layers(model).values()]
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
    """Refuse a non-finite update before a merge that cannot be undone."""
    for adapter in layer.active_adapters if adapter_names is None else adapter_names:
        if layer.has_adapter(adapter) and not torch.isfinite(layer.get_delta_weight(adapter)).all():
            raise ValueError(
                f"the merged weight must be finite; {adapter!r} has a non-finite update "
                f"(at {name!r}; no layer was merged)"
            )


def _untie(model: nn.Module) -> None:
    """Give every module its own parameters: a model that is loaded as untied ties none of them again."""
    seen = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            seen.add(id(parameter))


def _do_nothing(*_: Any) -> None:
    return None

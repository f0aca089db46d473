"""GraLoRA on PyTorch's attention module, whose packed projection and output projection are parameters that it reads."""

from operator import attrgetter
from typing import Any, cast

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from gralora.tuner.parameters import ParameterLayer

_ARGUMENTS = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)


class Attention(ParameterLayer):
    """GraLoRA on `nn.MultiheadAttention`: on the packed weight of query, key and value, and on the output projection.

    Where key and value have widths of their own, the three weights are adapted one by one. The blocks of the packed
    weight `[3·E, E]` are cut across query, key and value, which changes nothing: an update is a matrix.
    """

    noun = "attention (nn.MultiheadAttention)"

    @classmethod
    def covers(cls, base: nn.Module, backend: QuantizationBackend | None) -> bool:
        """Return whether `base` is an attention module."""
        return backend is None and isinstance(base, nn.MultiheadAttention)

    @classmethod
    def parameters_of(cls, base: Any) -> tuple[str, ...]:
        """Return the names of the weights."""
        packed = (
            ("in_proj_weight",) if base._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        )
        return (*packed, "out_proj.weight")

    @classmethod
    def refusal(cls, base: nn.Module) -> str | None:
        """Return why an attention cannot be adapted, or None."""
        if any(parent.__module__.startswith("torch.ao.") for parent in type(base).__mro__):
            return f"it must compute with its own weights; {type(base).__name__} has a linear layer for each of them."
        missing = [name for name in cls.parameters_of(base) if attrgetter(name)(base) is None]
        return f"it must have the parameters of nn.MultiheadAttention; {missing[0]!r} is None." if missing else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the attention returns, with the updates of all active adapters added to its weights.

        PyTorch's encoder makes a nested tensor of a padded batch, if gradients are off or nothing in its first layer
        is trained. The attention takes nested tensors where it needs no gradients; with gradients, they are padded
        for it.
        """
        call = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        if not (torch.is_grad_enabled() and len(args) <= len(_ARGUMENTS) and self._takes_padded(call)):
            return super().forward(*args, **kwargs)
        rows = call["query"].unbind()
        padded = torch.nested.to_padded_tensor(call["query"], 0.0)
        lengths = torch.tensor([len(row) for row in rows], device=padded.device)
        mask = torch.arange(padded.shape[1], device=padded.device) >= lengths.unsqueeze(1)
        call |= {"query": padded, "key": padded, "value": padded, "key_padding_mask": mask}
        output, weights = super().forward(**call)
        parts = [part[: len(row)] for part, row in zip(output, rows, strict=True)]
        return torch.nested.as_nested_tensor(parts), weights

    def _takes_padded(self, call: dict[str, Any]) -> bool:
        """Return whether a call is self-attention of a nested tensor, as the attention takes it without gradients."""
        query, base = call.get("query"), cast(nn.MultiheadAttention, self.get_base_layer())
        nested = isinstance(query, Tensor) and query.is_nested and query.layout == torch.strided
        itself = nested and query is call.get("key") and query is call.get("value")
        return itself and base.batch_first and call.get("key_padding_mask") is None and call.get("attn_mask") is None

    def record(self) -> dict[str, Any]:
        """Return the name of the weight."""
        return {"kind": "attention", "parameter": self.parameter_name}

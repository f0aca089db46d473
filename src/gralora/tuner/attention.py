"""GraLoRA on PyTorch's attention module, whose packed projection and output projection are parameters that it reads."""

from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from gralora.tuner.parameters import ParameterLayer


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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the attention returns, with the updates of all active adapters added to its weights.

        PyTorch's encoder makes nested tensors of padded batches, which the module takes on its fast path alone.
        """
        query = args[0] if args else kwargs.get("query")
        if not (isinstance(query, Tensor) and query.is_nested):
            return super().forward(*args, **kwargs)
        rows = query.unbind()
        padded = torch.nested.to_padded_tensor(query, 0.0)
        lengths = torch.tensor([len(row) for row in rows], device=padded.device)
        mask = torch.arange(padded.shape[1], device=padded.device) >= lengths.unsqueeze(1)
        output, weights = super().forward(
            padded, padded, padded, key_padding_mask=mask, need_weights=kwargs.get("need_weights", True)
        )
        parts = [part[: len(row)] for part, row in zip(output, rows, strict=True)]
        return torch.nested.as_nested_tensor(parts, layout=query.layout), weights

    def record(self) -> dict[str, Any]:
        """Return the name of the weight."""
        return {"kind": "attention", "parameter": self.parameter_name}

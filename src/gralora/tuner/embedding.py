"""GraLoRA on embeddings: a linear layer on one-hot vectors, of which only the rows of the given ids are computed.

The input width is the size V of the vocabulary, which k need not divide: the last input block reaches beyond it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from gralora.tuner import blocks
from gralora.tuner.initialise import STARTS
from gralora.tuner.layer import GraloraLayer
from gralora.tuner.merging.weight import WeightRef

_PROBED = 4  # ids for which the forward of another class is compared with that of nn.Embedding


class Embedding(GraloraLayer):
    """GraLoRA on `nn.Embedding`; ids `[...]` become `[..., d]`.

    `gralora_A` is `[k, ceil(V/k), r]`, `gralora_B` is `[k, r, d/k]`. As in PEFT's LoRA there is no dropout, A starts at
    zero and B is random.
    """

    noun = "embeddings (nn.Embedding)"
    pads_inputs = True

    @classmethod
    def covers(cls, base: nn.Module, backend: QuantizationBackend | None) -> bool:
        """Return whether `base` is an embedding."""
        return backend is None and isinstance(base, nn.Embedding)

    @classmethod
    def refusal(cls, base: Any) -> str | None:
        """Return why an embedding cannot be adapted, or None."""
        if base.max_norm is not None:
            return (
                f"an embedding must not have a `max_norm`; got max_norm={base.max_norm}. It rescales rows of the "
                "weight in a forward pass, and the scale would depend on the adapter."
            )
        if type(base).forward is nn.Embedding.forward or _is_scaled(base):
            return None
        return (
            "an embedding must return rows of its weight, times a constant `embed_scale` if it has one; the forward "
            f"of {type(base).__name__} does something else, such as computing the ids itself."
        )

    @classmethod
    def features(cls, base: Any, parameter_name: str = "weight") -> tuple[int, int]:
        """Return the size of the vocabulary and the width of the output."""
        return base.num_embeddings, base.embedding_dim

    def weight_ref(self) -> WeightRef:
        """Return where the weight is; as a matrix `[d, V]` it is transposed."""
        return WeightRef(self.get_base_layer(), matrix=torch.t, stored=torch.t)

    def record(self) -> dict[str, Any]:
        """Return the shape of the weight, `[V, d]`."""
        return {"kind": "embedding", "shape": [self.in_features, self.out_features]}

    def fill(self, init_weights: bool, factors: blocks.Factors) -> None:
        """Give `factors` their starting values, in place: A zero and B normal, or all random."""
        STARTS[init_weights](factors.transposed)
        with torch.no_grad():
            for factor in (factors.B, factors.B_general):
                if factor is not None:
                    factor.normal_()

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype of the weight, which autocast does not change."""
        return self.get_base_layer().weight.dtype  # pyright: ignore[reportReturnType]

    def prepared(
        self, factors: blocks.Factors, adapter_name: str, dtype: torch.dtype, device: torch.device
    ) -> blocks.Factors:
        """Return `factors` with B's as `update` needs them; of the A's it casts the rows that it takes."""
        A, B, A_general, B_general = factors
        wide, scale = factors.widest(dtype), self.scaling[adapter_name]
        B, B_general = (f if f is None else (f.to(device, wide) * scale).to(dtype) for f in (B, B_general))
        return blocks.Factors(A.to(device), B, A_general if A_general is None else A_general.to(device), B_general)

    def inputs(self, x: Tensor, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """Return the ids."""
        return x

    def update(self, x: Tensor, factors: blocks.Factors) -> Tensor:
        """Return the rows of ΔW for the ids, `[..., d]`, times the scale of the embedding if it has one."""
        base: Any = self.get_base_layer()
        ids = x.reshape(-1)
        rows = _with_gradients_of(base, ids, rows_of_update(ids, factors))
        scale = self._get_embed_scale()
        if scale is not None:
            rows = rows * scale.to(rows.dtype)
        return rows.view(*x.shape, self.out_features)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: PEFT converts linear layers only. `gralora export` converts these."""
        return False

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"vocabulary={self.in_features}, out_features={self.out_features}"


def rows_of_update(ids: Int[Tensor, " t"], factors: blocks.Factors) -> Float[Tensor, "t out"]:
    """Return the columns `ids` of ΔW of scale 1, as rows, in the dtype of B."""
    A, B, A_general, B_general = factors
    k, n, r = A.shape
    taken = F.embedding(ids, A.reshape(k * n, r)).to(B.dtype).view(-1, k, 1, r // k)  # [t, i, 1, s]
    of_block = ((ids // n).unsqueeze(1) == torch.arange(k, device=ids.device)).to(B.dtype).view(-1, 1, k, 1)
    middle = (taken * of_block).transpose(0, 1).flatten(2)  # [i, t, (j s)], as `blocks.exchange` gives
    rows = torch.bmm(middle, B).transpose(0, 1).flatten(1)
    if A_general is not None and B_general is not None:
        rows = rows + F.embedding(ids, A_general.T).to(B.dtype) @ B_general.T
    return rows


def _with_gradients_of(base: Any, ids: Tensor, rows: Tensor) -> Tensor:
    """Return `rows` with the gradients that the weight's rows have: none for the padding, or divided by frequency."""
    if not rows.requires_grad:
        return rows
    if base.scale_grad_by_freq:
        counts = ids.new_zeros(base.num_embeddings).index_add(0, ids, torch.ones_like(ids))
        share = (1 / counts[ids]).to(rows.dtype).unsqueeze(1)
        rows = rows * share + (rows * (1 - share)).detach()
    if base.padding_idx is not None:
        rows = torch.where((ids == base.padding_idx).unsqueeze(1), rows.detach(), rows)
    return rows


def _is_scaled(base: Any) -> bool:
    """Return whether the forward of `base` gives rows of the weight times `embed_scale`, as far as some ids tell."""
    scale = getattr(base, "embed_scale", 1.0)
    if torch.as_tensor(scale).numel() != 1:
        return False
    if base.weight.is_meta or type(base.weight) is not nn.Parameter or not base.weight.numel():
        return hasattr(base, "embed_scale")
    ids = torch.arange(min(_PROBED, base.num_embeddings), device=base.weight.device).unsqueeze(0)
    try:
        with torch.no_grad():
            found = base(ids)
            expected = F.embedding(ids, base.weight) * torch.as_tensor(scale).to(base.weight)
    except Exception:  # another signature, or ids of its own
        return False
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, 1e-2, 1e-5)

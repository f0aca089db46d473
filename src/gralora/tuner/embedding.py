"""GraLoRA on embeddings: a linear layer from one-hot vectors of the vocabulary to the embedding.

The weight is stored as `[vocabulary, out]`, the transposed matrix. The n rows of `gralora_A[j]` belong to the ids of
block j, so that an id picks one row of one block, and the update is computed from the rows that the ids pick. The last
block may reach beyond the vocabulary: k need not divide it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from gralora.tuner import blocks
from gralora.tuner.layer import GraloraLayer
from gralora.tuner.merging.sharing import own_copy
from gralora.tuner.merging.weight import WeightRef


class Embedding(GraloraLayer):
    """GraLoRA on `nn.Embedding`, also one whose output is multiplied by a scalar `embed_scale`.

    Input: ids of any shape; output `[*ids, out]`. Dropout is not applied. The row of `padding_idx` gets no gradient.
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
                "an embedding must have max_norm=None, since a forward pass with it rewrites rows of the frozen "
                f"weight; got max_norm={base.max_norm}."
            )
        if not _looks_up_rows(base):
            return (
                "an embedding must return the rows of its weight, or these times a scalar `embed_scale`; the `forward` "
                f"of {type(base).__name__} does something else."
            )
        return None

    @classmethod
    def features(cls, base: Any, parameter_name: str = "weight") -> tuple[int, int]:
        """Return the sizes of the vocabulary and of the embedding."""
        return base.num_embeddings, base.embedding_dim

    def weight_ref(self) -> WeightRef:
        """Return where the weight is; as a matrix it is transposed."""
        return WeightRef(self.get_base_layer(), matrix=torch.t, stored=torch.t)

    def record(self) -> dict[str, Any]:
        """Return the shape of the base weight, `[vocabulary, out]`: the factors may hold more rows."""
        return {"kind": "embedding", "shape": [self.in_features, self.out_features]}

    def fill(self, init_weights: bool, factors: blocks.Factors) -> None:
        """Give `factors` their starting values, in place: A is zero or normal, B normal.

        The row of `padding_idx` starts at zero in any case, and stays there.
        """
        base: Any = self.get_base_layer()
        A, B, A_general, B_general = factors
        pairs = [(A.flatten(0, 1), B)]
        if A_general is not None and B_general is not None:
            pairs.append((A_general.T, B_general))
        for rows, out in pairs:
            out.normal_()
            rows.zero_() if init_weights else rows.normal_()
            if base.padding_idx is not None:
                rows[base.padding_idx].zero_()

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype of the base weight, which autocast does not change."""
        base: Any = self.get_base_layer()
        return base.weight.dtype

    def inputs(self, x: Tensor, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """Return the ids."""
        return x

    def scaled(self, factors: blocks.Factors, scale: float, dtype: torch.dtype, device: torch.device) -> blocks.Factors:
        """Return the B's times `scale` in `dtype`, and the A's as they are, since only few of their rows are used."""
        A, B, A_general, B_general = factors
        wide = factors.widest(dtype)
        return blocks.Factors(
            A.to(device),
            (B.to(device, wide) * scale).to(dtype),
            None if A_general is None else A_general.to(device),
            None if B_general is None else (B_general.to(device, wide) * scale).to(dtype),
        )

    def update(self, x: Tensor, factors: blocks.Factors) -> Tensor:
        """Return the adapter's output `[*ids, out]`; the A's may be in another dtype than the B's."""
        base: Any = self.get_base_layer()
        if not base.scale_grad_by_freq:
            return self._update(x.reshape(-1), factors).view(*x.shape, self.out_features)
        # Gradients are divided by how often an id occurs, for both factors as they are for the weight.
        ids, places = x.unique(return_inverse=True)
        return F.embedding(places, self._update(ids, factors), scale_grad_by_freq=True)

    def _update(self, ids: Tensor, factors: blocks.Factors) -> Tensor:
        """Return rows `[t, out]` of the update."""
        A, B, A_general, B_general = factors
        k, n, r = A.shape
        picked = self._pick(ids, A.reshape(k * n, r), B.dtype)
        update = (_by_block(picked, ids // n, k) @ B).transpose(0, 1).flatten(1)
        if A_general is not None and B_general is not None:
            update = update + self._pick(ids, A_general.T, B.dtype) @ B_general.T
        return update

    def _pick(self, ids: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows of `ids` in `dtype`, times the scale of the embedding."""
        base: Any = self.get_base_layer()
        picked = F.embedding(ids, rows, base.padding_idx).to(dtype)
        scale = _embed_scale(base)
        if isinstance(scale, Tensor):  # the base casts it so
            scale = scale.to(picked.device, base.weight.dtype).to(dtype)
        return picked if scale is None else picked * scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: PEFT converts matrices of linear layers only. `gralora export` converts these."""
        return False


def _by_block(picked: Tensor, block: Tensor, k: int) -> Tensor:
    """Return `[i, t, (j s)]` with the picked rows `[t, (i s)]` in block j of each id, and zero in the others."""
    rows = picked.unflatten(1, (k, 1, -1)).transpose(0, 1)
    chosen = block[:, None] == torch.arange(k, device=block.device)
    return rows.where(chosen[..., None], 0).flatten(2)


def _embed_scale(base: Any) -> Any:
    """Return the number, or scalar tensor, that an embedding multiplies its rows with, or None."""
    return None if type(base).forward is nn.Embedding.forward else getattr(base, "embed_scale", None)


@torch.no_grad()
def _looks_up_rows(base: Any) -> bool:
    """Return whether the forward pass of `base` is `F.embedding`, times its scale, found out on a few ids."""
    if type(base).forward is nn.Embedding.forward:
        return True
    scale = _embed_scale(base)
    if len(list(base.parameters())) != 1 or (isinstance(scale, Tensor) and scale.numel() != 1):
        return False
    device = "cpu" if base.weight.is_meta else base.weight.device
    size, width = base.num_embeddings, base.embedding_dim
    # A small table of as many different rows: each begins one number after the other.
    table = torch.arange(size + width - 1, dtype=torch.float32, device=device).sin().unfold(0, width, 1)
    ids = torch.tensor([[size - 1, 0, size // 2], [1 % size, size - 1, size // 3]], device=device)
    twin = own_copy(base)
    twin._parameters["weight"] = table  # pyright: ignore[reportArgumentType]
    if isinstance(scale, Tensor) and scale.is_meta:
        twin._buffers["embed_scale"] = scale = torch.tensor(2.0)
    try:
        found = type(base).forward(twin, ids)
    except Exception:  # it takes something else, or needs a weight of its own kind
        return False
    expected = F.embedding(ids, table) * (1.0 if scale is None else scale)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
        return False
    try:
        type(base).forward(twin, torch.zeros(1, size, device=device))
    except Exception:
        return True
    return False  # it takes more than ids

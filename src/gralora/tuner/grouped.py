"""Products of rows with the factors of their experts.

A row is a pair of a token and one of its experts. The rows are sorted by expert, as transformers does for its grouped
products. Where every expert has few rows, they are padded to the same number for each, and the grouped products are
batched ones, which a CPU does faster. The update is two products over all experts and blocks at once,

    middle[e, j] = x[e, j] · A[e, j]          exchanged to [e, i], as in `blocks.exchange`
    y[e, i]     += scale · middle[e, i] · B[e, i]

and what is kept for the backward pass is the input, as the caller has it, and the small middle tensor.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.integrations import moe

from gralora.tuner.blocks import Factors
from gralora.tuner.fused import FEW_TOKENS, is_transformed

# Rows of a batch, as a multiple of those that are needed, above which grouped products are faster: for the factors, and
# for the frozen weights, which a grouped product does not read where an expert has no rows.
_PADDING, _PADDING_OF_WEIGHTS = 4, 2.5


class _Index(NamedTuple):
    """Where blocks of rows are: of `x.view(-1, n)` and `y.view(-1, m)`, and of a batch `[experts, k, rows, …]`."""

    of_rows: Int[Tensor, " batch"]  # block of the rows for each block of the batch
    of_tokens: Int[Tensor, " batch"]  # block of the tokens for each block of the batch
    places: Int[Tensor, " pairs"]  # block of the batch for each block of the rows
    by_token: Int[Tensor, " pairs"]  # block of the batch for each block of the pairs in the order of the tokens


class Routing:
    """Rows for the pairs of a token and an expert, sorted by expert, with the same number for each expert if `is_even`.

    Attributes:
        top_k: Number of experts of a token.
        number: Number of experts.
        batches: Whether updates are computed in batches: on a CPU, with little padding, where nothing else watches
            the products.
        has_few_rows: Whether these batches are small beside weights and factors.
        is_even: Whether every expert has `most` rows, of which some belong to no pair.
        most: Number of rows of the busiest expert, where it is known.
        tokens: Token of each row; that of any row where it belongs to no pair.
        experts: Expert of each row.
        stops: Row after the last one of each expert.
    """

    def __init__(self, top_k_index: Int[Tensor, "t top_k"], number: int) -> None:
        self.top_k, self.number = top_k_index.shape[-1], number
        self.experts, order = torch.sort(top_k_index.reshape(-1))
        self.tokens, device = order // self.top_k, order.device
        # `histc` takes floats on a CPU only; unlike `bincount` it never synchronises with a GPU.
        values = self.experts.float() if device.type in ("cpu", "mps") else self.experts.int()
        self._counts = torch.histc(values, bins=number, min=0, max=number - 1)
        self.stops = torch.cumsum(self._counts, 0, dtype=torch.int32)
        self._indices: dict[int, _Index] = {}
        row = torch.arange(len(order), device=device)
        self.batches = self.has_few_rows = self.is_even = False
        if device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed():
            self.most = int(self._counts.max())
            self.batches = 0 < number * self.most <= _PADDING * len(order)
            self.has_few_rows = self.batches and self.most <= FEW_TOKENS
            self.is_even = self.has_few_rows and number * self.most <= _PADDING_OF_WEIGHTS * len(order)
        if self.is_even:
            row = self._within() + self.most * self.experts
            self.tokens = torch.zeros(number * self.most, dtype=torch.int64).index_copy_(0, row, self.tokens)
            self.experts = torch.arange(number).repeat_interleave(self.most)
            self._empty = torch.ones(len(self.tokens), 1, dtype=torch.bool).index_fill_(0, row, False)
        self._row_of_pair = torch.empty_like(order).index_copy_(0, order, row)

    def rows_of(self, tokens: Float[Tensor, "t width"]) -> Float[Tensor, "rows width"]:
        """Return the row of each pair; zero where there is no pair, so that nothing overflows there."""
        rows = tokens[self.tokens]
        return rows.masked_fill(self._empty, 0) if self.is_even else rows

    def by_token(self, rows: Float[Tensor, "rows width"]) -> Float[Tensor, "t top_k width"]:
        """Return the rows of the pairs in the order of the tokens."""
        return rows.index_select(0, self._row_of_pair).unflatten(0, (-1, self.top_k))

    def _within(self) -> Int[Tensor, " pairs"]:
        """Return the position of each sorted pair among the pairs of its expert."""
        starts = self.stops - self._counts.long()
        return torch.arange(len(self.experts)) - starts[self.experts]

    def to_batch(
        self, x: Float[Tensor, "t in"], k: int, is_of_tokens: bool, dtype: torch.dtype
    ) -> Float[Tensor, "experts k most n"]:
        """Return the blocks of rows in a batch.

        Args:
            x: Rows, or the tokens that they belong to.
            k: Number of blocks.
            is_of_tokens: Whether `x` are the tokens.
            dtype: Of the result.
        """
        if self.is_even and not is_of_tokens:
            return (
                x.view(self.number, self.most, k, -1).transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)
            )
        index = self.index(k)
        blocks = x.reshape(-1, x.shape[1] // k).index_select(0, index.of_tokens if is_of_tokens else index.of_rows)
        return blocks.view(self.number, k, self.most, -1).to(dtype)

    def from_batch(self, batch: Float[Tensor, "experts k most m"]) -> Float[Tensor, "rows out"]:
        """Return the rows of a batch."""
        _, k, _, m = batch.shape
        if self.is_even:
            return batch.transpose(1, 2).reshape(-1, k * m)
        return batch.view(-1, m).index_select(0, self.index(k).places).view(-1, k * m)

    def sum_by_token(self, batch: Float[Tensor, "experts k most n"]) -> Float[Tensor, "t in"]:
        """Return for every token the sum of its rows in a batch."""
        _, k, _, n = batch.shape
        return batch.view(-1, n).index_select(0, self.index(k).by_token).view(-1, self.top_k, k * n).sum(1)

    def zero_batch(self, rows: Float[Tensor, "rows out"], k: int, dtype: torch.dtype) -> Tensor:
        """Return the blocks of rows in a batch that is zero where there is no row."""
        if self.is_even:
            return self.to_batch(rows, k, False, dtype)
        blocks = rows.reshape(-1, rows.shape[1] // k).to(dtype)
        zeros = blocks.new_zeros(self.number * k * self.most, blocks.shape[1])
        return zeros.index_copy(0, self.index(k).places, blocks).view(self.number, k, self.most, -1)

    def index(self, k: int) -> _Index:
        """Return where blocks of rows are, for `k` blocks in a row."""
        if k not in self._indices:
            number, most, block = self.number, self.most, torch.arange(k)
            if self.is_even:
                row = torch.arange(number * most)
                row_of_batch, expert, within = row.view(number, most), self.experts, row % most
            else:
                expert, within = self.experts, self._within()
                row_of_batch = torch.zeros(number, most, dtype=torch.int64)  # any row where there is none
                row_of_batch[expert, within] = torch.arange(len(expert))
            places = (expert * k * most + within).unsqueeze(1) + block * most
            of_rows, of_tokens = (
                ((source * k).unsqueeze(1) + block.unsqueeze(1)).flatten()
                for source in (row_of_batch, self.tokens[row_of_batch])
            )
            self._indices[k] = _Index(of_rows, of_tokens, places.flatten(), places[self._row_of_pair].flatten())
        return self._indices[k]


def product(
    x: Float[Tensor, "rows n"], weights: Float[Tensor, "experts n m"], routing: Routing
) -> Float[Tensor, "rows m"]:
    """Return the product of each row with the matrix of its expert, in the dtype of `weights`."""
    x = x.to(weights.dtype)
    if routing.is_even:
        return torch.bmm(x.view(routing.number, routing.most, -1), weights).flatten(0, 1)
    if weights.dtype == torch.float64 or not (_is_aligned(x) and _is_aligned(weights)):
        return torch.ops.transformers.grouped_mm_fallback(x, weights, routing.stops)
    return moe._grouped_mm(x, weights, routing.stops)


def _is_aligned(tensor: Tensor) -> bool:
    """Return whether torch's grouped product takes the strides of a tensor."""
    return all(stride == 1 or stride * tensor.itemsize % 16 == 0 for stride in tensor.stride())


def add_update(
    y: Float[Tensor, "rows out"],
    x: Float[Tensor, "rows in"],
    tokens: Float[Tensor, "t in"] | None,
    factors: Factors,
    scale: float,
    dtype: torch.dtype,
    routing: Routing,
) -> Float[Tensor, "rows out"]:
    """Return `y + update(x)`, each row by the factors of its expert; `y` may be changed in place.

    Args:
        y: Output of the frozen experts.
        x: Input.
        tokens: The tokens, where each row of `x` is the row of its token.
        factors: Stacks of factors as they are stored.
        scale: Factor of the whole update.
        dtype: In which it is computed.
        routing: Which rows belong to which expert.
    """
    if routing.has_few_rows:
        dtype = factors.widest(dtype)  # so that the factors are not cast
    A, B, A_general, B_general = factors
    pairs = [(A, B)]
    if A_general is not None and B_general is not None:  # the hybrid part is one of a single block
        pairs.append((A_general.mT.unsqueeze(1), B_general.mT.unsqueeze(1)))
    for a, b in pairs:
        if routing.batches:
            source = x if tokens is None else tokens
            y = _BatchedUpdate.apply(y, source, a, b, scale, dtype, routing, tokens is not None)
        else:
            y = y + _grouped_update(x.to(dtype), a.to(dtype), (b * scale).to(dtype), routing).to(y.dtype)
    return y


def _grouped_update(x: Tensor, A: Tensor, B: Tensor, routing: Routing) -> Tensor:
    """Return the update of sorted rows, by grouped products."""
    _, k, n, r = A.shape
    middle = torch.stack([product(x[:, j * n : (j + 1) * n], A[:, j], routing) for j in range(k)])
    middle = middle.unflatten(-1, (k, r // k)).permute(2, 1, 0, 3).flatten(-2)
    return torch.cat([product(middle[i], B[:, i], routing) for i in range(k)], 1)


class _BatchedUpdate(torch.autograd.Function):
    """`y += update(x)` for rows in a batch. Its backward pass consists of differentiable operations."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scale: float,
        dtype: torch.dtype,
        routing: Routing,
        is_of_tokens: bool,
    ) -> Tensor:
        middle = _middle(x, A, scale, dtype, routing, is_of_tokens)
        y.add_(routing.from_batch((middle @ B.to(dtype)).to(y.dtype)))
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, A, B, middle)
        ctx.settings = scale, dtype, routing, is_of_tokens
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, A, B, middle = ctx.saved_tensors
        scale, dtype, routing, is_of_tokens = ctx.settings
        _, need_x, need_A, need_B, *_ = ctx.needs_input_grad
        k = A.shape[1]
        if torch.is_grad_enabled():  # for second derivatives, which the kept one does not carry
            middle = _middle(x, A, scale, dtype, routing, is_of_tokens)
        g_batch = routing.zero_batch(g, k, dtype)
        grad_x = grad_A = grad_B = None
        if need_B:
            grad_B = (middle.mT @ g_batch).to(B.dtype)
        if need_x or need_A:
            g_middle = _exchange(g_batch @ B.to(dtype).mT) * scale
            if need_A:
                grad_A = (routing.to_batch(x, k, is_of_tokens, dtype).mT @ g_middle).to(A.dtype)
            if need_x:
                batch = g_middle @ A.to(dtype).mT
                grad_x = (routing.sum_by_token(batch) if is_of_tokens else routing.from_batch(batch)).to(x.dtype)
        return g, grad_x, grad_A, grad_B, None, None, None, None


def _middle(x: Tensor, A: Tensor, scale: float, dtype: torch.dtype, routing: Routing, is_of_tokens: bool) -> Tensor:
    """Return the scaled middle tensor `[experts, k, most, r]`, exchanged."""
    return _exchange(routing.to_batch(x, A.shape[1], is_of_tokens, dtype) @ A.to(dtype)) * scale


def _exchange(middle: Tensor) -> Tensor:
    """Swap the block index with the block inside the rank: `[e, j, rows, (i s)]` becomes `[e, i, rows, (j s)]`."""
    k = middle.shape[1]
    return middle.unflatten(-1, (k, -1)).permute(0, 3, 2, 1, 4).flatten(-2)

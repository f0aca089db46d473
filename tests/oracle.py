"""The paper's double loop over blocks, in float64. Slow, obvious, and without a line of gralora.

`A` is `[k, n, r]`, `B` is `[k, r, m]`, the hybrid pair `[q, in]` and `[out, q]` or None.
"""

import torch


def apply(x, A, B, A_general, B_general, scale):
    """The update of one input vector or of many, `[..., in] -> [..., out]`."""
    k, n, r = A.shape
    m, s = B.shape[2], r // k
    A, B, x = A.double(), B.double(), x.double()
    y = torch.zeros(*x.shape[:-1], k * m, dtype=torch.float64)
    for i in range(k):
        for j in range(k):
            x_j = x[..., j * n : (j + 1) * n]
            a = A[j][:, i * s : (i + 1) * s]
            b = B[i][j * s : (j + 1) * s, :]
            y[..., i * m : (i + 1) * m] += (x_j @ a) @ b
    if A_general is not None:
        y = y + (x @ A_general.double().T) @ B_general.double().T
    return scale * y


def dense(A, B, A_general, B_general, scale):
    """The matrix of the update `[out, in]`: its columns are the updates of the basis vectors."""
    basis = torch.eye(A.shape[0] * A.shape[1], dtype=torch.float64)
    return apply(basis, A, B, A_general, B_general, scale).T

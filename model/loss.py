"""The Barlow Twins loss in its two exact forms, on one process or over the global batch of many.

    C_ij = 1/N sum_n a_ni b_nj        loss = sum_i (C_ii - 1)^2 + lambd * sum_{i != j} C_ij^2

where a, b [N, D] are the embeddings of the two views, each dimension normalised over the batch. C is D x D. The sum of
its squares is also <a a^T, b b^T> / N^2, two N x N matrices, which is less work and memory while N < D / 2.

Gradients are the true ones of the global batch: what each rank receives for its own embeddings is the derivative of
the one global loss, whatever the number of ranks. (Parameter gradients are therefore to be *summed* over ranks.)
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .distributed import all_gather, all_reduce, all_reduce_identity_grad, world_size


class LossParts(NamedTuple):
    """The loss and what it is made of: scalars, detached but for `loss`."""

    loss: Tensor
    invariance: Tensor  # sum_i (C_ii - 1)^2
    redundancy: Tensor  # sum_{i != j} C_ij^2, without lambd
    diagonal_mean: Tensor  # 1 when the two views agree
    off_diagonal_rms: Tensor  # 0 when no two dimensions say the same


def normalize(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Each dimension of z [N, D] with mean 0 and (biased) variance 1 over the global batch."""
    n = z.shape[0] * world_size()
    centered = z - all_reduce(z.sum(0)) / n
    variance = all_reduce(centered.square().sum(0)) / n
    return centered * (variance + eps).rsqrt()


def barlow_loss(a: Tensor, b: Tensor, lambd: float, form: str = "auto") -> LossParts:
    """The loss of normalised embeddings a, b [N, D], N on each rank alike; 1-element results.

    form: "dxd", "nxn", or "auto" for the cheaper one by shape.
    """
    n, d = a.shape[0] * world_size(), a.shape[1]
    if form == "auto":
        form = "nxn" if n < d / 2 else "dxd"
    if form == "dxd":
        c = all_reduce_identity_grad(a.T @ b / n)  # [D, D]
        diagonal, squares = c.diagonal(), c.square().sum()
    else:
        diagonal = all_reduce_identity_grad((a * b).sum(0) / n)  # [D]
        # This rank's rows of the two Gram matrices, against everybody's columns. Each embedding stands in a row and in
        # a column; by symmetry both give the same gradient, so the columns are constants and the rows count twice.
        everybodys_a, everybodys_b = (
            all_gather(z.detach()).flatten(0, 1) for z in (a, b)
        )  # [N, D]
        rows = (a @ everybodys_a.T * (b @ everybodys_b.T)).sum() / n**2  # [N / W, N] each
        squares = all_reduce_identity_grad(2 * rows - rows.detach())
    invariance = (diagonal - 1).square().sum()
    redundancy = squares - diagonal.square().sum()
    return LossParts(
        invariance + lambd * redundancy,
        invariance.detach(),
        redundancy.detach(),
        diagonal.detach().mean(),
        (redundancy.detach().clamp(min=0) / max(1, d * (d - 1))).sqrt(),
    )

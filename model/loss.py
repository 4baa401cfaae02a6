"""The Barlow Twins loss in its two exact forms, on one process or over the global batch of several.

    C_ij = 1/N sum_n a_ni b_nj
    loss = sum_i (C_ii - 1)^2 + lambd * sum_{i != j} C_ij^2

a, b [N, D] are the embeddings of the two views, each dimension normalised over the batch. C is the
cross-correlation matrix, [D, D]. The sum of its squares is also

    sum_ij C_ij^2 = <a a^T, b b^T> / N^2

with two [N, N] matrices, which takes less work and memory while N < D / 2. So there is a "dxd" form
and an "nxn" form.

The gradient is the true one of the global batch: each rank receives for its own embeddings the
derivative of the one global loss, for any number of ranks. Gradients of parameters must therefore
be *summed* over ranks, not averaged (`compile_and_wrap` in engine.py does that).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .distributed import all_gather, all_reduce, all_reduce_identity_grad, world_size


class LossParts(NamedTuple):
    """The loss and its parts, all of them scalars. Only `loss` carries a gradient."""

    loss: Tensor
    invariance: Tensor  # sum_i (C_ii - 1)^2
    redundancy: Tensor  # sum_{i != j} C_ij^2, without lambd
    diagonal_mean: Tensor  # 1 if the embeddings of the two views agree
    off_diagonal_rms: Tensor  # 0 if no two dimensions are correlated


def normalize(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise each dimension to mean 0 and (biased) variance 1 over the global batch.

    Like `torch.nn.BatchNorm1d` without parameters in training mode. On several ranks, z [N, D] has
    the rows of this rank.
    """
    n = z.shape[0] * world_size()
    centered = z - all_reduce(z.sum(0)) / n
    variance = all_reduce(centered.square().sum(0)) / n
    return centered * (variance + eps).rsqrt()


def barlow_loss(a: Tensor, b: Tensor, lambd: float, form: str = "auto") -> LossParts:
    """The loss of normalised embeddings (see the formulas at the top of this file).

    Args:
        a: Embeddings of view a, [N, D], normalised by `normalize`. N is the same on each rank.
        b: Embeddings of view b, [N, D].
        lambd: Weight of the off-diagonal terms.
        form: "dxd", "nxn", or "auto" for the one that is cheaper at these shapes.
    """
    n, d = a.shape[0] * world_size(), a.shape[1]
    if form == "auto":
        form = "nxn" if n < d / 2 else "dxd"
    if form == "dxd":
        diagonal, sum_of_squares = _correlation_dxd(a, b, n)
    else:
        diagonal, sum_of_squares = _correlation_nxn(a, b, n)

    invariance = (diagonal - 1).square().sum()
    redundancy = sum_of_squares - diagonal.square().sum()
    off_diagonal_count = max(1, d * (d - 1))
    return LossParts(
        loss=invariance + lambd * redundancy,
        invariance=invariance.detach(),
        redundancy=redundancy.detach(),
        diagonal_mean=diagonal.detach().mean(),
        off_diagonal_rms=(redundancy.detach().clamp(min=0) / off_diagonal_count).sqrt(),
    )


def _correlation_dxd(a: Tensor, b: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The diagonal of C [D] and the sum of all squares of C, from C itself."""
    c = all_reduce_identity_grad(a.T @ b / n)  # [D, D]
    return c.diagonal(), c.square().sum()


def _correlation_nxn(a: Tensor, b: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The same from the Gram matrices of a and b. Each rank computes its own rows of them.

    A sample occurs in one row and in one column of a Gram matrix. Both give it the same gradient,
    because the matrix is symmetric. So the columns are constants here, and the gradient of the rows
    counts twice.
    """
    diagonal = all_reduce_identity_grad((a * b).sum(0) / n)  # [D]
    global_a = all_gather(a.detach()).flatten(0, 1)  # [N, D], of all ranks
    global_b = all_gather(b.detach()).flatten(0, 1)
    # [N / W, N] each: the rows of this rank.
    sum_of_rows = (a @ global_a.T * (b @ global_b.T)).sum() / n**2
    with_twice_the_gradient = 2 * sum_of_rows - sum_of_rows.detach()
    return diagonal, all_reduce_identity_grad(with_twice_the_gradient)

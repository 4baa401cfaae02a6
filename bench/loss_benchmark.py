"""The two exact forms of the Barlow Twins loss: the time and the memory that each takes.

The authors compute the D x D cross-correlation matrix. The same sum can be computed from N x N
matrices, which is cheaper if the batch N is smaller than the embedding width D
(docs/method.md). Both are measured from embeddings to gradients.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import model

from . import reference_step
from .step_comparison import Candidate, RunStep, memory_growth

AUTHORS_LOSS = "authors' loss, D x D"
OUR_LOSS = "our loss, N x N"
_LAMBD = 0.0051  # the paper's weight of the off-diagonal terms


class LossShape(NamedTuple):
    """The shape of the embeddings, [N, D] for each view."""

    n: int
    d: int


FULL_SHAPE = LossShape(256, 16384)  # the D x D matrix takes one GiB
QUICK_SHAPE = LossShape(64, 4096)


def loss_candidates(shape: LossShape, device: torch.device) -> list[Candidate]:
    """Both forms, the authors' first."""
    return [
        Candidate(form, torch.float32, partial(prepare_loss, form, shape, device))
        for form in (AUTHORS_LOSS, OUR_LOSS)
    ]


def prepare_loss(form: str, shape: LossShape, device: torch.device) -> RunStep:
    """A function from random embeddings of two views to the gradients of the loss."""
    z_a = torch.randn(shape.n, shape.d, device=device, requires_grad=True)
    z_b = torch.randn(shape.n, shape.d, device=device, requires_grad=True)

    def run_step() -> None:
        z_a.grad = None
        z_b.grad = None
        if form == AUTHORS_LOSS:
            a, b = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
            reference_step.loss(a, b, _LAMBD).backward()
        else:
            a, b = model.normalize(z_a), model.normalize(z_b)
            model.barlow_loss(a, b, _LAMBD, form="nxn").loss.backward()

    return run_step


def loss_memory_on_cpu(form: str, shape: LossShape) -> float:
    """GiB that the loss and its gradients take on a CPU, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(_measure_growth, form, shape).result()


def _measure_growth(form: str, shape: LossShape) -> float:
    cpu = torch.device("cpu")
    # Starts threads and loads libraries, which take memory as well.
    prepare_loss(form, LossShape(64, 256), cpu)()
    return memory_growth(prepare_loss(form, shape, cpu))

"""How the network runs on its devices: precision, compilation, and data parallelism."""

# Without `from __future__ import annotations`: DDP compares the annotations of its hook with types,
# and rejects them as strings.

import os
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .barlow_twins import BarlowTwins
from .distributed import world_size


def prepare_device(device: torch.device, deterministic: bool) -> None:
    """Configure torch for speed, or for (slower) arithmetic that repeats to the bit."""
    if deterministic:
        # cuBLAS reads this when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic
    if device.type == "cuda":
        # TF32 for matrix products in float32; cuDNN uses it for convolutions anyway.
        torch.set_float32_matmul_precision("high")


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype for autocast.

    Args:
        name: "float32", "bfloat16", "float16" or "auto". On a CPU, "auto" is float32. On a GPU it
            is bfloat16 if the hardware has it, and else float16.
        device: The device to train on.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def choose_compilation(mode: str, device: torch.device) -> tuple[str | None, str]:
    """The mode for torch.compile, or None for no compilation; and a phrase for the log.

    torch.compile fails only when it first runs, so this function compiles a small function to find
    out whether the machine has a working compiler. If not, training runs uncompiled.

    Args:
        mode: A mode of torch.compile, "off", or "auto", which is the default mode on a GPU and off
            on a CPU.
        device: The device to train on.
    """
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return None, "not compiled"
    try:
        torch.compile(torch.square)(torch.ones(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        return None, f"not compiled, since torch.compile fails here: {reason}"
    if mode in ("auto", "default"):
        return "default", "compiled at the first step"
    return mode, f"compiled at the first step ({mode})"


def compile_and_wrap(
    device: torch.device, network: BarlowTwins, compile_mode: str | None
) -> nn.Module:
    """Compile the network in place, and wrap it for data parallelism if there are several ranks.

    Args:
        device: The device that `network` is on.
        network: The network to train.
        compile_mode: A mode of torch.compile, or None (see `choose_compilation`).

    Returns:
        The module to call in the training step. It has the parameters of `network`.
    """
    if compile_mode is not None:
        _compile(network, compile_mode)
    if world_size() == 1:
        return network

    # Uncompiled on GPUs, torch's own layer serves, unless views share a batch or activations are
    # recomputed: it can do neither.
    sync_batch_norm_works = not network.one_pass and not network.backbone.layer1.recompute
    if compile_mode is None and device.type == "cuda" and sync_batch_norm_works:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)

    with warnings.catch_warnings():
        # torch 2.15 has a new name for broadcast_buffers, which torch 2.11 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        parallel = DistributedDataParallel(
            network,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # running averages are those of the global batch already
            gradient_as_bucket_view=True,
        )
    parallel.register_comm_hook(None, _sum_gradients)
    return parallel


def _compile(network: BarlowTwins, mode: str) -> None:
    """Compile the network with its loss as one graph, or as two if there are several ranks.

    Most gradients are the projector's. With two graphs they are sent to the other ranks while those
    of the backbone are computed.
    """
    if world_size() == 1:
        network.compile(mode=mode)
        return
    # Otherwise the graphs would be cut further, at every 25 MiB of gradients.
    torch._dynamo.config.optimize_ddp = False
    network.backbone.compile(mode=mode)
    network.compare_features = torch.compile(network.compare_features, mode=mode)  # type: ignore[method-assign]


def _sum_gradients(
    _: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # missing in torch's stubs
) -> torch.futures.Future[Tensor]:
    """DDP hook: gradients are summed over the ranks, not averaged (see loss.py)."""
    summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return summed.then(lambda future: future.value()[0])

"""How the network is run on its devices: precision, compilation, and one copy on each rank."""

# Without `from __future__ import annotations`: torch compares those of `_sum` with its types, and refuses words.

import os
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .barlow_twins import BarlowTwins
from .distributed import world_size


def prepare_device(device: torch.device, deterministic: bool) -> None:
    """Fast arithmetic where float32 stays, or (slower) arithmetic that gives the same bits each time."""
    if deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, which cuDNN uses for convolutions anyway


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype for autocast. `auto`: bfloat16 on a GPU that has it, else float16 there; float32 on a CPU."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def choose_compilation(mode: str, device: torch.device) -> tuple[str | None, str]:
    """The mode for torch.compile, None for none; and in words what was chosen and why.

    mode: one of torch.compile's, "off", or "auto" (the default mode on a GPU). A machine without a compiler goes on
    without: torch.compile finds that out only when it first runs, so a small function is tried here.
    """
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return None, "not compiled"
    try:
        torch.compile(torch.square)(torch.ones(8, device=device))
    except Exception as error:
        return (
            None,
            f"not compiled, since torch.compile fails here: {str(error).strip().splitlines()[0]}",
        )
    mode = "default" if mode == "auto" else mode
    return mode, "compiled at the first step" + (f" ({mode})" if mode != "default" else "")


def compile_and_wrap(
    device: torch.device, network: BarlowTwins, compile_mode: str | None
) -> nn.Module:
    """What takes the place of `network`, already on `device`, in the training step: its parameters are the same.

    The network and its loss become one graph. Among several ranks they become two: the gradients of the projector,
    which are most of all, then travel while those of the backbone are computed.
    """
    if compile_mode is not None:
        if world_size() == 1:
            network.compile(mode=compile_mode)
        else:
            torch._dynamo.config.optimize_ddp = (
                False  # it would cut them further, at every 25 MiB of gradients
            )
            network.backbone.compile(mode=compile_mode)
            network.compare = torch.compile(network.compare, mode=compile_mode)  # type: ignore[method-assign]
    if world_size() == 1:
        return network
    one_by_one = not (
        network.one_pass or network.backbone.layer1.recompute
    )  # all that torch's own layer can do
    if compile_mode is None and device.type == "cuda" and one_by_one:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # torch 2.15 has another name for it, which 2.11 does not know
        copies = DistributedDataParallel(
            network,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # batch norm's averages are those of the global batch already
            gradient_as_bucket_view=True,
        )
    # The gradient of the global loss is the sum of what the ranks find, not their mean (see loss.py).
    copies.register_comm_hook(None, lambda _, bucket: _sum(bucket.buffer()))
    return copies


def _sum(gradients: Tensor) -> torch.futures.Future[Tensor]:
    summed = dist.all_reduce(gradients, async_op=True).get_future()
    return summed.then(lambda future: future.value()[0])

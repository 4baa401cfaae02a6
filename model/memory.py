"""Memory use: of this process as Linux reports it, of a device, and the largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

_PROCESS_STATUS = Path("/proc/self/status")
_MACHINE_MEMORY = Path("/proc/meminfo")


def resident_bytes() -> int:
    """The resident memory of this process (VmRSS)."""
    return _read_proc_field(_PROCESS_STATUS, "VmRSS")


def peak_resident_bytes() -> int:
    """The peak resident memory (VmHWM) since process start or the last `reset_peak_resident`."""
    return _read_proc_field(_PROCESS_STATUS, "VmHWM")


def reset_peak_resident() -> None:
    """Set the peak resident memory of this process to the current one."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The peak of allocated bytes on a GPU, or of resident bytes of the process if it is a CPU.

    It counts from the last `reset_peak_memory`, or else from the start of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement for `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak_resident()


def largest_batch(
    device: torch.device, batch: int, peak: int, run_half_batch: Callable[[], object]
) -> int:
    """Estimate the largest batch of one rank that fits into its memory.

    The estimate assumes that memory grows linearly from a step of half the batch to a whole one.

    Args:
        device: The device that computes the step.
        batch: The number of images in the step that was measured.
        peak: The peak memory of that step, as `peak_memory` reports it, in bytes.
        run_half_batch: Runs forward and backward on `batch // 2` images.
    """
    reset_peak_memory(device)
    run_half_batch()
    growth = max(1, peak - peak_memory(device))
    bytes_per_image = growth / max(1, batch - batch // 2)

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # 5% are left for fragmentation. Memory that torch's allocator has cached can be used again.
        headroom = 0.95 * free + torch.cuda.memory_reserved(device) - peak
    else:
        available = _read_proc_field(_MACHINE_MEMORY, "MemAvailable")
        headroom = available + resident_bytes() - peak
    return max(0, batch + int(headroom / bytes_per_image))


def _read_proc_field(path: Path, field: str) -> int:
    """Bytes of one `field: value kB` line of a file in /proc."""
    for line in path.read_text().splitlines():
        if line.startswith(field):
            kibibytes = line.split()[1]
            return int(kibibytes) * 1024
    raise ValueError(f"{path} has no field {field}: measuring memory needs Linux")

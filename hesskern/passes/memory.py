"""How much memory a pass may take, and what is said when a device has less."""

from __future__ import annotations

from numbers import Real
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "budget_for",
    "check_budget",
    "free_bytes",
    "has_room",
    "out_of_memory",
    "release",
]

_ADVICE = "pass smaller batches, or set memory_budget= (bytes) to less than the device has free"


def check_budget(memory_budget: Any) -> int:
    """The number of bytes, or a TypeError or ValueError that names the argument."""
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, Real):
        raise TypeError(
            f"memory_budget must be a number of bytes, got {type(memory_budget).__name__}"
        )
    budget = float(memory_budget)
    if not budget >= 0:
        raise ValueError(f"memory_budget must be non-negative bytes, got {memory_budget!r}")
    return int(min(budget, 2**62))


def budget_for(memory_budget: Any, device: torch.device, default: int, share: float) -> int:
    """The bytes that may be used.

    Args:
        memory_budget: what the caller gave; None for a default.
        device: where the memory lies.
        default: bytes on a CPU.
        share: of what is free on a GPU.

    Raises:
        TypeError, ValueError: the caller gave no number of bytes.
    """
    if memory_budget is not None:
        return check_budget(memory_budget)
    return default if device.type != "cuda" else int(share * _free(device))


def _free(device: torch.device) -> int:
    """Bytes that new tensors find, those that torch holds for them included."""
    # memory_reserved and memory_allocated would each sort a list of all these numbers.
    known = torch.cuda.memory_stats_as_nested_dict(device)
    reserved, allocated = (
        int(known[name]["all"]["current"]) if known else 0
        for name in ("reserved_bytes", "allocated_bytes")
    )
    return torch.cuda.mem_get_info(device)[0] + reserved - allocated


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a new process or tensor finds; None where the system does not say."""
    if device.type == "cuda":
        return _free(device)
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (found,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(found) * 1024
    except (OSError, ValueError, IndexError):
        return None


def has_room(nbytes: int, device: torch.device) -> bool:
    """Whether a device has memory to spare for what is not needed but saves time.

    On a GPU it may take a quarter of what is free, and a quarter of all must stay free, however
    many ask for some.
    """
    if device.type != "cuda":
        return True
    free, total = _free(device), torch.cuda.mem_get_info(device)[1]
    return 4 * nbytes <= free and 4 * (free - nbytes) >= total


def release() -> None:
    """Hands memory that torch holds and nobody uses back to the device."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError, again: bool) -> torch.OutOfMemoryError:
    """The same error with what can be done about it.

    Args:
        error: of the last try.
        again: whether there was one before.
    """
    tries = "the device ran out of memory" + (", also with less at a time" if again else "")
    return torch.OutOfMemoryError(f"{tries}; {_ADVICE}\n{error}")

"""Peak memory of one contender, measured in a process of its own.

``python -m hesskern.apps.bench.memory SUITE KEY CONTENDER SETTINGS`` builds the problem, imports
what the contender needs, notes the resident memory, runs the contender (what it prepares included),
and prints by how many bytes the peak exceeded it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import resource
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.benchmark.utils.common import set_torch_threads

from hesskern.apps.bench.settings import Settings
from hesskern.progress import reporter

__all__ = ["measure", "peak_memory"]


def peak_memory(suite: str, key: str, contender: str, settings: Settings) -> int | None:
    """Bytes of peak memory beyond an idle process with the same imports and data.

    Returns:
        None where the process failed (its message goes to stderr).
    """
    plain = {name: _plain(value) for name, value in asdict(settings).items()}
    finished = subprocess.run(
        [sys.executable, "-m", __spec__.name, suite, key, contender, json.dumps(plain)],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        if finished.returncode == 0:
            return int(json.loads(finished.stdout.splitlines()[-1])["peak_bytes"])
    except (ValueError, LookupError):
        pass
    reason = finished.stderr.strip().splitlines()
    print(
        f"memory of {contender!r} was not measured: {reason[-1] if reason else 'no reason'}",
        file=sys.stderr,
    )
    return None


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def measure(suite: str, key: str, name: str, settings: Settings) -> int:
    """Runs a contender in this process; its peak of resident memory beyond that before, in bytes.

    Raises:
        ValueError: there is no such problem or contender.
    """
    from hesskern.apps.bench.suites import find_problem

    with set_torch_threads(settings.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, _, contenders = find_problem(suite, key).build(settings, reporter(False))
        found = [contender for contender in contenders if contender.name == name]
        if not found:
            raise ValueError(f"problem {key!r} of {suite!r} has no contender {name!r}")
        contender = found[0]
        if contender.module is not None:
            importlib.import_module(contender.module)
        _load_kernels()
        if contender.warm:
            call = contender.prepare()
            before = _idle()
            call()
        else:
            before = _idle()
            contender.prepare()()
        return max(0, _peak() - before)


def _load_kernels() -> None:
    """Has torch's BLAS and autograd load their code and start their threads."""
    weight = torch.randn(256, 256, requires_grad=True)
    torch.autograd.grad((torch.randn(256, 256) @ weight).relu().sum(), weight)


def _idle() -> int:
    """Resident bytes now, with freed memory returned and the peak set back where Linux allows."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    """Peak of resident bytes.

    Linux counts ``ru_maxrss`` on from the process that started this one, so its own figure for
    the process comes first.
    """
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _main() -> None:
    suite, key, contender, plain = sys.argv[1:]
    options = json.loads(plain)
    for name in ("root", "checkpoint"):
        options[name] = Path(options[name]) if options[name] else None
    print(json.dumps({"peak_bytes": measure(suite, key, contender, Settings(**options))}))


if __name__ == "__main__":
    _main()

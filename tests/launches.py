"""What a pass asks of a device, counted on the CPU, which plays it.

Every dispatched operator takes the host some microseconds; all but views and bare allocations are
launches. ``python tests/launches.py [mlp | cnn | lenet5 | resnet18] [mc | exact | hessians]`` shows
where the operators of one batch come from.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import hesskern as hk
from hesskern.passes.checks import Checks
from hesskern.zoo.models import build

_NO_LAUNCH = frozenset(
    (
        "alias as_strided detach diagonal empty empty_like empty_strided expand lift_fresh"
        " new_empty permute select slice split split_with_sizes squeeze t transpose unbind"
        " unsqueeze view"
    ).split()
)
_PACKAGE = str(Path(hk.__file__).parent)


class Operators(TorchDispatchMode):
    """Counts operators by the line of this package that called for them."""

    def __init__(self) -> None:
        super().__init__()
        self.by_line: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        frame = sys._getframe(1)
        while frame.f_back is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self.by_line[line, function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def dispatched(self) -> int:
        return self.by_line.total()

    @property
    def launches(self) -> int:
        return sum(n for (_, name), n in self.by_line.items() if name not in _NO_LAUNCH)


class Reads(TorchFunctionMode):
    """Counts what makes the host wait for values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        name = getattr(function, "__name__", "")
        if name in ("__bool__", "__float__", "__index__", "__int__", "item", "numpy", "tolist"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def playing_device() -> Iterator[None]:
    """The CPU as a device: no value is looked at, and rows go backwards by torch's operations."""
    with ExitStack() as stack:
        for module in (
            "checks",
            "draws",
            "roots",
            "losses",
            "transformers",
            "masks",
            "position_mask",
        ):
            stack.enter_context(mock.patch(f"hesskern.passes.{module}.on_host", return_value=False))
        rows = mock.patch("hesskern.graph.propagation._by_kernels", return_value=False)
        stack.enter_context(rows)
        yield


@dataclass
class Case:
    """A network and batches for it.

    Attributes:
        layers: number of Linear layers and convolutions.
    """

    model: nn.Module
    shape: tuple[int, ...]
    layers: int = field(init=False)

    def __post_init__(self) -> None:
        kinds = (nn.Linear, nn.Conv2d)
        self.layers = sum(isinstance(module, kinds) for module in self.model.modules())

    def batches(self, count: int, n: int = 4) -> list[tuple[Tensor, Tensor]]:
        source = torch.Generator().manual_seed(0)
        return [
            (
                torch.randn(n, *self.shape, generator=source),
                torch.randint(0, 10, (n,), generator=source),
            )
            for _ in range(count)
        ]


def mlp(depth: int = 3) -> nn.Module:
    """784-200-200-10, or as many layers of 200 in between as it takes."""
    layers: list[nn.Module] = [nn.Linear(784, 200), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Linear(200, 200), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(200, 10))


def cnn() -> nn.Module:
    """Convolutions 3x3 in three pairs, each with max pooling behind, and one linear layer."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (4, 8, 16):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 16, 10))


CASES: dict[str, Callable[[], Case]] = {
    "mlp": lambda: Case(mlp(), (784,)),
    "cnn": lambda: Case(cnn(), (3, 32, 32)),
    "lenet5": lambda: Case(build("lenet5", (3, 32, 32), 10), (3, 32, 32)),
    "resnet18": lambda: Case(build("resnet18-w2-bn", (3, 32, 32), 10), (3, 32, 32)),
}
LOSS = nn.CrossEntropyLoss()
Pass = Callable[[nn.Module, Any], Any]
PASSES: dict[str, Pass] = {
    "mc": lambda model, data: hk.kronecker_factors(model, data, LOSS, output="mc"),
    "exact": lambda model, data: hk.kronecker_factors(model, data, LOSS),
    "hessians": lambda model, data: hk.layer_hessians(model, data, LOSS),
}


class _Watched:
    """Data whose last but one batch is counted, all memory being there."""

    def __init__(self, data: list[Any], operators: Operators) -> None:
        self._data, self._operators = data, operators

    def __iter__(self) -> Iterator[Any]:
        *before, counted, last = self._data
        yield from before
        with self._operators:
            yield counted
        yield last


def of_a_batch(case: Case, run: Pass) -> Operators:
    """Operators that a pass dispatches for one batch."""
    operators = Operators()
    with playing_device():
        run(case.model, _Watched(case.batches(4), operators))
    return operators


def of_the_model(case: Case, rows: int) -> Operators:
    """Those of the model itself: forward, and backward to its weights once for every row."""
    model, weights = case.model.eval(), [p for p in case.model.parameters() if p.dim() > 1]
    operators = Operators()
    with operators:
        outputs = model(case.batches(1)[0][0])
        for _ in range(rows):
            torch.autograd.grad(outputs, weights, torch.ones_like(outputs), retain_graph=True)
    return operators


def waits_of_a_pass(case: Case, run: Pass) -> list[str]:
    """Where the host waits for the device in a whole pass over some batches."""
    reads = Reads()
    settle, look = Checks.settle, Checks._look

    def counted(self: Checks) -> None:
        if self._pending:
            reads.found.append("settle")
        settle(self)

    def arrived(self: Checks) -> None:
        # What is read there has been copied to the host, behind an event that was waited for.
        before = len(reads.found)
        look(self)
        del reads.found[before:]

    with (
        playing_device(),
        mock.patch.object(Checks, "settle", counted),
        mock.patch.object(Checks, "_look", arrived),
        reads,
    ):
        run(case.model, case.batches(4))
    return reads.found


def main() -> None:
    name, kind = [*sys.argv[1:], "mlp", "mc"][:2] if len(sys.argv) != 2 else (sys.argv[1], "mc")
    case = CASES[name]()
    found, own = of_a_batch(case, PASSES[kind]), of_the_model(case, 1 if kind == "mc" else 9)
    for (line, operator), count in found.by_line.most_common():
        print(f"{count:5d} {operator:32s} {line}")
    print(f"{found.dispatched} operators, {found.launches} launches; {case.layers} layers")
    print(f"{own.dispatched} operators, {own.launches} launches of the model alone")


if __name__ == "__main__":
    main()

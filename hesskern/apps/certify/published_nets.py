"""The published networks and tasks by name: T-600, R-600, T-200^2_10, ..."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hesskern.zoo import models

__all__ = ["NETS", "Net", "parse_net"]

NETS = ("T-600", "T-1200", "T-300^2", "T-600^2", "R-600", "T-200^2_10", "T-600_10", "T-600^2_10")
_NAME = re.compile(r"([TR])-(\d+)(?:[\^x](\d+))?(_10)?")


@dataclass(frozen=True)
class Net:
    """A network of arXiv 2010.04261, section 5, and its task.

    Without ``_10`` there are two classes, digits 0 to 4 against 5 to 9, and one output: the logit
    of the second. R-: the labels are drawn at random, each class with the same probability.
    """

    width: int
    depth: int
    outputs: int
    random_labels: bool

    @property
    def name(self) -> str:
        """As published, e.g. ``T-200^2_10``."""
        power = f"^{self.depth}" if self.depth > 1 else ""
        task = "R" if self.random_labels else "T"
        return f"{task}-{self.width}{power}{'_10' if self.outputs > 1 else ''}"

    @property
    def spec(self) -> str:
        """The model's name for :func:`hesskern.zoo.models.build`."""
        return f"f{self.width}x{self.depth}"

    def build(self, input_shape: Sequence[int], seed: int) -> nn.Module:
        """The initialized network: Xavier-uniform weights, zero biases."""
        return models.build(self.spec, input_shape, self.outputs, seed)

    def targets(self, digits: Tensor, seed: int) -> Tensor:
        """[N] class indices from digits [N] in 0..9; ``seed`` draws random labels."""
        if self.random_labels:
            generator = torch.Generator().manual_seed(seed)
            labels = torch.randint(0, max(2, self.outputs), digits.shape, generator=generator)
            return labels.to(digits.device)
        return (digits >= 5).long() if self.outputs == 1 else digits

    def prior_record(self, input_shape: Sequence[int], seed: int) -> dict[str, object]:
        """How w0 was made, so that it can be made again."""
        return {
            "construction": "hesskern.models.build",
            "net": self.name,
            "model": self.spec,
            "input_shape": list(input_shape),
            "classes": self.outputs,
            "seed": seed,
        }


def parse_net(name: str) -> Net:
    """The net of a published name; ``x`` may stand for ``^``.

    Raises:
        ValueError: the name does not follow the pattern.
    """
    match = _NAME.fullmatch(name)
    if match is None or int(match[2]) < 1 or int(match[3] or 1) < 1:
        raise ValueError(
            f"net must be like {', '.join(NETS)} (T: true, R: random labels; width^depth; _10: ten "
            f"classes); got {name!r}"
        )
    task, width, depth, ten = match.groups()
    return Net(int(width), int(depth or 1), 10 if ten else 1, task == "R")

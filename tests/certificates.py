"""A small network and samples for the tests of certificates."""

from __future__ import annotations

import torch

from hesskern.apps.certify.published_nets import parse_net
from hesskern.pacbayes import TruncatedSettings
from hesskern.pacbayes.samples import Samples

NET = parse_net("T-6_10")
FAST = TruncatedSettings(batch_size=50, rank_in=5, rank_out=3)


def blobs(count: int = 150, seed: int = 0) -> Samples:
    """Ten Gaussian blobs as images of 3 x 4 pixels."""
    source = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, 12, generator=torch.Generator().manual_seed(99))
    targets = torch.randint(0, 10, (count,), generator=source)
    inputs = centres[targets] + 0.3 * torch.randn(count, 12, generator=source)
    return Samples(inputs.view(count, 1, 3, 4), targets)

"""A rank's part of a data set: what a sampler for several replicas repeats, or leaves out."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.distributed import DistributedSampler

from hesskern.parallel.ranks import Ranks

__all__ = ["weights_of_part"]


def weights_of_part(
    ranks: Ranks, data: Any, sample_weight: Tensor | None, stacklevel: int
) -> Tensor | None:
    """Weights of a rank's samples, zero for those that a ``DistributedSampler`` has padded with.

    Such a sampler gives every rank as many samples, and repeats some where the data set cannot be
    divided; without weights these would count twice.

    Args:
        ranks: that take part.
        data: of this rank.
        sample_weight: [samples of this rank] as given, or None.
        stacklevel: of a warning, in calls above.

    Returns:
        the weights, or ``sample_weight`` itself where nothing is repeated.

    Raises:
        RankError: the samplers of the ranks differ in more than their rank.
        ValueError: a sampler repeats samples, and it is not known which.

    Warns:
        UserWarning: the samplers leave samples out (``drop_last=True``).
    """
    sampler = _sampler(data)
    facts = None if sampler is None else _facts(sampler)
    ranks.agree("the samplers of the data", {"sampler": facts and facts[:-1]})
    if sampler is None or facts is None:
        return sample_weight
    taken = ranks.gather("parts of samplers", facts[-1])
    if sampler.num_replicas != ranks.size or len(set(taken)) < ranks.size:
        raise ValueError(
            f"data: its DistributedSampler makes parts {taken} of {sampler.num_replicas}, for "
            f"{ranks.size} ranks; every rank needs another part (num_replicas={ranks.size}, "
            "rank=its rank in the group)"
        )
    samples, parts = _samples(sampler), sampler.num_replicas
    given = sampler.num_samples * parts
    if given < samples:
        warnings.warn(
            f"data: DistributedSampler(drop_last=True) leaves out {samples - given} of {samples} "
            "samples",
            UserWarning,
            stacklevel=stacklevel + 1,
        )
    if given <= samples:
        return sample_weight
    own = max(0, -(-(samples - sampler.rank) // parts))
    if type(sampler).__iter__ is not DistributedSampler.__iter__:
        raise _unknown(f"{type(sampler).__name__} has an order of its own", given - samples)
    if type(data.batch_sampler) is not BatchSampler:
        name = type(data.batch_sampler).__name__
        raise _unknown(f"{name} makes the batches", given - samples)
    length = sampler.num_samples
    if data.drop_last:
        length -= length % data.batch_size
    weight = torch.ones(length, dtype=torch.float64)
    weight[own:] = 0
    if sample_weight is None:
        return weight
    if isinstance(sample_weight, Tensor) and sample_weight.shape == weight.shape:
        return sample_weight.to("cpu", torch.float64) * weight
    # The pass says what is wrong with it.
    return sample_weight


def _sampler(data: Any) -> DistributedSampler[Any] | None:
    """The sampler of a loader that gives one of several replicas its part."""
    if not isinstance(data, DataLoader):
        return None
    for sampler in (data.sampler, getattr(data.batch_sampler, "sampler", None)):
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None


def _samples(sampler: DistributedSampler[Any]) -> int:
    dataset: Any = sampler.dataset
    return len(dataset)


def _facts(sampler: DistributedSampler[Any]) -> list[Any]:
    """What has to be the same on every rank; last what must not be."""
    return [
        type(sampler).__name__,
        {
            "num_replicas": sampler.num_replicas,
            "samples of the data set": _samples(sampler),
            "shuffle": sampler.shuffle,
            "seed": sampler.seed,
            "epoch": sampler.epoch,
            "drop_last": sampler.drop_last,
        },
        sampler.rank,
    ]


def _unknown(reason: str, count: int) -> ValueError:
    return ValueError(
        f"data: its DistributedSampler repeats {count} of the samples, so that every rank gets as "
        f"many, and it is not known which ({reason}); make it with drop_last=True, or give each "
        "rank its own samples"
    )

"""Runs of certify() on small networks."""

import torch
from certificates import FAST, NET, blobs
from torch import nn

from hesskern.pacbayes import (
    Protocol,
    certify,
)

TERMS = Protocol(passes=5)
SHARED = Protocol(passes=5, form="langford-seeger", shared_variance=True)


def built(seed=3):
    return NET.build((1, 3, 4), seed)


def trained(data, steps=60):
    model = built()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        sgd.zero_grad()
        nn.functional.cross_entropy(model(data.inputs), data.targets).backward()
        sgd.step()
    return model


def run(data=None, **options):
    options = {"epochs": 2, "protocol": TERMS, "settings": FAST, **options}
    model = built()
    return certify(model, model, data or blobs(), **options)


def same(a, b):
    tensors_a, tensors_b = a.tensors(), b.tensors()
    return a.bound == b.bound and all(torch.equal(t, tensors_b[n]) for n, t in tensors_a.items())

"""What takes a device, and the same on another: public calls whose numbers are to be the CPU's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from networks import CE, classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk

Data = list[tuple[Any, ...]]


def same(
    found: Any, expected: Any, device: str, where: str = "result", *, tolerance: float = 1e-9
) -> None:
    """Equal numbers, those of ``found`` on the device."""
    near = {"rel": tolerance, "abs": tolerance / 1e3}
    if isinstance(expected, Tensor):
        assert found.device.type == device, where
        torch.testing.assert_close(
            found.cpu(), expected, rtol=near["rel"], atol=near["abs"], msg=lambda m: f"{where}: {m}"
        )
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected), where
        for key in expected:
            same(found[key], expected[key], device, f"{where}[{key!r}]", tolerance=tolerance)
    elif isinstance(expected, tuple | list):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(one, other, device, f"{where}[{i}]", tolerance=tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, **near), where
    else:
        assert found == expected, where


def mlp() -> nn.Module:
    return seeded(
        nn.Sequential(
            nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)
        )
    )


def cnn() -> nn.Module:
    return seeded(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, 4),
        )
    )  # fmt: skip


def batches(*shape: int, count: int = 3) -> Data:
    return [(randn(7, *shape, seed=i), classes(7, c=4, seed=i)) for i in range(count)]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Data]] = {
    "mlp": (mlp, batches(2, 6)),
    "cnn": (cnn, batches(2, 8, 8)),
}


def factors(found: hk.Factors) -> dict[str, Any]:
    return {
        name: (f.input_covariance, f.output_hessian, f.input_mean, f.num_samples, f.positions)
        for name, f in found.items()
    }


# Each takes a model and data on one device and returns what is to be the same on the other.
CALLS: dict[str, Callable[[nn.Module, Data], Any]] = {
    **{
        f"factors {output} {bias}": lambda m, data, output=output, bias=bias: factors(
            hk.kronecker_factors(m, data, CE, output=output, bias=bias)
        )
        for output in ("exact", "mc", "empirical")
        for bias in ("none", "joint")
    },
    "factors with diagonals": lambda m, data: dict(
        hk.kronecker_factors(m, data, CE, diagonal=True).diagonals
    ),
    "factors weighted": lambda m, data: factors(
        hk.kronecker_factors(m, [(*b, b[0].flatten(1)[:, 0].abs()) for b in data], CE)
    ),
    "factors decayed": lambda m, data: factors(
        _consumed(hk.FactorAccumulator(m, CE, decay=0.8), data).factors()
    ),
    **{
        f"ekfac {output} {bias}": lambda m, data, output=output, bias=bias: {
            name: (layer.values, layer.to_dense(), layer.trace())
            for name, layer in hk.ekfac(m, data, CE, output=output, bias=bias).items()
        }
        for output, bias in (("exact", "none"), ("mc", "joint"), ("empirical", "none"))
    },
    "ekfac weighted": lambda m, data: (
        hk.ekfac(m, [(*b, b[0].flatten(1)[:, 0].abs()) for b in data], CE).operator().diagonal()
    ),
    "ekfac by given factors": lambda m, data: (
        hk.ekfac(m, data, CE, factors=hk.kronecker_factors(m, data, CE)).operator().diagonal()
    ),
    "hessians": lambda m, data: _hessians(hk.layer_hessians(m, data, CE)),
    "hessians drawn": lambda m, data: _hessians(hk.layer_hessians(m, data, CE, output="mc")),
    "hessians joint": lambda m, data: _hessians(hk.layer_hessians(m, data, CE, bias="joint")),
    "hessians pruned": lambda m, data: _hessians(hk.layer_hessians(m, data, CE, tolerance=0.05)),
    "hessians rerun": lambda m, data: _hessians(hk.layer_hessians(m, data, CE, memory_budget=0)),
    "hessians rerun pruned": lambda m, data: _hessians(
        hk.layer_hessians(m, data, CE, memory_budget=0, tolerance=0.05)
    ),
}


# Of the networks' layers each call takes those named, or the last.
OPERATORS: dict[str, Callable[[nn.Module, Data], Any]] = {
    "gauss-newton": lambda m, data: _products(hk.GaussNewton(m, data, CE)),
    "gauss-newton rerun": lambda m, data: _products(hk.GaussNewton(m, data, CE, memory_budget=0)),
    "autograd": lambda m, data: _products(hk.AutogradHessian(m, data, CE)),
    "density": lambda m, data: _density(hk.spectral_density(_last(m, data), 5, 2)),
    "trace": lambda m, data: hk.hutchpp_trace(_last(m, data), 9).value,
    "nearest": lambda m, data: hk.nearest_kronecker(_last(m, data)).to_dense(),
    "corrected": lambda m, data: hk.eigenvalue_corrected(
        _last(m, data), _factors(m, data).operator()
    ).to_dense(),
    "kronecker": lambda m, data: _kronecker(_factors(m, data).operator()),
    "decoupling": lambda m, data: (
        hk.decoupling_error(_last(m, data), _factors(m, data).operator(), dense_below=1).spectral
    ),
    "decoupling dense": lambda m, data: (
        hk.decoupling_error(_last(m, data), _factors(m, data).operator()).frobenius
    ),
    "correspondence": lambda m, data: (
        hk.eigenvector_correspondence(hk.eigsh(_last(m, data), 3).vectors, _factors(m, data)).output
    ),
    "autocorrelation": lambda m, data: hk.input_autocorrelation(_factors(m, data)).mean_alignment,
    "clusters": lambda m, data: hk.gradient_clusters(m, data, _name(m)).by_both,
    "functional": lambda m, data: hk.functional_share(m, data, CE, _name(m)).spectral,
    "functional by probes": lambda m, data: (
        hk.functional_share(m, data, CE, _name(m), dense_below=1).spectral
    ),
    "predicted overlap": lambda m, data: (
        hk.predict_overlap(_factors(m, data), _factors(m, data)).curve
    ),
    "eigsh from factors": lambda m, data: (
        hk.eigsh(_last(m, data), 2, start=_factors(m, data).operator()).values
    ),
    "eigsh from vectors": lambda m, data: (
        hk.eigsh(_last(m, data), 2, start=hk.eigsh(_last(m, data), 2).vectors).values
    ),
    "eigsh smallest": lambda m, data: hk.eigsh(_last(m, data), 2, which="SA").values,
    "file": lambda m, data: _from_file(hk.kronecker_factors(m, data, CE)),
}
DENSE = {
    "centred": lambda m, data: [p.detach() for p in hk.centre_inputs(m, data, CE).parameters()],
    "gauss-newton stacked": lambda m, data: _products(hk.GaussNewton(m, data, CE).stacked()),
    "position mean": lambda m, data: _products(
        hk.position_mean_hessian(m, data, CE, _name(m)), eigen=False
    ),
}


def _name(m: nn.Module) -> str:
    return [name for name, module in m.named_modules() if isinstance(module, nn.Linear)][-1]


def _last(m: nn.Module, data: Data) -> hk.LayerHessian:
    return hk.layer_hessians(m, data, CE)[_name(m)]


def _factors(m: nn.Module, data: Data) -> hk.LayerFactors:
    return hk.kronecker_factors(m, data, CE)[_name(m)]


def _products(H: Any, eigen: bool = True) -> Any:
    v = randn(H.shape[0], 2).to(H.device)
    found = [H @ v, H @ v[:, 0]]
    return [*found, hk.eigsh(H, 3, tol=1e-10).values] if eigen else found


def _density(found: hk.SpectralDensity) -> Any:
    return [float(found.nodes.sum()), found.size]


def _kronecker(K: hk.KroneckerOperator) -> Any:
    v = randn(K.shape[0], 2).to(K.device)
    shifts = torch.tensor([-1.0, -2.0], dtype=v.dtype, device=v.device)
    return [K @ v, K.diagonal(), K.trace(), K.eigsh(3).values, K.solve_shifted(v, shifts)]


def _from_file(found: hk.Factors) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        found.save(f"{folder}/factors.safetensors")
        loaded = hk.load_factors(f"{folder}/factors.safetensors")
    return [t.tolist() for f in loaded.values() for t in (f.input_covariance, f.output_hessian)]


def _consumed(accumulator: hk.FactorAccumulator, data: Data) -> hk.FactorAccumulator:
    accumulator.consume(data)
    return accumulator


def _hessians(found: hk.LayerHessians) -> dict[str, Any]:
    result = {}
    for name, H in found.items():
        v = randn(H.shape[0], 2).to(H.device)
        result[name] = (
            H @ v, H @ v[:, 0], H.diagonal(), H.trace(), H.to_dense(), H.pruning_error,
            hk.eigsh(H, 3).values,
        )  # fmt: skip
    return result

"""Public calls on a GPU: the CPU's numbers in float64, near them in float32."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device_calls import CALLS, DENSE, NETWORKS, OPERATORS, batches, same
from devices import moved, needs_cuda
from fuzz.grammar import draw
from fuzz.on_device import judge_on
from networks import CE, seeded
from resumed import bits, broken_off
from tensors import assert_near
from torch import Tensor, nn

import hesskern as hk

pytestmark = needs_cuda

CUDA = torch.device("cuda")
# A GPU draws other targets than the CPU, and other probes.
DRAWN = ("mc", "drawn", "probes", "density", "trace")
SURE = {n: c for n, c in (CALLS | OPERATORS).items() if not any(word in n for word in DRAWN)}
# Eigenpairs of a matrix known by products end where their residuals are small enough.
BY_RESIDUALS = ("eigsh", "functional", "hessians", "gauss-newton", "autograd", "correspondence",
                "decoupling")  # fmt: skip


def tolerance_of(call: str) -> float:
    return 1e-4 if any(word in call for word in BY_RESIDUALS) else 1e-8


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Of torch's convolutions in float32, which these tests hold against float64."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("call", SURE)
def test_numbers_are_the_cpus(call: str, network: str) -> None:
    build, data = NETWORKS[network]
    found, expected = SURE[call](build().cuda(), moved(data, CUDA)), SURE[call](build(), data)
    same(found, expected, "cuda", tolerance=tolerance_of(call))


@pytest.mark.parametrize("call", DENSE)
def test_numbers_of_dense_networks_are_the_cpus(call: str) -> None:
    build, data = NETWORKS["mlp"]
    found, expected = DENSE[call](build().cuda(), moved(data, CUDA)), DENSE[call](build(), data)
    same(found, expected, "cuda", tolerance=tolerance_of(call))


def narrow(network: str) -> tuple[nn.Module, list[Any]]:
    build, data = NETWORKS[network]
    return build().float().cuda(), [(x.float().cuda(), y.cuda()) for x, y in data]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("output", ["exact", "empirical"])
def test_float32(network: str, output: Any) -> None:
    build, data = NETWORKS[network]
    model, there = narrow(network)
    exact = hk.kronecker_factors(build(), data, CE, output=output)
    for name, layer in hk.kronecker_factors(model, there, CE, output=output).items():
        assert_near(layer.input_covariance.cpu(), exact[name].input_covariance)
        assert_near(layer.output_hessian.cpu(), exact[name].output_hessian)
    traces = hk.ekfac(build(), data, CE, output=output)
    for name, corrected in hk.ekfac(model, there, CE, output=output).items():
        assert corrected.trace() == pytest.approx(traces[name].trace(), rel=1e-5)
    whole = hk.layer_hessians(build(), data, CE)
    for name, H in hk.layer_hessians(model, there, CE).items():
        assert_near(H.to_dense().cpu(), whole[name].to_dense())


class Sequences(nn.Module):
    """What torch does by operations of CUDA's own: norms, recurrences and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 4), nn.RMSNorm(4)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.recurrent, self.head = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x))
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(seen.transpose(1, 2).flatten(2))
        return self.head(self.recurrent(h)[0])[:, -1]


SEQUENCES = ("factors exact none", "factors empirical joint", "factors weighted",
             "factors with diagonals", "ekfac empirical none")  # fmt: skip


@pytest.mark.parametrize("call", SEQUENCES)
def test_sequences(call: str) -> None:
    def build() -> nn.Module:
        return seeded(Sequences())

    data = batches(5, 3)
    found, expected = SURE[call](build().cuda(), moved(data, CUDA)), SURE[call](build(), data)
    if "diagonals" in call:
        # CUDA's fused cells do not show what their biases are added to.
        expected = {name: d for name, d in expected.items() if not name.startswith("recurrent.")}
        assert "norm.weight" in expected
    same(found, expected, "cuda", tolerance=tolerance_of(call))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sequences_in_half_precision(dtype: torch.dtype) -> None:
    """Weighted, so that it must be known whose rows are whose."""
    model = seeded(Sequences()).to(CUDA, dtype)
    data = [(x.to(CUDA, dtype), y.cuda(), x[:, 0, 0].abs().cuda()) for x, y in batches(5, 3)]
    exact = hk.kronecker_factors(model.double(), [(x.double(), y, w) for x, y, w in data], CE)
    for name, layer in hk.kronecker_factors(model.to(dtype), data, CE).items():
        assert_near(layer.output_hessian.cpu(), exact[name].output_hessian.cpu(), tolerance=0.1)


@pytest.mark.parametrize("network", NETWORKS)
def test_drawn_targets(network: str) -> None:
    """Of one seed the same; of many samples about the exact mean."""
    model, _ = narrow(network)
    shape = (2, 6) if network == "mlp" else (2, 8, 8)
    data = [(x.float().cuda(), y.cuda()) for x, y in batches(*shape, count=3) for _ in range(100)]
    exact = hk.kronecker_factors(model, data, CE)
    found = hk.kronecker_factors(model, data, CE, output="mc", seed=3)
    again = hk.kronecker_factors(model, data, CE, output="mc", seed=3)
    for name, layer in found.items():
        assert torch.equal(layer.output_hessian, again[name].output_hessian)
        wide, near = exact[name].output_hessian, layer.output_hessian
        assert 0 < float((near - wide).norm() / wide.norm()) < 0.3


@pytest.mark.parametrize("output", ["exact", "empirical"])
@pytest.mark.parametrize("options", [{}, {"top": 4}, {"query_rank": 2}, {"per_layer": True}])
@pytest.mark.parametrize("network", NETWORKS)
def test_influence(network: str, options: dict[str, Any], output: Any) -> None:
    build, data = NETWORKS[network]

    def scores(model: nn.Module, given: list[Any]) -> hk.Influence:
        E = hk.ekfac(model, given, CE, output=output, precision="float64")
        return hk.influence(E, model, given[:1], given[1:], CE, damping=0.1, **options)

    expected, found = scores(build(), data), scores(build().cuda(), moved(data, CUDA))
    same(moved(found.scores, "cpu"), moved(expected.scores, "cpu"), "cpu", tolerance=1e-8)
    if "top" in options:
        assert torch.equal(found.indices.cpu(), expected.indices.cpu())


@pytest.mark.parametrize("network", NETWORKS)
def test_kfac_steps(network: str) -> None:
    build, data = NETWORKS[network]

    def trained(device: torch.device) -> dict[str, Tensor]:
        model = build().to(device)
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        kfac = hk.optim.KFAC(model, sgd, CE, output="exact", inverse_every=2, damping=0.01)
        for x, y in moved(data, device):
            model.zero_grad()
            CE(model(x), y).backward()
            kfac.step(x, y)
        return {name: p.detach().cpu() for name, p in model.named_parameters()}

    here, there = trained(torch.device("cpu")), trained(CUDA)
    for name, parameter in here.items():
        torch.testing.assert_close(there[name], parameter, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("call", ["kronecker_factors", "ekfac"])
def test_a_pass_goes_on_from_its_checkpoint(call: str, output: Any, tmp_path: Path) -> None:
    model, data = narrow("cnn")
    ask = partial(getattr(hk, call), model, data, CE, output=output)
    whole = bits(ask(), tmp_path)
    path = tmp_path / "pass.checkpoint"
    broken_off(ask, path, 2)
    assert bits(ask(checkpoint=path), tmp_path) == whole


@pytest.mark.parametrize("spill", ["cpu", "disk"])
def test_sums_in_other_places(spill: Any) -> None:
    model, data = narrow("cnn")
    whole = hk.kronecker_factors(model, data, CE)
    found = hk.kronecker_factors(model, data, CE, spill=spill)
    for name, layer in found.items():
        assert_near(layer.output_hessian.cpu(), whole[name].output_hessian.double().cpu())
        assert_near(layer.input_covariance.cpu(), whole[name].input_covariance.double().cpu())


def test_a_group_by_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one rank, as there may be one GPU: its messages go through NCCL all the same."""
    model, data = narrow("cnn")
    alone = hk.kronecker_factors(model, data, CE)
    corrected = hk.ekfac(model, data, CE, output="empirical")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        together = hk.kronecker_factors(model, data, CE, group=group)
        for name, layer in together.items():
            assert torch.equal(layer.output_hessian, alone[name].output_hessian)
        E = hk.ekfac(model, data, CE, output="empirical", group=group)
        for name, one in E.items():
            assert torch.equal(one.values, corrected[name].values)
        scores = hk.influence(E, model, data[:1], data[1:], CE, damping=0.1, group=group)
        expected = hk.influence(corrected, model, data[:1], data[1:], CE, damping=0.1)
        assert torch.equal(scores.scores, expected.scores)
        H = hk.layer_hessians(model, data, CE, group=group)
        for name, one in hk.layer_hessians(model, data, CE).items():
            v = torch.ones(one.shape[0], device=CUDA)
            assert torch.equal(H[name] @ v, one @ v)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("first", range(0, 30, 10))
def test_random_models(first: int) -> None:
    verdicts = [judge_on(CUDA, draw(seed)) for seed in range(first, first + 10)]
    assert not [(v.case.seed, v.bad) for v in verdicts if v.bad]

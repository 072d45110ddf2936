"""Rows of gradients in blocks against autograd's, operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesskern.graph import propagation_rules
from hesskern.graph.propagation import Propagation
from hesskern.graph.propagation_layout import Rule
from hesskern.passes.batches import Batch
from hesskern.passes.capture import Capture
from hesskern.passes.layers import select_layers

ROWS = 5


@pytest.fixture(params=["kernels", "torch", "channels last"], autouse=True)
def rules(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules for the CPU, and those for devices, which must hold on the CPU as well."""
    if request.param != "kernels":
        monkeypatch.setattr("hesskern.graph.propagation._by_kernels", lambda outputs: False)
    if request.param == "channels last":
        monkeypatch.setattr(
            "hesskern.graph.propagation_images._wants_channels_last", lambda *_: True
        )


class Net(nn.Module):
    """Modules, and a function of them and the inputs."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def gradients(
    model: nn.Module, x: Tensor, rows: int = ROWS
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Per use, all rows' gradients [N, r, ...] by autograd and in blocks (None: not covered)."""
    specs, _ = select_layers(model, None, "none")
    with Capture(model, specs) as capture:
        outputs, uses = capture.forward(Batch(0, x, None, None, None))
        generator = torch.Generator().manual_seed(3)
        block = torch.randn(rows, *outputs.shape, generator=generator, dtype=outputs.dtype)
        expected: list[list[Tensor]] = []
        for row in block:
            found = capture.backward(outputs, row, uses, last=False)
            flat = [grad for layer in found.values() for grad in layer]
            expected.append(flat)
        stacked = [torch.stack(grads, 1) for grads in zip(*expected, strict=True)]
        blocks = capture.backward_all(outputs, rows, lambda j: block[j], uses)
        if blocks is None:
            return stacked, None
        joined = [torch.full_like(reference, torch.nan) for reference in stacked]
        for samples, chosen, found in blocks:
            flat = [grad for layer in found.values() for grad in layer]
            for total, grad in zip(joined, flat, strict=True):
                assert bool(total[samples, chosen].isnan().all()), "every row of a sample once"
                total[samples, chosen] = grad
    return stacked, joined


def check(model: nn.Module, x: Tensor, rows: int = ROWS, limit: float = 1e-13) -> None:
    torch.manual_seed(0)
    expected, found = gradients(model.eval(), x, rows)
    assert found is not None, "the model must be covered"
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).norm()) <= limit * float(b.norm())


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = make().double()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.data.normal_()
    return model


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def mlp(activation: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 17), activation, nn.Linear(17, 9), activation, nn.Linear(9, 4)
    )


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.ReLU6(), nn.Hardtanh(), nn.ELU(),
    nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.Mish(),
    nn.Hardswish(), nn.Hardsigmoid(), nn.LogSigmoid(), nn.Threshold(0.1, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
def test_activations(activation: nn.Module) -> None:
    check(seeded(lambda: mlp(activation)), images(7, 6))


@pytest.mark.parametrize("rows", [2, 9, 31, 80])
@pytest.mark.parametrize("n", [1, 2, 33])
def test_rows_and_samples(n: int, rows: int) -> None:
    check(seeded(lambda: mlp(nn.ReLU())), images(n, 6), rows)


def conv_net(pool: nn.Module, **conv: object) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, **conv),
        nn.ReLU(),
        pool,
        nn.Conv2d(12, 6, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(4),
    )


CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (5, 2), "padding": (3, 0)},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "stride": 3},
    {"kernel_size": (3, 1), "stride": (1, 2), "dilation": (2, 1), "padding": (2, 0)},
    {"kernel_size": 3, "groups": 4, "padding": 1, "bias": False},
    {"kernel_size": 1},
]
POOLS = [
    nn.MaxPool2d(2),
    nn.MaxPool2d(2, ceil_mode=True),
    nn.MaxPool2d(3, stride=2, padding=1),
    nn.MaxPool2d((1, 2), stride=(2, 3)),
    nn.MaxPool2d(2, dilation=2, stride=1),
    nn.AvgPool2d(2),
    nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    nn.AdaptiveAvgPool2d(3),
    nn.Identity(),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_convolutions(conv: dict[str, object]) -> None:
    x = images(3, 4, 13, 12)

    def make() -> nn.Module:
        model = conv_net(nn.MaxPool2d(2), **conv)
        model(x.float())
        return model

    check(seeded(make), x)


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_pools(pool: nn.Module) -> None:
    x = images(3, 4, 11, 10)

    def make() -> nn.Module:
        model = conv_net(pool, kernel_size=3, padding=1)
        model(x.float())
        return model

    check(seeded(make), x)
    # In memory with channels last, and in float32.
    model = seeded(make)
    check(model, x.contiguous(memory_format=torch.channels_last))
    check(model.float(), x.float(), limit=3e-6)


def test_many_samples_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    import hesskern.graph.propagation as propagation

    monkeypatch.setattr(propagation, "_BLOCK", 5000)
    monkeypatch.setattr(propagation, "_DEVICE_BLOCK", 5000)
    x = images(9, 4, 11, 10)

    def make() -> nn.Module:
        model = conv_net(nn.MaxPool2d(2), kernel_size=3, padding=1)
        model(x.float())
        return model

    for rows in (3, 28, 29, 61):
        check(seeded(make), x, rows)


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_blocks_are_bounded(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    import hesskern.graph.propagation as propagation

    monkeypatch.setattr(propagation, "_BLOCK", 1 << 12)
    monkeypatch.setattr(propagation, "_LARGE_BLOCK", 1 << 14)
    monkeypatch.setattr(propagation, "_DEVICE_BLOCK", 1 << 14)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for size in (4, 12, 30):
        x = images(20, 1, size, size)
        model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)))
        specs, _ = select_layers(model.eval(), None, "none")
        with Capture(model, specs) as capture:
            outputs, uses = capture.forward(Batch(0, x, None, None, None))
            blocks = capture.backward_all(outputs, 40, lambda j, z=outputs: z, uses)
            assert blocks is not None
            for _, _, found in blocks:
                assert found["0"][0] is not None
                assert found["0"][0].numel() <= 1 << 14


def test_one_dimensional_convolutions() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(3, 8, 3, padding=1),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(8, 6, 3, stride=2, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 4),
        )

    check(seeded(make), images(5, 3, 20))


def test_sequences() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        h = torch.relu(net.a(x)) + x
        h = net.c(torch.relu(net.b(h)).transpose(1, 2)).permute(0, 2, 1)
        return net.d(h.mean(1))

    check(
        seeded(
            lambda: Net(
                run, a=nn.Linear(6, 6), b=nn.Linear(6, 5), c=nn.Linear(7, 7), d=nn.Linear(5, 3)
            )
        ),
        images(4, 7, 6),
    )


def test_outputs_per_token() -> None:
    check(seeded(lambda: mlp(nn.ReLU())), images(4, 7, 6))


def residual(net: Net, x: Tensor) -> Tensor:
    h = torch.relu(net.bn1(net.conv1(x)))
    g = net.bn2(net.conv2(h))
    h = torch.relu(g + net.skip(h))
    h = torch.cat([h, torch.sigmoid(h) * h, h - 0.5 * g], 1)
    h = h / 2 * torch.tensor(3.0)
    return net.fc(F.adaptive_avg_pool2d(h, 1).flatten(1)) - net.fc(h.sum((2, 3))) + 1


def test_branches() -> None:
    check(
        seeded(
            lambda: Net(
                residual,
                conv1=nn.Conv2d(3, 6, 3, padding=1, bias=False),
                bn1=nn.BatchNorm2d(6),
                conv2=nn.Conv2d(6, 6, 3, padding=1),
                bn2=nn.BatchNorm2d(6, affine=False),
                skip=nn.Conv2d(6, 6, 1),
                fc=nn.Linear(18, 4),
            )
        ),
        images(3, 3, 9, 8),
    )


def test_shared_layer_and_unused_branch() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        h = torch.relu(net.a(x))
        h = torch.relu(net.a(h))
        net.unused(h)
        return net.b(h)

    model = seeded(lambda: Net(run, a=nn.Linear(6, 6), b=nn.Linear(6, 3), unused=nn.Linear(6, 2)))
    specs, _ = select_layers(model, None, "none")
    with Capture(model.eval(), specs) as capture:
        outputs, uses = capture.forward(Batch(0, images(4, 6), None, None, None))
        blocks = capture.backward_all(outputs, 2, lambda j: torch.ones_like(outputs), uses)
        assert blocks is not None
        ((samples, rows, block),) = blocks
        assert (samples, rows) == (slice(0, 4), slice(0, 2))
        assert block["unused"] == [None]
        assert all(grad is not None and grad.shape == (4, 2, 6) for grad in block["a"])
        row = capture.backward(outputs, torch.ones_like(outputs), uses, last=True)
        for ours, theirs in zip(block["a"], row["a"], strict=True):
            torch.testing.assert_close(ours[:, 1], theirs)


def layers(run: Callable[[Net, Tensor], Tensor]) -> nn.Module:
    return seeded(lambda: Net(run, a=nn.Linear(6, 6), b=nn.Linear(6, 3)))


WHOLE = torch.tensor([3, 100, 7, 100, 2, 5])

OPERANDS: dict[str, Callable[[Tensor], Tensor]] = {
    # Once an error inside a rule.
    "mask of the activation": lambda h: h * (h > 0.1),
    "mask of every sample": lambda h: (h.sum(1, keepdim=True) > 0) * h,
    "two masks": lambda h: h * (h > -1) * (h < 1),
    # Once 1 / 3 in float32.
    "divided by a number": lambda h: h / 3,
    "divided by a whole number": lambda h: h / torch.tensor(3),
    "divided by whole numbers": lambda h: h / WHOLE,
    # Once a product modulo 256.
    "whole numbers of eight bits": lambda h: h * WHOLE.to(torch.uint8) * WHOLE.to(torch.uint8),
    "whole numbers": lambda h: h * WHOLE * torch.tensor(3) * True,
    "one number per sample": lambda h: h * h.detach().sum(1, keepdim=True),
    "narrow numbers": lambda h: h * torch.linspace(0.1, 0.9, 6) / torch.full((1, 6), 1.3),
    "there and back": lambda h: h.float().relu().double(),
    "added in another precision": lambda h: h.float() + h + torch.ones(6),
    "expanded to its own shape": lambda h: h.expand(h.shape).expand(h.shape).relu(),
    "views of views": lambda h: (
        h.view(8, 3).view(-1, 1).view(h.shape).clone().unsqueeze(1).squeeze(1)
    ),
    "used twice": lambda h: h + h - h * h,
}


@pytest.mark.parametrize("name", OPERANDS)
def test_operands(name: str) -> None:
    model = layers(lambda net, x: net.b(torch.tanh(OPERANDS[name](net.a(x)))))
    narrow = name in ("there and back", "added in another precision")
    check(model, images(4, 6), limit=1e-6 if narrow else 1e-13)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_before_a_convolution_with_pixels_as_outputs(axes: int, affine: bool) -> None:
    conv, norm = (nn.Conv1d, nn.BatchNorm1d) if axes == 1 else (nn.Conv2d, nn.BatchNorm2d)
    model = seeded(
        lambda: nn.Sequential(
            conv(3, 5, 3, padding=1), norm(5, affine=affine), conv(5, 2, 1), norm(2), conv(2, 2, 1)
        )
    )
    check(model, images(4, 3, *(6,) * axes))


def test_batch_norm_before_a_maximum() -> None:
    check(
        seeded(
            lambda: nn.Sequential(
                nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.MaxPool2d(2), nn.Conv2d(5, 2, 1)
            )
        ),
        images(4, 3, 6, 6),
    )


def test_weights_that_require_gradients() -> None:
    model = seeded(lambda: mlp(nn.ReLU())).eval()
    h = [images(5, 6)]
    for module in model:
        h.append(module(h[-1]))
    edges = [torch.autograd.graph.get_gradient_edge(h[i]) for i in (1, 3, 5)]
    plan = Propagation.plan(h[-1], edges)
    assert plan is not None
    row = torch.ones_like(h[-1])
    (block,) = plan.blocks(2, lambda j: row)
    expected = torch.autograd.grad(h[-1], edges, row)
    for found, reference in zip(block.gradients, expected, strict=True):
        assert found is not None
        assert not found.requires_grad
        torch.testing.assert_close(found[:, 1], reference)


def test_a_rule_that_fails_leaves_it_to_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object) -> Rule:
        def apply(*_: object) -> list[Tensor]:
            raise RuntimeError("a kernel takes no such operand")

        return Rule((1,), apply)

    def narrow(*_: object) -> Rule:
        return Rule((1,), lambda g, _, factor: [g[..., :1]])

    model = seeded(lambda: mlp(nn.ReLU())).eval()
    for rule in (late, narrow):
        monkeypatch.setitem(propagation_rules._RULES, "Addmm", rule)
        _, found = gradients(model, images(4, 6))
        assert found is None


def test_the_budget_bounds_a_block() -> None:
    x = images(32, 6)
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 100), nn.Tanh(), nn.Linear(100, 50)))
    specs, _ = select_layers(model.eval(), None, "none")
    with Capture(model, specs) as capture:
        outputs, uses = capture.forward(Batch(0, x, None, None, None))
        plan = Propagation.plan(outputs, [use.edge for layer in uses.values() for use in layer])
        assert plan is not None
        row = 8 * 32 * 50
        for budget in (0, row, 4 * row, 20 * row, 200 * row):
            seen = torch.zeros(32, 40)
            for block in plan.blocks(40, lambda j: outputs, budget):
                seen[block.samples, block.rows] += 1
                sizes = [g.numel() for g in block.gradients if g is not None]
                rows = block.rows.stop - block.rows.start
                assert rows == 1 or 8 * (sum(sizes) + rows * 32 * 50) <= budget
            assert bool((seen == 1).all())


def not_covered() -> dict[str, tuple[nn.Module, Tensor]]:
    def broadcast(net: Net, x: Tensor) -> Tensor:
        h = net.a(x)
        return net.b(h + h.mean(1, keepdim=True))

    def swapped(net: Net, x: Tensor) -> Tensor:
        return net.b(torch.relu(net.a(x)).t().contiguous().t())

    class Relu(torch.autograd.Function):
        """Named like torch's own, with a gradient of its own."""

        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clamp_min(0)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return 2 * grads[0]

    def custom(net: Net, x: Tensor) -> Tensor:
        return net.b(Relu.apply(net.a(x)))

    def second(net: Net, x: Tensor) -> Tensor:
        return net.a(x).relu().split(3, 1)[1]

    x = images(4, 6)
    return {
        "second of several outputs": (layers(second), x),
        "broadcast": (layers(broadcast), x),
        "transposed samples": (layers(swapped), x),
        "custom function": (layers(custom), x),
        "layer norm": (
            seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2))),
            x,
        ),
        "transposed convolution": (
            seeded(
                lambda: nn.Sequential(
                    nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 2, 2), nn.Conv2d(2, 2, 1)
                )
            ),
            images(3, 2, 6, 6),
        ),
    }


@pytest.mark.parametrize("case", list(not_covered()))
def test_what_is_not_covered_is_left_to_autograd(case: str) -> None:
    model, x = not_covered()[case]
    _, found = gradients(model.eval(), x)
    assert found is None


def test_one_row_is_left_to_autograd() -> None:
    _, found = gradients(seeded(lambda: mlp(nn.ReLU())).eval(), images(4, 6), 1)
    assert found is None


def test_no_plan_without_a_graph() -> None:
    assert Propagation.plan(torch.ones(3, 2), []) is None

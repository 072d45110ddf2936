"""A padded batch has the curvature of its samples alone, unpadded."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launches import playing_device
from masked import LENGTHS, alone, encoder, mask_of, padded
from networks import seeded
from played_device import counting, generators, played
from tensors import relative_error
from torch import Tensor, nn

import hesskern as hk
from hesskern.passes import masks
from hesskern.passes.batches import Batch

CE = nn.CrossEntropyLoss()
SIDES = ("right", "left")
# Relative to a factor's norm.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
# Layers with one row for each sample.
POOLED = ("pooler", "head")


def assert_same(found: hk.Factors, expected: hk.Factors, limit: float) -> None:
    assert list(found) == list(expected)
    for name, layer in expected.items():
        for factor in ("input_covariance", "output_hessian"):
            error = relative_error(getattr(found[name], factor), getattr(layer, factor))
            assert error <= limit, (name, factor, error)
        assert found[name].positions == pytest.approx(layer.positions)
        assert found[name].num_samples == layer.num_samples


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("bias", ["none", "joint"])
def test_factors(side: str, dtype: torch.dtype, output: str, bias: str) -> None:
    batch = padded(side)
    # With one draw for each sample the drawn targets are the same in both passes.
    settings: dict[str, Any] = {"output": output, "bias": bias}
    found = hk.kronecker_factors(encoder(dtype), [batch], CE, position_mask=mask_of, **settings)
    expected = hk.kronecker_factors(encoder(dtype), alone(batch), CE, **settings)
    assert_same(found, expected, LIMITS[dtype])
    for name, layer in found.items():
        mean = sum(LENGTHS) / len(LENGTHS)
        assert layer.positions == (1 if name in POOLED else mean)
    unmasked = hk.kronecker_factors(encoder(dtype), [batch], CE, **settings)
    error = relative_error(unmasked["up"].input_covariance, found["up"].input_covariance)
    assert error > 0.1


def rows_alone(model: nn.Module, batch: Any, name: str) -> tuple[Tensor, Tensor, int]:
    """sum_t x x^T, sum_t M and P of one sample of its own, by hooks and autograd."""
    inputs, _ = batch
    kept: list[Tensor] = []
    hook = dict(model.named_modules())[name].register_forward_hook(
        lambda _, given, out: kept.extend([given[0], out])
    )
    outputs = model(**inputs)
    hook.remove()
    (x, z), c = kept, outputs.shape[-1]
    p = outputs.softmax(-1)[0]
    curvature = torch.diag(p) - torch.outer(p, p)
    jacobian = torch.stack(
        [torch.autograd.grad(outputs[0, k], z, retain_graph=True)[0] for k in range(c)]
    )
    x, jacobian = x.reshape(-1, x.shape[-1]), jacobian.reshape(c, -1, z.shape[-1])
    hessian = torch.einsum("cti,cb,btj->ij", jacobian, curvature, jacobian)
    return x.T @ x, hessian, len(x)


@pytest.mark.parametrize("side", SIDES)
def test_factors_by_a_loop_over_samples(side: str) -> None:
    batch, model = padded(side), encoder()
    found = hk.kronecker_factors(model, [batch], CE, position_mask=mask_of)
    for name in ("qkv", "out", "up", "down", "pooler", "head"):
        parts = [rows_alone(model, one, name) for one in alone(batch)]
        inputs = sum(part[0] for part in parts) / len(parts)
        outputs = sum(part[1] for part in parts) / sum(part[2] for part in parts)
        assert relative_error(found[name].input_covariance, inputs) <= 1e-12
        assert relative_error(found[name].output_hessian, outputs) <= 1e-12


@pytest.mark.parametrize("side", SIDES)
def test_mean_inputs_count_positions_that_are_data(side: str) -> None:
    inputs, targets = padded(side)
    found = hk.kronecker_factors(encoder(), [(inputs, targets)], CE, position_mask=mask_of)["qkv"]
    x = encoder().embedding(inputs["ids"]) * inputs["mask"].unsqueeze(2)
    assert relative_error(found.input_mean, x.mean(0).T.detach()) <= 1e-12


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("decay", [None, 0.7])
def test_streams_of_weighted_batches(weighted: bool, decay: float | None) -> None:
    data = [padded("right"), padded("left", (2, 5), seed=1), padded("right", (4, 4, 4), seed=2)]
    weights = [torch.arange(1.0, len(y) + 1).double() for _, y in data]
    found = hk.FactorAccumulator(encoder(), CE, position_mask=mask_of, decay=decay, bias="joint")
    expected = hk.FactorAccumulator(encoder(), CE, decay=decay, bias="joint")
    for (x, y), w in zip(data, weights, strict=True):
        found.update(x, y, w if weighted else None)
        if decay is None:
            for i, one in enumerate(alone((x, y))):
                expected.update(*one, w[i : i + 1] if weighted else None)
    if decay is None:
        assert_same(found.factors(), expected.factors(), 1e-10)
        return
    # Moving averages go over batches: of sums over samples, and of positions.
    parts = [
        hk.kronecker_factors(
            encoder(),
            alone((x, y)),
            CE,
            bias="joint",
            sample_weight=w if weighted else None,
        )
        for (x, y), w in zip(data, weights, strict=True)
    ]
    shares = [(1 - decay) * decay**age for age in (2, 1, 0)]
    for name, layer in found.factors().items():
        inputs = sum(s * f[name].input_covariance for s, f in zip(shares, parts, strict=True))
        assert relative_error(layer.input_covariance, inputs / sum(shares)) <= 1e-10
        counts = [s * f[name].positions for s, f in zip(shares, parts, strict=True)]
        outputs = sum(n * f[name].output_hessian for n, f in zip(counts, parts, strict=True))
        assert relative_error(layer.output_hessian, outputs / sum(counts)) <= 1e-10


def operators(dtype: torch.dtype, data: Any, mask: Any) -> dict[str, Any]:
    model = encoder(dtype)
    given: dict[str, Any] = {"position_mask": mask}
    hessians = hk.layer_hessians(model, data, CE, bias="joint", **given)
    return {
        **hessians,
        **{
            f"{name} with less memory": operator
            for name, operator in hk.layer_hessians(
                model, data, CE, memory_budget=100, **given
            ).items()
        },
        "Gauss-Newton": hk.GaussNewton(model, data, CE, **given),
        "position mean": hk.position_mean_hessian(model, data, CE, "up", **given),
        "position mean of a pixel": hk.position_mean_hessian(
            model, data, CE, "pixel", bias="joint", **given
        ),
    }


@pytest.mark.filterwarnings("ignore:the Gauss-Newton block")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_operators(side: str, dtype: torch.dtype) -> None:
    batch = padded(side)
    found, expected = operators(dtype, [batch], mask_of), operators(dtype, alone(batch), None)
    limit = LIMITS[dtype]
    for name, right in expected.items():
        dense = right.to_dense()
        assert relative_error(found[name].to_dense(), dense) <= limit, name
        assert found[name].trace() == pytest.approx(right.trace(), rel=limit)
        assert relative_error(found[name].diagonal(), right.diagonal()) <= limit, name
        vectors = torch.randn(len(dense), 2, generator=torch.Generator().manual_seed(3)).to(dtype)
        assert relative_error(found[name] @ vectors, right @ vectors) <= limit, name


@pytest.mark.parametrize("side", SIDES)
def test_exact_where_the_model_masks(side: str) -> None:
    """Without smooth operations the block is the Hessian that double backward finds."""
    batch, model = padded(side), encoder(smooth=False)
    hessians = hk.layer_hessians(model, [batch], CE, position_mask=mask_of)
    for name in ("qkv", "out", "up", "down", "pixel", "pooler", "head"):
        assert hessians[name].is_exact
        reference = hk.AutogradHessian(model, [batch], CE, params=[f"{name}.weight"])
        assert relative_error(hessians[name].to_dense(), reference.to_dense()) <= 1e-10


def test_inexact_where_masked_positions_reach_the_outputs() -> None:
    """A model that pools over padding as well: its masked rows are left out, and it is said."""

    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.layer(x).mean(1)

    torch.manual_seed(0)
    model = Pooling().double()
    inputs, targets = padded("right")
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    data = [({"x": x, "mask": inputs["mask"]}, targets)]
    with pytest.warns(UserWarning, match="has masked positions on which the outputs that count"):
        hessian = hk.layer_hessians(model, data, CE, position_mask=mask_of)["layer"]
    assert not hessian.is_exact
    # Positions whose inputs are zero have no part in the block.
    whole = [({"x": x * inputs["mask"].unsqueeze(2), "mask": inputs["mask"]}, targets)]
    logits = model(x, inputs["mask"])
    assert not torch.equal(logits, model(whole[0][0]["x"], inputs["mask"]))
    rows = (x * inputs["mask"].unsqueeze(2)).mean(1)
    p = logits.softmax(1).detach()
    curvature = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    expected = torch.einsum("nij,na,nb->iajb", curvature, rows, rows).reshape(15, 15) / 4
    assert relative_error(hessian.to_dense(), expected) <= 1e-12


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_over_sequences(kernel: int, groups: int) -> None:
    """The windows of masked positions count nowhere."""

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 6, kernel, padding=kernel // 2, groups=groups)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = x * mask.unsqueeze(1)
            return (self.conv(x) * mask.unsqueeze(1)).sum(2)

    torch.manual_seed(0)
    model = Sequence().double()
    inputs, _ = padded("right")
    x, mask = torch.randn(4, 4, 6, dtype=torch.float64), inputs["mask"]
    targets = torch.randint(0, 6, (4,))
    data = [({"x": x, "mask": mask}, targets)]
    apart = [
        ({"x": x[i : i + 1, :, :t], "mask": mask[i : i + 1, :t]}, targets[i : i + 1])
        for i, t in enumerate(LENGTHS)
    ]
    for bias in ("none", "joint"):
        found = hk.kronecker_factors(model, data, CE, bias=bias, position_mask=mask_of)
        assert_same(found, hk.kronecker_factors(model, apart, CE, bias=bias), 1e-12)
        dense = [
            hk.layer_hessians(model, d, CE, bias=bias, position_mask=m)["conv"].to_dense()
            for d, m in ((data, mask_of), (apart, None))
        ]
        assert relative_error(*dense) <= 1e-12


def test_nothing_masked_changes_nothing() -> None:
    inputs, targets = padded("right", (4, 4, 4))
    plain = hk.kronecker_factors(encoder(), [(inputs, targets)], CE)
    masked = hk.kronecker_factors(encoder(), [(inputs, targets)], CE, position_mask=mask_of)
    for name, layer in plain.items():
        for factor in ("input_covariance", "output_hessian", "input_mean"):
            assert torch.equal(getattr(masked[name], factor), getattr(layer, factor))


def test_what_stands_at_masked_positions_does_not_matter() -> None:
    """Neither a large nor a missing number there is looked at."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            z = self.layer(x)
            return z.masked_fill(mask.unsqueeze(2) == 0, 0).sum(1)

    torch.manual_seed(0)
    model = Chosen().double()
    inputs, targets = padded("left")
    mask, x = inputs["mask"], torch.randn(4, 6, 3, dtype=torch.float64)
    found = []
    for fill in (0.0, float("nan"), float("inf")):
        filled = x.masked_fill(mask.unsqueeze(2) == 0, fill)
        data = [({"x": filled, "mask": mask}, targets)]
        factors = hk.kronecker_factors(model, data, CE, bias="joint", position_mask=mask_of)
        hessian = hk.layer_hessians(model, data, CE, position_mask=mask_of)["layer"]
        assert hessian.is_exact
        layer = factors["layer"]
        found.append(
            (layer.input_covariance, layer.output_hessian, layer.input_mean, hessian.to_dense())
        )
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            assert torch.equal(one, another)
    # Where a position is data, a missing number is one.
    bad = [({"x": x.masked_fill(mask.unsqueeze(2) == 1, float("nan")), "mask": mask}, targets)]
    with pytest.raises(ValueError, match="inputs of layer 'layer' contain NaN or Inf in batch 0"):
        hk.kronecker_factors(model, bad, CE, position_mask=mask_of)


def test_a_sample_of_padding_alone_has_no_positions() -> None:
    inputs, _ = padded("right")
    model, outputs = encoder(per_token=True), torch.randint(0, 5, (4, 6))
    inputs["mask"][2] = 0
    # Its attention would divide by nothing.
    for parameter in (model.qkv.weight, model.qkv.bias):
        parameter.data.zero_()
    model.forward = (
        lambda ids, mask: model.head(  # type: ignore[method-assign]
            torch.relu(model.up(model.embedding(ids)))[..., :8]
        )
    )
    outputs = outputs.masked_fill(inputs["mask"] == 0, -100)
    data = [(inputs, outputs)]
    loss = hk.TokenClassification(split=lambda batch: batch)
    found = hk.kronecker_factors(model, data, loss, layers=["up"], position_mask=mask_of)["up"]
    x = model.embedding(inputs["ids"])[inputs["mask"].bool()].detach()
    assert found.positions == pytest.approx(13 / found.num_samples)
    assert relative_error(found.input_covariance, x.T @ x / found.num_samples) <= 1e-12


def test_memory_that_suffices_for_halves_alone() -> None:
    class Small(type(encoder())):  # type: ignore[misc]
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            if len(ids) > 2:
                raise torch.OutOfMemoryError(f"no room for {len(ids)} samples")
            return super().forward(ids, mask)

    model = Small().double()
    model.load_state_dict(encoder().state_dict())
    batch = padded("right")
    found = hk.kronecker_factors(model, [batch], CE, position_mask=mask_of)
    assert_same(found, hk.kronecker_factors(encoder(), alone(batch), CE), 1e-10)


def test_masks_by_patterns() -> None:
    batch = padded("right")
    whole = hk.kronecker_factors(encoder(), [batch], CE)
    masked = hk.kronecker_factors(encoder(), [batch], CE, position_mask=mask_of)

    def some(inputs: Any) -> Any:
        return {"up": None, "u*": inputs["mask"], "down": inputs["mask"]}

    found = hk.kronecker_factors(encoder(), [batch], CE, position_mask=some)
    for name, layer in found.items():
        expected = masked if name == "down" else whole
        assert torch.equal(layer.input_covariance, expected[name].input_covariance)


def test_several_rows_for_each_position_are_refused() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.split, self.head = nn.Linear(4, 4), nn.Linear(8, 5)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = torch.nn.functional.one_hot(ids % 8, 8).double().unflatten(2, (2, 4))
            return (self.head(self.split(x).flatten(2)) * mask.unsqueeze(2)).sum(1)

    batch, model = padded("right"), seeded(Heads())
    with pytest.raises(
        ValueError, match=r"layer 'split' has 12 positions per sample, the mask .* has 6"
    ):
        hk.kronecker_factors(model, [batch], CE, position_mask=mask_of)

    def by_name(inputs: Any) -> Any:
        return {"split": inputs["mask"].repeat_interleave(2, 1), "*": inputs["mask"]}

    found = hk.kronecker_factors(model, [batch], CE, position_mask=by_name)
    assert_same(found, hk.kronecker_factors(model, alone(batch), CE), 1e-12)
    # Where all is data there is nothing to tell apart.
    whole = (dict(batch[0], mask=torch.ones_like(batch[0]["mask"])), batch[1])
    found = hk.kronecker_factors(model, [whole], CE, position_mask=mask_of)
    assert_same(found, hk.kronecker_factors(model, [whole], CE), 1e-12)


def test_fewer_positions_than_the_mask_has_are_refused() -> None:
    """As where a convolution of some stride stands in front: which of them are data?"""

    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 4), nn.Linear(8, 5)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = torch.nn.functional.one_hot(ids % 8, 8).double() * mask.unsqueeze(2)
            return self.down(self.up(x).unflatten(1, (3, 2)).flatten(2)).sum(1)

    batch, model = padded("right"), seeded(Halved())
    with pytest.raises(ValueError, match=r"layer 'down' has 3 positions per sample, .* has 6"):
        hk.kronecker_factors(model, [batch], CE, position_mask=mask_of)
    found = hk.kronecker_factors(model, [batch], CE, layers="up", position_mask=mask_of)
    assert found["up"].positions < 6


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("encoder.block.0.layer.0.SelfAttention.q", "encoder"),
        ("decoder.block.0.layer.1.EncDecAttention.k", "encoder"),
        ("decoder.block.0.layer.1.EncDecAttention.q", "decoder"),
        ("decoder.bert.encoder.layer.0.output.dense", "decoder"),
        ("decoder.bert.encoder.layer.0.crossattention.self.value", "encoder"),
        ("model.decoder.layers.0.cross_attention.k_proj", "encoder"),
        ("model.decoder.layers.0.cross_attn.key_proj", "encoder"),
        ("lm_head", "decoder"),
    ],
)
def test_encoder_and_decoder_by_names(name: str, side: str) -> None:
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(is_encoder_decoder=True)  # type: ignore[assignment]
    keep, decoder = torch.ones(2, 3), torch.ones(2, 5)
    batch = Batch(0, {"decoder_attention_mask": decoder}, None, None, None, keep)
    choose = masks._by_side(keep, batch, 2, model, "the mask of batch 0")
    assert choose(name) is (keep if side == "encoder" else decoder)


def bad_masks() -> dict[str, tuple[Any, type[Exception], str]]:
    mask = padded("right")[0]["mask"]
    return {
        "another length": (
            mask[:, :5],
            ValueError,
            r"layer '\w+' has 6 positions per sample, the mask of batch 1 has 5, and it cannot be",
        ),
        "another batch": (mask[:3], ValueError, r"must be \[N, T\] with N = 4, got \[3, 6\]"),
        "three axes": (mask[:, None], ValueError, r"must be \[N, T\] .*got \[4, 1, 6\]"),
        "no tensor": (mask.tolist(), TypeError, r"must be a tensor \[N, T\], got list"),
        "complex": (mask.to(torch.complex64), TypeError, "of zeros and ones, got torch.complex64"),
        "added to scores": (
            (1.0 - mask) * -10000,
            ValueError,
            r"0 \(no data\) and 1 \(data\) alone, got values from -10000 to 0; .*mask == 0",
        ),
        "counts": (2 * mask, ValueError, "got values from 0 to 2"),
        "missing numbers": (mask * float("nan"), ValueError, "0 .* and 1 .* alone"),
        "padding alone": (0 * mask, ValueError, "leaves no position: a batch of padding alone"),
        "no such layer": ({"encoder.*": mask}, ValueError, r"no layer fits 'encoder\.\*'"),
        "another length by name": (
            {"up": mask[:, :5]},
            ValueError,
            "layer 'up' has 6 positions, the mask of batch 1 that is returned for it has 5",
        ),
    }


@pytest.mark.parametrize("case", bad_masks())
def test_bad_masks(case: str) -> None:
    bad, error, message = bad_masks()[case]
    batch, model = padded("right"), encoder()
    given = iter([batch[0]["mask"], bad])
    stream = hk.FactorAccumulator(model, CE, position_mask=lambda inputs: next(given))
    stream.update(*batch)
    before = stream.factors()
    with pytest.raises(error, match=message):
        stream.update(*batch)
    for name, layer in stream.factors().items():
        assert torch.equal(layer.input_covariance, before[name].input_covariance)
        assert torch.equal(layer.output_hessian, before[name].output_hessian)
    calls: list[Callable[[Any], Any]] = [
        lambda mask: hk.layer_hessians(model, [batch, batch], CE, position_mask=mask),
        lambda mask: hk.GaussNewton(model, [batch, batch], CE, position_mask=mask),
        lambda mask: hk.position_mean_hessian(model, [batch, batch], CE, "up", position_mask=mask),
    ]
    for call in calls[: 2 if case in ("another length by name", "no such layer") else 3]:
        again = iter([batch[0]["mask"], bad])
        with pytest.raises(error, match=message):
            call(lambda inputs, again=again: next(again))


def test_a_mask_that_is_no_function() -> None:
    batch = padded("right")
    with pytest.raises(TypeError, match=r"position_mask must be a function .*got Tensor"):
        hk.kronecker_factors(encoder(), [batch], CE, position_mask=batch[0]["mask"])


@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("output", ["exact", "mc"])
def test_masks_as_on_a_device(bias: str, output: str) -> None:
    """No value is looked at while the sums are made, wherever the mask lies."""
    data = [padded("right"), padded("left", (2, 5), seed=1)]
    settings: dict[str, Any] = {"bias": bias, "output": output, "position_mask": mask_of}
    expected = hk.kronecker_factors(encoder(), data, CE, **settings)
    with playing_device():
        assert_same(hk.kronecker_factors(encoder(), data, CE, **settings), expected, 1e-12)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("batches", [1, 3])
def test_a_pass_does_not_wait(where: str, batches: int) -> None:
    """The host asks the device for the values at the end alone, however many batches there are."""
    model = encoder(torch.float32)
    data = [padded("right", seed=seed) for seed in range(batches)]
    expected = hk.kronecker_factors(model, data, CE, output="mc", position_mask=mask_of)
    device = played()
    masks = [inputs["mask"] for inputs, _ in data]
    given = iter(mask if where == "host" else mask.to(device) for mask in masks)
    with generators():
        model = model.to(device)
        with counting() as counts:
            found = hk.kronecker_factors(
                model, data, CE, output="mc", position_mask=lambda _: next(given)
            )
        assert counts.reads == 1
    for name, layer in expected.items():
        for factor in ("input_covariance", "output_hessian"):
            error = relative_error(getattr(found[name], factor).cpu(), getattr(layer, factor))
            assert error <= 1e-5

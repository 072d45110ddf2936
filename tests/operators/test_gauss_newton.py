"""The Gauss-Newton matrix over all layers against autograd's, and its stacked approximation."""

import pytest
import torch
from networks import ResidualConv, classes, randn, seeded
from torch import nn
from torch.func import functional_call

import hesskern as hk

LOSS = nn.CrossEntropyLoss()


def mlp():
    return seeded(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    )


def data(*shape, c=3, batch=7):
    x, y = randn(*shape, seed=5), classes(shape[0], c=c, seed=5)
    return list(zip(x.split(batch), y.split(batch), strict=True))


def dense(model, batches, names, joint=False, weights=None):
    """[P, P] mean of J^T A J over the parameters of these layers, by autograd alone."""
    keys = [f"{n}.weight" for n in names]
    if joint:
        keys = [key for n in names for key in (f"{n}.weight", f"{n}.bias")]
    values = dict(model.named_parameters())
    model.eval()
    order = []
    position = 0
    starts = {}
    for key in keys:
        starts[key] = position
        position += values[key].numel()
    for n in names:
        m = len(values[f"{n}.weight"])
        columns = torch.arange(values[f"{n}.weight"].numel()).reshape(m, -1) + starts[f"{n}.weight"]
        if joint:
            columns = torch.cat([columns, (torch.arange(m) + starts[f"{n}.bias"])[:, None]], 1)
        order.append(columns.flatten())
    order = torch.cat(order)
    total, count = torch.zeros(len(order), len(order)).double(), 0.0
    offset = 0
    for x, _ in batches:
        for i in range(len(x)):
            share = 1.0 if weights is None else float(weights[offset])
            offset += 1

            def outputs(*tensors, sample=x[i : i + 1]):
                named = dict(zip(keys, tensors, strict=True))
                return functional_call(model, named, (sample,))[0]

            parts = torch.autograd.functional.jacobian(outputs, tuple(values[k] for k in keys))
            jacobian = torch.cat([p.flatten(1) for p in parts], 1)[:, order]
            p = outputs(*(values[k] for k in keys)).softmax(0).detach()
            total += share * jacobian.T @ (p.diag() - p.outer(p)) @ jacobian
            count += share
    return total / count


CASES = {
    "linear": (mlp, (20, 4), ["0", "2", "4"], False),
    "joint": (mlp, (20, 4), ["0", "2", "4"], True),
    "conv": (lambda: seeded(ResidualConv()), (9, 2, 5, 5), ["conv1", "conv2", "fc"], False),
    "sequence": (
        lambda: seeded(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))),
        (6, 8, 4),
        ["0", "3"],
        True,
    ),
}


@pytest.mark.parametrize("budget", [2**30, 0])
@pytest.mark.parametrize("case", CASES)
def test_equals_autograd(case, budget):
    make, shape, names, joint = CASES[case]
    model, batches = make(), data(*shape)
    G = hk.GaussNewton(
        model, batches, LOSS, bias="joint" if joint else "none", memory_budget=budget
    )
    expected = dense(model, batches, names, joint)
    assert list(G.slices) == names
    assert G.cached == (budget > 0)
    torch.testing.assert_close(G.to_dense(), expected, rtol=1e-9, atol=1e-12)
    block = randn(G.shape[0], 3, seed=8)
    torch.testing.assert_close(G @ block, expected @ block, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(G @ block[:, 1], expected @ block[:, 1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(G.diagonal(), expected.diagonal(), rtol=1e-9, atol=1e-12)
    assert G.trace() == pytest.approx(float(expected.trace()), rel=1e-9)


def test_layer_blocks_are_the_layer_hessians_and_cross_blocks_are_not_zero():
    model, batches = mlp(), data(20, 4)
    G = hk.GaussNewton(model, batches, LOSS)
    matrix = G.to_dense()
    for name, H in hk.layer_hessians(model, batches, LOSS).items():
        part = G.slices[name]
        torch.testing.assert_close(matrix[part, part], H.to_dense(), rtol=1e-9, atol=1e-12)
    assert float(matrix[G.slices["0"], G.slices["4"]].norm()) > 1e-3


def test_missing_part_of_the_hessian_lies_between_layers():
    model, batches = mlp(), data(20, 4)
    G = hk.GaussNewton(model, batches, LOSS)
    params = [f"{name}.weight" for name in G.slices]
    H = hk.AutogradHessian(model, batches, LOSS, params=params).to_dense()
    gap = H - G.to_dense()
    for part in G.slices.values():
        assert float(gap[part, part].norm()) < 1e-12
    assert float(gap.norm()) > 1e-3 * float(H.norm())


def test_weights_of_samples_and_rows_in_several_pieces():
    model, batches = mlp(), data(20, 4)
    weight = randn(20, seed=3).abs()
    # Room for one layer's gradient row of a batch, so that pieces hold single root rows.
    G = hk.GaussNewton(model, batches, LOSS, sample_weight=weight, memory_budget=1)
    expected = dense(model, batches, ["0", "2", "4"], weights=weight)
    torch.testing.assert_close(G.to_dense(), expected, rtol=1e-9, atol=1e-12)
    assert G.num_samples == pytest.approx(float(weight.sum()))


def test_eigenpairs_of_the_operator():
    model, batches = mlp(), data(20, 4)
    G = hk.GaussNewton(model, batches, LOSS, bias="joint")
    found = hk.eigsh(G, 5)
    expected = torch.linalg.eigvalsh(dense(model, batches, ["0", "2", "4"], True)).flip(0)[:5]
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-10)


def test_chosen_layers_and_bad_input():
    model, batches = mlp(), data(20, 4)
    G = hk.GaussNewton(model, batches, LOSS, layers=["4", "0"])
    assert list(G.slices) == ["0", "4"]
    parts = G.split(torch.arange(G.shape[0]).double())
    assert [tuple(part.shape) for part in parts.values()] == [(6, 4), (3, 5)]
    assert torch.equal(parts["4"].flatten(), torch.arange(24, 39).double())
    with pytest.raises(ValueError, match="data yielded no samples"):
        hk.GaussNewton(model, [], LOSS)
    with pytest.raises(ValueError, match="memory_budget of 10 bytes is too small"):
        hk.GaussNewton(model, iter(batches), LOSS, memory_budget=10)
    G = hk.GaussNewton(model, batches, LOSS, memory_budget=0)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="the model changed"):
        G @ torch.zeros(G.shape[0]).double()


def constant_inputs():
    """A network whose layers all see one and the same input for every sample: W x with fixed x."""
    x, y = randn(1, 4, seed=2).repeat(12, 1), classes(12, c=3)
    return mlp(), [(x, y)]


def test_stacked_form_is_exact_where_inputs_are_constant():
    model, batches = constant_inputs()
    G = hk.GaussNewton(model, batches, LOSS, bias="joint")
    S = G.stacked()
    torch.testing.assert_close(S.to_dense(), G.to_dense(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(S.diagonal(), G.diagonal(), rtol=1e-9, atol=1e-12)
    assert S.trace() == pytest.approx(G.trace(), rel=1e-9)


def test_stacked_form_by_its_definition_and_its_eigenpairs():
    model, batches = mlp(), data(20, 4)
    S = hk.GaussNewton(model, batches, LOSS).stacked()
    blocks = [
        torch.kron(torch.eye(m).double(), x[:, None])
        for m, x in zip(S.sizes, S.input_means, strict=True)
    ]
    B = torch.block_diag(*blocks)
    M = S.output_hessian
    torch.testing.assert_close(S.to_dense(), B @ M @ B.T, rtol=1e-9, atol=1e-12)
    x = torch.cat([x for x, _ in batches])
    torch.testing.assert_close(S.input_means[0], x.mean(0))
    torch.testing.assert_close(S.input_means[1], model[1](model[0](x)).mean(0).detach())
    for i, name in enumerate(["0", "2", "4"]):
        start = sum(S.sizes[:i])
        part = slice(start, start + S.sizes[i])
        expected = hk.kronecker_factors(model, batches, LOSS)[name].output_hessian
        torch.testing.assert_close(M[part, part], expected, rtol=1e-9, atol=1e-12)
    found = S.eigsh(2)
    values, vectors = torch.linalg.eigh(B @ M @ B.T)
    torch.testing.assert_close(found.values, values.flip(0)[:2], rtol=1e-8, atol=1e-12)
    overlap = hk.subspace_overlap(found.vectors, vectors.flip(1)[:, :2])
    torch.testing.assert_close(overlap, torch.ones(2).double(), rtol=1e-7, atol=1e-7)
    published = S.published_vectors(2)
    u = torch.linalg.eigh(M).eigenvectors.flip(1)[:, :2]
    plain = torch.linalg.qr(B @ u).Q
    torch.testing.assert_close(published.abs(), plain.abs(), rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match=r"k must lie in \[1, 14\], got 15"):
        S.eigsh(15)


def test_stacked_form_needs_one_input_per_sample():
    G = hk.GaussNewton(seeded(ResidualConv()), data(6, 2, 5, 5), LOSS)
    with pytest.raises(NotImplementedError, match="'conv1' is a convolution or sees sequences"):
        G.stacked()


def test_products_that_run_the_model_again_skip_no_layer():
    class Mixing(nn.Module):
        mixes = False

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            h = self.a(x)
            return self.b(torch.relu(h - h.mean(0) if self.mixes else h))

    model = seeded(Mixing())
    G = hk.GaussNewton(model, data(20, 4), LOSS, memory_budget=0)
    assert G.trace() > 0
    model.mixes = True
    with pytest.raises(ValueError, match="layer 'a' sees rows that are no samples"):
        G.trace()

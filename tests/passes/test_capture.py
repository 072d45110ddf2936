"""How models are run: compiled ones, the caller's autograd mode, transformers."""

import pytest
import torch
from torch import nn

import hesskern as hk

LOSS = nn.CrossEntropyLoss()


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    return model, [(torch.randn(8, 6).double(), torch.randint(3, (8,)))]


def test_compiled_model_runs_eagerly(problem):
    model, data = problem
    compiled = torch.compile(model, backend="eager")
    compiled(data[0][0])
    plain = hk.kronecker_factors(model, data, LOSS)["0"]
    factors = hk.kronecker_factors(compiled, data, LOSS)
    name = next(iter(factors))
    assert torch.equal(factors[name].output_hessian, plain.output_hessian)
    exact = hk.AutogradHessian(compiled, data, LOSS, params=[f"{name}.weight"]).to_dense()
    H = hk.layer_hessians(compiled, data, LOSS)[name].to_dense()
    assert (H - exact).norm() <= 1e-10 * exact.norm()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_autograd_mode_of_the_caller_does_not_matter(problem, mode):
    model, data = problem
    expected = hk.layer_hessians(model, data, LOSS)["0"].trace()
    with mode():
        assert hk.layer_hessians(model, data, LOSS)["0"].trace() == expected
        assert not torch.is_grad_enabled()


def test_transformer_runs_and_says_what_it_skips():
    torch.manual_seed(0)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.encoder(x).mean(1))

    model = Classifier().double()
    data = [(torch.randn(8, 4, 8).double(), torch.randint(3, (8,)))]
    factors = hk.kronecker_factors(model, data, LOSS)
    projections = ["encoder.self_attn.in_proj", "encoder.self_attn.out_proj"]
    assert list(factors) == [*projections, "encoder.linear1", "encoder.linear2", "head"]
    assert set(factors.skipped) == {"encoder.norm1", "encoder.norm2"}
    with pytest.warns(UserWarning, match=r"'encoder.linear1' is followed by NativeLayerNorm"):
        hessians = hk.layer_hessians(model, data, LOSS)
    assert hessians["head"].is_exact
    assert not hessians["encoder.linear1"].is_exact

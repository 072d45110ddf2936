"""Hessians of models that share, freeze, hide or overwrite what their layers see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from blocks import hessians
from dense import gauss_newton, loss_hessian, relative_error
from networks import (
    CASES,
    CE,
    Between,
    Routed,
    TiedDecoder,
    classes,
    randn,
    routed_data,
    sample_loss,
    seeded,
)
from torch import Tensor, nn

import hesskern as hk


def test_weight_reused_transposed_is_refused() -> None:
    model = seeded(TiedDecoder())
    data = [(randn(4, 3), classes(4, c=3))]
    found = hessians(model, data, CE)
    assert set(found) == {"out"}
    assert "acts through Mm, which is no linear call by it" in found.skipped["encode"]
    with pytest.raises(ValueError, match="layer 'encode' has a weight that acts through Mm"):
        hk.layer_hessians(model, data, CE, layers=["encode"])
    with pytest.raises(KeyError, match="no Hessian of layer 'encode': it has a weight"):
        found["encode"]


def test_a_tied_weight_asked_for_by_one_of_its_names_has_the_whole_block() -> None:
    case = CASES["tied"]
    model, data = case.model(), case.data()
    H = hessians(model, data, CE, layers=["second"])["second"]
    assert H.inexact_reason == "is used 2 times in one forward pass, one after the other"
    expected = gauss_newton(model, data, sample_loss, "first")
    assert relative_error(H.to_dense(), expected) <= 1e-10


def test_weight_tied_to_an_embedding_is_left_out() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.hidden = nn.Linear(4, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(F.relu(self.hidden(self.embed(tokens)))).transpose(1, 2)

    model = seeded(Language())
    tokens = classes(3, 4, c=5)
    data = [(tokens, tokens.roll(-1, 1))]
    found = hessians(model, data, CE)
    assert found["hidden"].is_exact
    assert "acts through Embedding" in found.skipped["head"]
    expected = loss_hessian(model, data, sample_loss, "hidden")
    assert relative_error(found["hidden"].to_dense(), expected) <= 1e-10


def test_parametrized_weights_are_not_mistaken_for_shared_ones() -> None:
    from torch.nn.utils.parametrizations import weight_norm

    model = nn.Sequential(
        weight_norm(nn.Linear(4, 5)), nn.ReLU(), weight_norm(nn.Linear(5, 5)), nn.ReLU()
    )
    model.append(nn.Linear(5, 3))
    seeded(model)
    data = [(randn(4, 4), classes(4, c=3))]
    found = hk.layer_hessians(model, data, CE)
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    plain.double()
    for i in (0, 2, 4):
        plain[i].weight.data.copy_(model[i].weight.detach())
        plain[i].bias.data.copy_(model[i].bias.detach())
    assert set(found) == {"0", "2", "4"}
    for layer, H in found.items():
        assert H.is_exact
        expected = loss_hessian(plain, data, sample_loss, layer)
        assert relative_error(H.to_dense(), expected) <= 1e-10


@pytest.mark.parametrize("inplace", [False, True])
def test_checkpointed_part(inplace: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 5)
            self.c = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.utils.checkpoint.checkpoint(
                lambda t: F.relu(self.b(F.relu(self.a(t), inplace))), x, use_reentrant=False
            )
            return self.c(h)

    model = seeded(Checkpointed())
    data = [(randn(4, 4), classes(4, c=3))]
    found = hessians(model, data, CE)
    factors = hk.kronecker_factors(model, data, CE)
    plain = nn.Sequential(model.a, nn.ReLU(), model.b, nn.ReLU(), model.c)
    expected_factors = hk.kronecker_factors(plain, data, CE)
    for layer, name in zip("abc", "024", strict=True):
        expected = loss_hessian(plain, data, sample_loss, name)
        assert relative_error(found[layer].to_dense(), expected) <= 1e-10
        assert (
            relative_error(factors[layer].output_hessian, expected_factors[name].output_hessian)
            <= 1e-12
        )


def test_layer_input_overwritten_in_place_after_it_was_read() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)
            self.in_place = True

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            first = self.a(h)
            h = h.add_(1.0).relu_() if self.in_place else (h + 1.0).relu()
            return first + self.b(h)

    model = seeded(Overwrites())
    data = [(randn(4, 4), classes(4, c=3)), (randn(2, 4, seed=1), classes(2, c=3))]
    found = hk.layer_hessians(model, data, CE)
    factors = hk.kronecker_factors(model, data, CE)
    # With trainable weights torch itself refuses the in-place form.
    model.in_place = False
    for layer, H in found.items():
        expected = loss_hessian(model, data, sample_loss, layer)
        assert relative_error(H.to_dense(), expected) <= 1e-10
    inputs = torch.cat([model.stem(x) for x, _ in data]).detach()
    expected = inputs.T @ inputs / 6
    assert relative_error(factors["a"].input_covariance, expected) <= 1e-12


def test_model_that_overwrites_its_own_input_is_refused_not_run_twice() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x)
            return z + x.mul_(2.0)[:, :3]

    model = seeded(Overwrites())
    with pytest.raises(ValueError, match=r"model must not overwrite its own inputs"):
        hk.layer_hessians(model, [(randn(4, 4), classes(4, c=3))], CE)


def test_layers_reached_in_some_batches_or_never() -> None:
    model, data = seeded(Routed(beside=True)), routed_data()
    with pytest.warns(UserWarning, match="left out: 'unused' was never reached .* covers"):
        found = hk.layer_hessians(model, data, CE)
    assert found.skipped == {"unused": "was never reached in the forward pass"}
    assert set(found) == {"stem", "positive", "negative", "dead"}
    for layer, H in found.items():
        expected = loss_hessian(model, data, sample_loss, layer)
        assert relative_error(H.to_dense(), expected) <= 1e-10
        assert H.num_samples == 9
    assert found["dead"].trace() == 0.0
    assert torch.equal(found["dead"] @ randn(12), torch.zeros(12).double())
    # Asked for by name, a layer that only a later batch reaches is right, one never reached is not.
    assert set(hk.layer_hessians(model, data, CE, layers=["positive"])) == {"positive"}
    with pytest.raises(ValueError, match="'unused' was never reached"):
        hk.layer_hessians(model, data, CE, layers=["stem", "unused"])


def test_frozen_layers_count_and_stay_frozen() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    expected = hk.layer_hessians(model, data, CE)
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    found = hk.layer_hessians(model, data, CE)
    for layer in expected:
        assert torch.equal(found[layer].to_dense(), expected[layer].to_dense())
    assert [p.requires_grad for p in model.parameters()] == [False, True, False, True, True]


def test_layer_under_no_grad_inside_the_model() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = F.relu(self.backbone(x))
            return self.head(h)

    model = seeded(Frozen())
    data = [(randn(4, 4), classes(4, c=3))]
    with pytest.warns(UserWarning, match="left out: 'backbone' runs under torch.no_grad"):
        assert set(hk.layer_hessians(model, data, CE)) == {"head"}
    with pytest.raises(ValueError, match=r"layers: 'backbone' runs under torch.no_grad"):
        hk.layer_hessians(model, data, CE, layers=["backbone"])


def test_users_hooks_belong_to_the_model() -> None:
    model = seeded(Between(F.relu))
    model.a.register_forward_pre_hook(lambda _, args: (args[0] * 2 + 1,))
    model.a.register_forward_hook(lambda _, args, z: 3 * z, prepend=True)
    model.b.register_forward_hook(lambda _, args, z: z - 1)
    data = [(randn(4, 4), classes(4, c=3))]
    for layer, H in hk.layer_hessians(model, data, CE).items():
        assert H.is_exact
        expected = loss_hessian(model, data, sample_loss, layer)
        assert relative_error(H.to_dense(), expected) <= 1e-10

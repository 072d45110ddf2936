"""Certificates: saved, loaded, verified; refused when anything in them was changed."""

import hashlib
import json
import math
from dataclasses import fields, replace

import pytest
import torch
from certificates import FAST, NET, blobs
from safetensors.torch import load_file, save_file
from torch import nn

import hesskern as hk
from hesskern.apps.certify.published_nets import parse_net
from hesskern.pacbayes import (
    CertificateError,
    LayerPosterior,
    PriorGrid,
    Protocol,
    certify,
    kl_inverse,
    load_certificate,
)
from hesskern.pacbayes.samples import Samples, collect


@pytest.fixture(scope="module")
def certificate():
    model = NET.build((1, 3, 4), seed=3)
    return certify(
        model,
        model,
        blobs(),
        epochs=3,
        protocol=Protocol(passes=20),
        settings=FAST,
        seed=1,
        prior_record=NET.prior_record((1, 3, 4), 3),
        test=blobs(60, seed=1),
    )


def test_it_holds_and_its_numbers_belong_together(certificate):
    certificate.verify()
    certificate.verify(blobs())
    n, c = 150, certificate
    assert c.n == n
    assert c.draws == 20 * n
    assert c.snn_error == c.errors / (20 * n)
    assert math.isclose(c.q, float(kl_inverse(c.snn_error, math.log(200) / (20 * n))))
    price = sum(2 * math.log(j) + math.log(math.pi**2 / 6) for j in c.indices.values())
    rate = (c.kl + price + math.log(2 * math.sqrt(n) / 0.025)) / n
    assert math.isclose(c.bound, float(kl_inverse(c.q, rate)))
    assert math.isclose(c.confidence, 0.965)
    assert c.prior_variances == {k: 0.1 * math.exp(-j / 100) for k, j in c.indices.items()}
    assert repr(c).startswith(f"Certificate: error <= {c.bound:.4f}")


def test_kl_is_that_of_the_tensors_by_an_independent_formula(certificate):
    total = 0.0
    for name, layer in certificate.layers.items():
        prior = certificate.prior_variances[name]
        basis = torch.kron(layer.U, layer.V)
        covariance = basis @ torch.diag(layer.variance.flatten()) @ basis.T
        q = torch.distributions.MultivariateNormal(
            layer.mean.double().flatten(), 0.5 * (covariance + covariance.T)
        )
        identity = torch.eye(len(covariance), dtype=torch.float64)
        p = torch.distributions.MultivariateNormal(
            layer.prior_mean.double().flatten(), prior * identity
        )
        total += float(torch.distributions.kl_divergence(q, p))
    assert math.isclose(certificate.kl, total, rel_tol=1e-6)


def test_it_comes_back_from_its_file_and_needs_no_model(certificate, tmp_path):
    path = tmp_path / "c.safetensors"
    certificate.save(path)
    loaded = load_certificate(path)
    assert loaded.model is None
    assert loaded.header() == json.loads(json.dumps(certificate.header()))
    loaded.verify(blobs())
    assert loaded.test["n"] == 60
    # The order of the samples is no part of the data.
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    loaded.verify(Samples(blobs().inputs[order], blobs().targets[order]))


def test_without_a_description_the_model_must_be_given(certificate):
    bare = replace(certificate, architecture=None, model=None).sealed()
    with pytest.raises(ValueError, match="pass model="):
        bare.verify(blobs())
    bare.verify(blobs(), model=NET.build((1, 3, 4), seed=8))
    with pytest.raises(CertificateError, match=r"layer 'fc1' is \(5, 13\)"):
        bare.verify(blobs(), model=parse_net("T-5_10").build((1, 3, 4), seed=8))


def changed_value(value):
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return value[:-1]
    return {key: changed_value(item) for key, item in value.items()}


def test_every_changed_field_is_noticed(certificate, tmp_path):
    path = tmp_path / "c.safetensors"
    certificate.save(path)
    tensors, header = load_file(path), certificate.header()
    for name in header:
        if name in ("format", "protocol", "per_example"):
            continue
        changed = {**header, name: changed_value(header[name])}
        save_file(tensors, path, metadata={"hesskern": json.dumps(changed)})
        with pytest.raises((CertificateError, ValueError)):
            load_certificate(path).verify()
    for name in header["protocol"]:
        if name in ("grid", "form", "sampling"):
            continue
        protocol = {**header["protocol"], name: 0.5 * header["protocol"][name]}
        save_file(
            tensors, path, metadata={"hesskern": json.dumps({**header, "protocol": protocol})}
        )
        with pytest.raises(ValueError, match=r"digest|positive integer"):
            load_certificate(path).verify()


def test_every_changed_tensor_is_noticed(certificate, tmp_path):
    path = tmp_path / "c.safetensors"
    certificate.save(path)
    tensors, metadata = load_file(path), {"hesskern": json.dumps(certificate.header())}
    assert len(tensors) == 10
    for name in tensors:
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        changed[name].view(-1)[0] += 1e-3
        save_file(changed, path, metadata=metadata)
        with pytest.raises(CertificateError, match="digest"):
            load_certificate(path).verify()


def resealed(certificate, **changes):
    return replace(certificate, **changes).sealed()


def changed_layer(certificate, name="fc1", **changes):
    layers = dict(certificate.layers)
    layers[name] = replace(layers[name], **changes)
    return resealed(certificate, layers=layers)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: resealed(c, bound=c.bound - 1e-4), "bound is"),
        (lambda c: resealed(c, kl=c.kl - 1), "kl is"),
        (lambda c: resealed(c, rate=c.rate * 0.99), "rate is"),
        (lambda c: resealed(c, q=c.q * 0.99), "q is"),
        (lambda c: resealed(c, errors=c.errors - 1), "q is"),
        (lambda c: resealed(c, errors=-1), r"errors must lie in 0\.\.3000, got -1"),
        (lambda c: resealed(c, draws=c.draws + 1), "draws is"),
        (lambda c: resealed(c, n=c.n + 1), "rate is|draws is"),
        (lambda c: resealed(c, protocol=replace(c.protocol, passes=21)), "draws is"),
        (lambda c: resealed(c, protocol=replace(c.protocol, delta=0.03)), "rate is"),
        (lambda c: resealed(c, protocol=replace(c.protocol, delta_draws=0.02)), "q is"),
        (lambda c: resealed(c, protocol=replace(c.protocol, form="langford-seeger")), "rate is"),
        (lambda c: resealed(c, protocol=replace(c.protocol, grid=PriorGrid(b=101))), "kl is"),
        (lambda c: resealed(c, protocol=replace(c.protocol, shared_variance=True)), "j must be"),
        (lambda c: resealed(c, indices={**c.indices, "fc1": 0}), "two numbers|j must be"),
        (lambda c: resealed(c, indices={"fc1": c.indices["fc1"]}), "indices must name"),
        (lambda c: changed_layer(c, index=0), "two numbers"),
        (lambda c: changed_layer(c, mean=c.layers["fc1"].mean + 0.01), "kl is"),
        (lambda c: changed_layer(c, variance=c.layers["fc1"].variance * 1.1), "kl is"),
        (lambda c: changed_layer(c, variance=-c.layers["fc1"].variance), "variance must be"),
        (lambda c: changed_layer(c, U=c.layers["fc1"].U * 1.0001), "not orthogonal"),
        (lambda c: changed_layer(c, V=c.layers["fc1"].V[:, :-1]), r"V must be \[13, 13\]"),
        (lambda c: resealed(c, prior={**c.prior, "seed": 4}), "not what its construction"),
        (lambda c: resealed(c, prior={**c.prior, "model": "f7"}), "construction"),
    ],
)
def test_a_wrong_certificate_is_refused_although_its_digest_fits(certificate, change, match):
    with pytest.raises(CertificateError, match=match):
        change(certificate).verify()


def test_a_moved_centre_that_fits_the_kl_is_refused_by_the_priors_record(certificate):
    # Shifting w0 and the mean alike keeps the KL; only w0's construction gives it away.
    layer = certificate.layers["fc1"]
    moved = changed_layer(
        certificate, mean=layer.mean.double() + 0.25, prior_mean=layer.prior_mean.double() + 0.25
    )
    with pytest.raises(CertificateError, match="w0 of layer 'fc1'"):
        moved.verify()


def test_other_data_or_an_error_that_was_not_drawn_is_refused(certificate):
    with pytest.raises(CertificateError, match="n is 150, but the data hold 149"):
        certificate.verify(Samples(blobs().inputs[:149], blobs().targets[:149]))
    targets = blobs().targets.clone()
    targets[7] = (targets[7] + 1) % 10
    with pytest.raises(CertificateError, match="not the samples"):
        certificate.verify(Samples(blobs().inputs, targets))
    # A certificate that counted too few errors, consistent in itself.
    errors = certificate.errors // 2
    q = float(kl_inverse(errors / certificate.draws, math.log(200) / certificate.draws))
    lying = resealed(certificate, errors=errors, q=q, bound=float(kl_inverse(q, certificate.rate)))
    lying.verify()
    with pytest.raises(CertificateError, match="new draws have an error of"):
        lying.verify(blobs())


def test_a_layer_that_shares_weights_cannot_pose_as_independent():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 10))
    data = blobs(60)
    found = certify(model, model, data, epochs=1, protocol=Protocol(passes=2), settings=FAST)
    found.verify(data)
    assert found.draws == 2
    posing = {name: replace(layer, per_example=True) for name, layer in found.layers.items()}
    trials = 120
    q = float(kl_inverse(found.errors / trials, math.log(200) / trials))
    lying = resealed(
        found, layers=posing, draws=trials, q=q, bound=float(kl_inverse(q, found.rate))
    )
    lying.verify()
    with pytest.raises(CertificateError, match="cannot be drawn per example"):
        lying.verify(data)


def test_files_that_are_no_certificates(tmp_path, certificate):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_certificate(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        certificate.save(tmp_path / "none" / "c.safetensors")
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="does not hold a certificate"):
        load_certificate(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable certificate"):
        load_certificate(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors"]


def test_the_fingerprint_sees_samples_and_not_their_order():
    data = blobs(20)
    order = torch.arange(19, -1, -1)
    shuffled = Samples(data.inputs[order], data.targets[order])
    assert data.fingerprint() == shuffled.fingerprint()
    swapped = Samples(data.inputs, data.targets[order])
    assert data.fingerprint() != swapped.fingerprint()
    assert data.fingerprint() != Samples(data.inputs.double(), data.targets).fingerprint()
    batches = [(data.inputs[:9], data.targets[:9]), (data.inputs[9:], data.targets[9:])]
    assert collect(batches).fingerprint() == data.fingerprint()


def test_public_names():
    assert hk.pacbayes.certify is certify
    assert {f.name for f in fields(LayerPosterior)} >= {"mean", "prior_mean", "variance", "U", "V"}


def file_of_old(certificate, path):
    """As files were written while the method was called "natural", in header and digest."""
    header = {**certificate.header(), "method": "natural", "digest": ""}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    tensors = certificate.tensors()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    header["digest"] = digest.hexdigest()
    save_file(tensors, path, metadata={"hesskern": json.dumps(header)})


def test_a_file_of_the_methods_old_name_verifies(certificate, tmp_path):
    path = tmp_path / "old.safetensors"
    file_of_old(certificate, path)
    old = load_certificate(path)
    assert old.method == "natural"
    old.verify(blobs(), passes=2)
    again = tmp_path / "again.safetensors"
    old.save(again)
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(CertificateError, match="digest does not fit"):
        replace(old, method="truncated").verify()

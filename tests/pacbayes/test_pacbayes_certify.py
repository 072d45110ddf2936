"""certify: methods, bad input, resumption, interruption."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from certificates import FAST, NET, blobs
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from hesskern.pacbayes import (
    METHODS,
    PUBLISHED,
    CertifySettings,
    NaturalSettings,
    PriorGrid,
    Protocol,
    PublishedSettings,
    TruncatedSettings,
    certify,
    certify_with,
)
from hesskern.pacbayes.grid import on_grid
from hesskern.pacbayes.posterior import spread_out
from hesskern.pacbayes.problem import Problem
from hesskern.pacbayes.published_methods import Published
from hesskern.pacbayes.samples import Samples
from hesskern.pacbayes.slots import slots_of, state_of
from hesskern.pacbayes.truncated_layer import rows_of
from hesskern.pacbayes.truncated_method import Truncated

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


def test_ours_learns_and_leaves_the_model_alone():
    model = built()
    before = state_of(model)
    data = blobs(600)
    found = certify(model, model, data, epochs=40, protocol=TERMS, settings=FAST)
    assert found.bound < 0.6  # the prior alone: about .9
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert found.prior["construction"] == "declared data-free by the user"
    assert len(found.history) == 40
    # The estimate that is shown while training is close to the certificate.
    assert abs(found.history[-1]["estimate"] - found.bound) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_published_methods_lower_their_objective(method):
    data = blobs()
    found = certify(
        trained(data),
        built(),
        data,
        method,
        epochs=10,
        protocol=SHARED,
        settings=PublishedSettings(batch_size=50, rate=0.03),
    )
    values = [entry["objective"] for entry in found.history]
    assert values[-1] < values[0]
    assert len(set(found.indices.values())) == 1
    bases = [layer.U is None for layer in found.layers.values()]
    assert bases == [method == "base"] * 2


def method_of(name, model, data):
    slots = slots_of(model, data.inputs[:2])
    state = state_of(built())
    settings = PublishedSettings(batch_size=50)
    generator = torch.Generator().manual_seed(0)
    problem = Problem(model, slots, state, state_of(model), data, SHARED)
    return Published(name, problem, settings, generator)


def covariance_diagonal(draft, U, V):
    """Diagonal of the draft's covariance in the basis U (x) V, by dense algebra."""
    basis = torch.kron(draft.U, draft.V)
    dense = basis @ torch.diag(draft.variance.double().flatten()) @ basis.T
    other = torch.kron(U, V)
    return (other.T @ dense @ other).diagonal().view(draft.variance.shape)


@pytest.mark.parametrize(("method", "moves"), [("appr", False), ("iter", True), ("iter_m", True)])
def test_a_refresh_carries_the_variances_over(method, moves):
    data = blobs()
    optimizer = method_of(method, trained(data), data)
    for rows in torch.arange(150).split(50):
        optimizer.step(rows, 0.0)
    before = optimizer.drafts()["fc1"]
    optimizer.begin_epoch(0.5)
    after = optimizer.drafts()["fc1"]
    assert torch.equal(before.U, after.U) is not moves
    expected = covariance_diagonal(before, after.U, after.V)
    torch.testing.assert_close(after.variance.double(), expected, rtol=1e-4, atol=1e-9)


def test_the_schedules_are_the_published_ones(monkeypatch):
    data = blobs()
    counts = {}
    for name in ("iter", "iter_d"):
        optimizer = method_of(name, trained(data), data)
        refreshed = []
        monkeypatch.setattr(
            optimizer, "_fresh_bases", lambda o=optimizer, r=refreshed: r.append(1) or o._bases
        )
        rates = []
        for epoch in range(2000):
            optimizer.begin_epoch(epoch / 2000)
            counts[name, epoch] = len(refreshed)
        for fraction in (0.0, 0.199, 0.2, 0.6, 0.99):
            optimizer.step(torch.arange(50), fraction)
            rates.append(optimizer._optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-6, 1e-7])
    assert counts["iter", 1999] == 199
    assert counts["iter", 399] == counts["iter_d", 399] == 39
    # After the first fall every 100 epochs, then every 1000.
    assert counts["iter_d", 799] - counts["iter_d", 399] in (4, 5)
    assert counts["iter_d", 1999] - counts["iter_d", 799] <= 3


def test_the_closed_form_hessian_of_the_last_layer_is_the_exact_one():
    data = blobs()
    model = trained(data)
    optimizer = method_of("iter_m", model, data)
    closed = optimizer._closed_form_hessians()
    with torch.no_grad():
        p = model(data.inputs).softmax(1)
    A = torch.diag_embed(p).mean(0) - p.T @ p / 150
    torch.testing.assert_close(closed["fc2"], A)
    W = model.fc2.weight.detach()
    torch.testing.assert_close(closed["fc1"], W.T @ A @ W / 4)


def truncated(data, **changes):
    model = built()
    slots = slots_of(model, data.inputs[:2])
    state = state_of(model)
    settings = TruncatedSettings(**{"batch_size": 50, "rank_in": 5, "rank_out": 3, **changes})
    generator = torch.Generator().manual_seed(0)
    problem = Problem(model, slots, state, state, data, TERMS)
    return Truncated(problem, settings, generator)


def test_bases_are_laid_out_for_inputs_under_noise():
    """What enters fc2 is relu(mean + U (deviation . noise)): its second moment, drawn here anew."""
    data = blobs(30)
    optimizer = truncated(data, prior_hidden=3.0)
    optimizer._factor_rows = torch.arange(30)
    found = sum(optimizer._noisy_moments().get("fc2") for _ in range(2000)) / 2000
    layer = optimizer._layers["fc1"]
    mean, deviation = layer.moments(data.inputs, optimizer._known["fc1"])
    generator = torch.Generator().manual_seed(1)
    drawn = torch.zeros(7, 7, dtype=torch.float64)
    for _ in range(2000):
        hidden = spread_out(mean, deviation, layer.U, generator).relu().double().detach()
        hidden = torch.cat([hidden, torch.ones(30, 1, dtype=torch.float64)], 1)
        drawn += hidden.T @ hidden / 2000
    torch.testing.assert_close(found, drawn, rtol=0.05, atol=0.02 * float(drawn.max()))
    still = torch.cat([mean.relu(), torch.ones(30, 1)], 1).double().detach()
    assert float((still.T @ still - drawn).norm()) > 0.2 * float(drawn.norm())
    # The layer that reads the data keeps its basis.
    assert optimizer._noisy_moments().get("fc1") is None


def test_refreshes_begin_the_average_anew():
    data = blobs(20)
    optimizer = truncated(data, averaged=0.9, refreshes=(0.5,))
    optimizer.step(torch.arange(10), 0.2)
    assert optimizer._averages == 1
    optimizer.begin_epoch(0.5)
    assert optimizer._averages == 0
    optimizer.step(torch.arange(10), 0.6)
    layer = optimizer._layers["fc2"]
    for mean, parameter in zip(optimizer._averaged["fc2"], layer.parameters(), strict=True):
        torch.testing.assert_close(mean, parameter.detach())


def test_a_relative_draft_moves_to_the_grid_as_a_whole():
    """Distance from the prior's mean, variances and prior are scaled alike: the KL stays."""
    data = blobs(40)
    optimizer = truncated(data)
    for rows in torch.arange(40).split(10):
        optimizer.step(rows, 0.1)
    drafts, state = optimizer.drafts(), state_of(built())
    protocol = replace(TERMS, grid=PriorGrid(c=1.0, b=3))
    layers = on_grid(drafts, optimizer._problem.slots, state, 40, protocol)
    total = 0.0
    for name, layer in layers.items():
        draft, variance = drafts[name], protocol.grid.variance(layer.index)
        assert abs(math.log(variance / draft.prior_variance)) <= 1 / 6 + 1e-6
        scale = variance / draft.prior_variance
        torch.testing.assert_close(layer.variance, draft.variance.double() * scale)
        moved = layer.prior_mean + scale**0.5 * (draft.mean - layer.prior_mean)
        torch.testing.assert_close(layer.mean, moved)
        total += layer.kl(variance)
    with optimizer._at_average():
        assert total == pytest.approx(optimizer.kl(), rel=1e-5)


def test_truncated_noise_is_that_of_the_draft():
    # The fast forward of training and the full covariance of the certificate are one distribution.
    data = blobs(20)
    optimizer = truncated(data)
    for rows in torch.arange(20).split(10):
        optimizer.step(rows, 0.1)
    layer, draft = optimizer._layers["fc1"], optimizer.drafts()["fc1"]
    x = layer.slot.extended(data.inputs.flatten(1))[:1]
    known = optimizer._known["fc1"]
    rows = torch.zeros(40_000, dtype=torch.long)
    with torch.no_grad():
        mean, deviation = layer.moments(x, rows_of(known, rows))
        drawn = layer.noisy(mean, deviation).double()
    torch.testing.assert_close(mean[0], (draft.mean @ x[0]).to(mean.dtype), rtol=1e-4, atol=1e-5)
    rotated = (x[0].double() @ draft.V).square()
    expected = draft.U @ torch.diag(draft.variance @ rotated) @ draft.U.T
    scale = expected.diagonal().sqrt()
    error = (torch.cov(drawn.T) - expected) / torch.outer(scale, scale)
    assert float(error.abs().max()) < 0.03


def test_kl_of_the_truncated_form_is_that_of_the_draft():
    optimizer = truncated(blobs(20))
    for _ in range(3):
        optimizer.step(torch.arange(20), 0.1)
    total = 0.0
    for name, draft in optimizer.drafts().items():
        w0 = optimizer._layers[name].prior_mean.double()
        ratio = draft.variance / draft.prior_variance
        moved = (draft.mean.double() - w0).square().sum() / draft.prior_variance
        total += 0.5 * float((ratio - 1 - ratio.log()).sum() + moved)
    assert math.isclose(optimizer.kl(), total, rel_tol=1e-4)


def test_a_refresh_keeps_the_traces_of_the_truncated_form():
    optimizer = truncated(blobs(40))
    for _ in range(5):
        optimizer.step(torch.arange(40), 0.1)
    before = {name: float(draft.variance.sum()) for name, draft in optimizer.drafts().items()}
    optimizer.begin_epoch(0.2)
    for name, draft in optimizer.drafts().items():
        assert math.isclose(float(draft.variance.sum()), before[name], rel_tol=1e-4)


def same(a, b):
    tensors_a, tensors_b = a.tensors(), b.tensors()
    return a.bound == b.bound and all(torch.equal(t, tensors_b[n]) for n, t in tensors_a.items())


@pytest.mark.parametrize("method", ["truncated", "iter"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(method, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    data = blobs()
    options = {"epochs": 6, "protocol": SHARED if method == "iter" else TERMS}
    options["settings"] = PublishedSettings(batch_size=50) if method == "iter" else FAST
    kind = Published if method == "iter" else Truncated
    whole = certify(trained(data), built(), data, method, **options)
    assert same(whole, certify(trained(data), built(), data, method, **options))
    monkeypatch.setattr("hesskern.pacbayes.procedure.SAVE_INTERVAL", 0.0)
    step, seen = kind.step, []

    def dies(self, rows, fraction):
        seen.append(fraction)
        if len(seen) == 3 * 3 + 2:
            raise Killed
        return step(self, rows, fraction)

    path = tmp_path / "run.pt"
    with monkeypatch.context() as patch:
        patch.setattr(kind, "step", dies)
        with pytest.raises(Killed):
            certify(trained(data), built(), data, method, checkpoint=path, **options)
    counted = []
    monkeypatch.setattr(kind, "step", lambda *a: counted.append(1) or step(*a))
    resumed = certify(trained(data), built(), data, method, checkpoint=path, **options)
    assert len(counted) == 9
    assert same(whole, resumed)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("hesskern.pacbayes.procedure.SAVE_INTERVAL", 0.0)
    path = tmp_path / "run.pt"
    run(checkpoint=path)
    for change in ({"seed": 1}, {"epochs": 3}, {"data": blobs(seed=2)}):
        with pytest.raises(ValueError, match=r"another run: its (seed|epochs|data) is"):
            run(checkpoint=path, **change)
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match="is damaged"):
        run(checkpoint=path)


def test_the_methods_old_name_is_the_same_method(tmp_path, monkeypatch):
    monkeypatch.setattr("hesskern.pacbayes.procedure.SAVE_INTERVAL", 0.0)
    assert NaturalSettings is TruncatedSettings
    path = tmp_path / "run.pt"
    found = run(method="natural", checkpoint=path)
    assert found.method == "truncated"
    # A run that was left unfinished under the old name goes on.
    content = torch.load(path, weights_only=True)
    content["identity"]["method"] = "natural"
    torch.save(content, path)
    assert same(found, run(checkpoint=path))


def test_settings_can_be_made_beforehand():
    settings = CertifySettings(epochs=2, protocol=TERMS, settings=FAST)
    data = blobs()
    assert same(run(data), certify_with(settings, built(), built(), data))
    assert settings.method == "truncated"
    published = CertifySettings("iter")
    assert (published.starts_at, published.terms, published.budget.epochs) == (
        "model",
        PUBLISHED,
        100,
    )
    with pytest.raises(FrozenInstanceError):
        settings.seed = 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        run(epoch=3)


def test_ctrl_c_certifies_what_there_is(monkeypatch):
    step, seen = Truncated.step, []

    def interrupted(self, rows, fraction):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return step(self, rows, fraction)

    monkeypatch.setattr(Truncated, "step", interrupted)
    data = blobs()
    found = run(data, epochs=50)
    assert found.interrupted
    assert found.settings["steps run"] == 4
    found.verify(data)


@pytest.mark.parametrize("method", METHODS)
def test_a_device_is_waited_for_seldom(method, monkeypatch):
    """On a device, here the CPU as one, the same run looks at objectives some steps later."""
    data = blobs()
    settings = FAST if method == "truncated" else PublishedSettings(batch_size=50)
    at_once = run(data, method=method, epochs=3, settings=settings)
    monkeypatch.setattr("hesskern.pacbayes.loop.on_host", lambda value: False)
    monkeypatch.setattr("hesskern.pacbayes.loop._UNSEEN", 2)
    later = run(data, method=method, epochs=3, settings=settings)
    assert later.bound == at_once.bound
    assert later.history == at_once.history


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_device_names_the_step_that_was_not_finite(at, monkeypatch):
    step, seen = Truncated.step, []

    def broken(self, rows, fraction):
        seen.append(1)
        value = step(self, rows, fraction)
        return value * math.nan if len(seen) == at else value

    monkeypatch.setattr(Truncated, "step", broken)
    monkeypatch.setattr("hesskern.pacbayes.loop.on_host", lambda value: False)
    monkeypatch.setattr("hesskern.pacbayes.loop._UNSEEN", 3)
    with pytest.raises(ValueError, match=rf"objective is not finite in epoch 1, step {at}:"):
        run(blobs(), epochs=2, settings=replace(FAST, batch_size=30))


def test_an_objective_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match=r"objective is not finite in epoch 1, step"):
        run(settings=TruncatedSettings(batch_size=50, rate_ratio=1e6), epochs=20)


def loader(**options):
    data = blobs(30)
    return DataLoader(TensorDataset(data.inputs, data.targets), batch_size=8, **options)


def test_every_sample_is_counted_once():
    assert run(loader(shuffle=True)).n == 30
    assert run(loader(), n=30).n == 30
    data = blobs(30)
    cases = {
        "drop_last leaves 6 of 30": loader(drop_last=True),
        "RandomSampler draws": loader(sampler=RandomSampler(data.targets, replacement=True)),
        "WeightedRandomSampler draws": loader(sampler=WeightedRandomSampler([1.0] * 30, 30)),
        "yields 20 samples, its data set holds 30": loader(sampler=list(range(20))),
    }
    for match, source in cases.items():
        with pytest.raises(ValueError, match=match):
            run(source)
    with pytest.raises(ValueError, match="n is 60000, but the data hold 30"):
        run(loader(), n=60_000)


def test_samples_a_prior_has_seen_are_not_counted_again():
    seen, rest = blobs(60).split(0.5, seed=0)
    found = run(rest, prior_data=seen)
    assert (found.n, found.prior["samples seen"]) == (30, 30)
    assert found.prior["fingerprint seen"] == seen.fingerprint() != found.fingerprint
    with pytest.raises(ValueError, match="30 of its samples are among the data"):
        run(blobs(60), prior_data=seen)
    with pytest.raises(ValueError, match="share must leave at least 8 of 60"):
        blobs(60).split(0.05, seed=0)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "best"}, ValueError, "method must be 'truncated', 'base', .* or 'iter_m'"),
        ({"start": "else"}, ValueError, "start must be"),
        ({"settings": PublishedSettings()}, TypeError, "must be TruncatedSettings"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"minutes": 1.0}, ValueError, "either epochs or minutes"),
        ({"epochs": None, "minutes": -1.0}, ValueError, "minutes must be positive"),
        ({"prior_record": {"seed": 1}}, ValueError, "'construction' is missing"),
        ({"data": 3}, TypeError, "data must be an iterable"),
        ({"data": [3]}, TypeError, "batch 0 must be a pair"),
        ({"data": iter(())}, ValueError, "data is empty"),
        ({"data": blobs(7)}, ValueError, "at least 8 samples"),
    ],
)
def test_wrong_arguments_are_named(options, error, match):
    with pytest.raises(error, match=match):
        run(**options)


def test_published_methods_start_from_the_model():
    with pytest.raises(ValueError, match="starts from the model's weights"):
        run(method="iter", start="prior", settings=None)
    data = blobs()
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(12, 10))
    with pytest.raises(NotImplementedError, match="iter_m needs a chain of Linear"):
        certify(model, model, data, "iter_m", epochs=1, protocol=SHARED)


def test_bad_samples_and_models_are_named():
    data = blobs(20)
    bad = data.inputs.clone()
    bad[3, 0, 0, 0] = math.nan
    cases = [
        (Samples(bad, data.targets), "inputs must be finite"),
        (Samples(data.inputs, data.targets + 1), r"targets must lie in 0\.\.9, got 1\.\.10"),
        (Samples(data.inputs, data.targets.float()), "targets must be integer"),
    ]
    for samples, match in cases:
        with pytest.raises(ValueError, match=match):
            run(samples)
    with pytest.raises(TypeError, match="prior must be a module or a state dict"):
        certify(built(), 3, data)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        certify(3, built(), data)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Protocol(delta=0.0),
        lambda: Protocol(delta_draws=1.0),
        lambda: Protocol(form="other"),
        lambda: Protocol(sampling="other"),
        lambda: Protocol(passes=0),
        lambda: Protocol(group=0),
        lambda: TruncatedSettings(rank_in=0),
        lambda: TruncatedSettings(rate_mean=0.0),
        lambda: PublishedSettings(rate=-1.0),
        lambda: PublishedSettings(batch_size=0),
    ],
)
def test_settings_out_of_range_are_refused(call):
    with pytest.raises(ValueError, match="must"):
        call()


def test_a_budget_of_minutes_is_kept():
    found = run(epochs=None, minutes=0.01)
    assert found.seconds["optimization"] < 5
    assert found.settings["minutes"] == 0.01
    assert not found.interrupted


def test_binary_networks_have_one_output():
    data = blobs()
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 1))
    samples = Samples(data.inputs, (data.targets >= 5).long())
    found = certify(model, model, samples, epochs=2, protocol=TERMS, settings=FAST)
    found.verify(samples)
    with pytest.raises(ValueError, match=r"targets must lie in 0\.\.1"):
        certify(model, model, data, epochs=2, protocol=TERMS, settings=FAST)


def test_the_last_part_of_the_budget_is_averaged():
    optimizer = truncated(blobs(40), averaged=0.5)
    seen = []
    for step in range(8):
        optimizer.step(torch.arange(40), step / 8)
        if step >= 4:
            seen.append([p.detach().clone() for p in optimizer._layers["fc2"].parameters()])
    u, log_ratio, log_prior = (torch.stack(column).mean(0) for column in zip(*seen, strict=True))
    draft = optimizer.drafts()["fc2"]
    layer = optimizer._layers["fc2"]
    assert draft.prior_variance == pytest.approx(float(log_prior.exp()), rel=1e-5)
    mean = layer.prior_mean + (0.5 * log_prior).exp() * u
    torch.testing.assert_close(draft.mean, mean, rtol=1e-4, atol=1e-6)
    ratio = (draft.variance / draft.prior_variance)[1, 0]
    torch.testing.assert_close(float(ratio), float(log_ratio[1, 0].exp()), rtol=1e-4, atol=0)
    # The optimization itself goes on from where it was.
    assert torch.equal(layer.u.detach(), seen[-1][0])


@pytest.mark.parametrize(("seed", "weight"), [(1, 1e-5), (2, 1e-7), (3, 1e-5), (3, 1e-7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_posterior_that_equals_its_prior_is_certified(seed, weight, dtype):
    """In float32 these four once ended below zero: "kl_divergence must be non-negative"."""
    model, data = NET.build((1, 3, 4), seed).to(dtype), blobs(200)
    slow = replace(FAST, rate_mean=1e-12, rate_ratio=1e-12, rate_prior=1e-12)
    settings = replace(slow, error_weight=weight, warm_up=1.0)
    samples = Samples(data.inputs.to(dtype), data.targets)
    found = certify(model, model, samples, epochs=4, protocol=TERMS, settings=settings)
    assert 0 < found.kl < 1e-8
    assert all(0 < entry["kl"] < 1e-8 for entry in found.history)
    assert found.history[-1]["kl"] == pytest.approx(found.kl, rel=1e-3)

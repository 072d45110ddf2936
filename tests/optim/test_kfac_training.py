"""Training with KFAC: fewer steps, resuming bit by bit, scaled losses, narrow models."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import CE, Routed, classes, generator, randn, routed_data, seeded
from torch import Tensor, nn

import hesskern as hk


def trained(optimizer: Any, model: nn.Module, steps: int, x: Tensor, y: Tensor, kfac: Any) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        if kfac is not None:
            kfac.step(x, y)
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(x), y))


def regression() -> tuple[Tensor, Tensor]:
    """Inputs whose second moments span four orders, and targets of a linear map, with a bias."""
    x = randn(200, 6) * torch.logspace(0, -2, 6, dtype=torch.float64)
    y = x @ randn(6, 3, seed=1) * 10 + randn(3, seed=2)
    return x, y


def test_ill_conditioned_regression_takes_a_tenth_of_the_steps() -> None:
    # The loss is quadratic and its Hessian a Kronecker product: this is Newton's method.
    x, y = regression()
    model = seeded(nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    kfac = hk.optim.KFAC(
        model, optimizer, nn.MSELoss(), output="exact", damping=1e-12, kl_clip=None
    )
    reached = trained(optimizer, model, 10, x, y, kfac)
    assert reached < 1e-9
    # The largest step that is stable, as the Hessian's largest eigenvalue has it.
    ones = torch.cat([x, x.new_ones(len(x), 1)], 1)
    largest = float(torch.linalg.eigvalsh(2 / 3 * ones.T @ ones / len(x))[-1])
    for momentum in (0.0, 0.9):
        plain = seeded(nn.Linear(6, 3))
        best = torch.optim.SGD(plain.parameters(), lr=1.9 / largest, momentum=momentum)
        assert trained(best, plain, 100, x, y, None) > 1e3 * reached


def network() -> nn.Module:
    model = seeded(
        nn.Sequential(
            nn.Conv2d(1, 3, 3, groups=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
            nn.Linear(48, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3),
        )
    )  # fmt: skip
    return model.float()


class Run:
    """A model, its optimizer with a schedule and KFAC, over batches that are known by number."""

    def __init__(self) -> None:
        self.model = network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 10, 0.5)
        self.kfac = hk.optim.KFAC(
            self.model, self.optimizer, CE, damping=0.01, inverse_every=4, factor_every=2
        )

    def go(self, begin: int, end: int) -> None:
        for i in range(begin, end):
            x = randn(8, 1, 6, 6, seed=i, dtype=torch.float32)
            y = classes(8, c=3, seed=i)
            torch.manual_seed(i)
            self.optimizer.zero_grad()
            CE(self.model(x), y).backward()
            self.kfac.step(x, y)
            self.optimizer.step()
            self.schedule.step()
            if i == 20:
                self.kfac.damping = 0.02

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "kfac": self.kfac,
        }

    def save(self, path: Path) -> None:
        torch.save({name: part.state_dict() for name, part in self.parts.items()}, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def test_resumes_bit_by_bit_in_another_process(tmp_path: Path) -> None:
    whole = Run()
    whole.go(0, 15)
    whole.save(tmp_path / "middle.pt")
    whole.go(15, 30)
    whole.save(tmp_path / "end.pt")
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}\n"
        "from test_kfac_training import Run\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "run = Run(); run.load(folder / 'middle.pt'); run.go(15, 30); run.save(folder / 'again.pt')"
    )
    threads = torch.get_num_threads()
    assert threads >= 1
    subprocess.run(
        [sys.executable, "-c", code.replace("(1)", f"({threads})")], check=True, timeout=120
    )
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert same(end, again)
    # The middle is not the end: nothing above is true of any two states.
    assert not same(end, torch.load(tmp_path / "middle.pt", weights_only=True))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_the_seed_decides_the_draws() -> None:
    def gradients(seed: int) -> Tensor:
        model = seeded(nn.Linear(4, 3))
        x, y = randn(8, 4), classes(8, c=3)
        CE(model(x), y).backward()
        hk.optim.KFAC(model, torch.optim.SGD(model.parameters()), CE, seed=seed).step(x, y)
        return model.weight.grad

    assert torch.equal(gradients(3), gradients(3))
    assert not torch.equal(gradients(3), gradients(4))


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
def test_every_output_trains(output: Any) -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))).float()
    x = randn(64, 4, dtype=torch.float32)
    y = (x @ randn(4, 3, seed=5, dtype=torch.float32)).argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kfac = hk.optim.KFAC(model, optimizer, CE, output=output, damping=1e-2, kl_clip=1e-2)
    first = float(CE(model(x), y).detach())
    for _ in range(40):
        optimizer.zero_grad()
        CE(model(x), y).backward()
        kfac.step(x, y)
        optimizer.step()
    assert float(CE(model(x), y).detach()) < 0.2 * first


def test_a_scaled_loss_is_unscaled_before_and_a_step_with_inf_is_left_out() -> None:
    x, y = randn(8, 4, dtype=torch.float32), classes(8, c=3)
    plain, scaled = (seeded(nn.Linear(4, 3)).float() for _ in range(2))
    for model in (plain, scaled):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kfac = hk.optim.KFAC(model, optimizer, CE)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=model is scaled)
        scaler.scale(CE(model(x), y)).backward()
        scaler.unscale_(optimizer)
        kfac.step(x, y)
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(plain.weight, scaled.weight)
    before = scaled.weight.detach().clone()
    optimizer.zero_grad()
    scaler.scale(CE(scaled(x), y)).backward()
    scaled.weight.grad[0, 0] = float("inf")
    scaler.unscale_(optimizer)
    kfac.step(x, y)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(scaled.weight, before)
    assert scaler.get_scale() == 128.0
    # The factors are as good as before.
    optimizer.zero_grad()
    CE(scaled(x), y).backward()
    kfac.step(x, y)
    assert bool(scaled.weight.grad.isfinite().all())


def test_bfloat16_gradients_keep_their_dtype() -> None:
    x, y = randn(8, 4, dtype=torch.float32), classes(8, c=3)
    wide, narrow = seeded(nn.Linear(4, 3)).float(), seeded(nn.Linear(4, 3)).bfloat16()
    wide.load_state_dict({k: v.float() for k, v in narrow.state_dict().items()})
    for model in (wide, narrow):
        inputs = x.to(model.weight.dtype)
        CE(model(inputs), y).backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        hk.optim.KFAC(model, optimizer, CE, output="exact", damping=0.1).step(inputs, y)
    assert narrow.weight.grad.dtype == torch.bfloat16
    difference = narrow.weight.grad.float() - wide.weight.grad
    assert float(difference.norm() / wide.weight.grad.norm()) < 0.03


class Decoder(nn.Module):
    """Takes a dict with the labels in it, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return {"logits": self.head(torch.tanh(self.body(self.embed(input_ids))))}


def test_a_tied_head_keeps_its_gradient() -> None:
    model = seeded(Decoder())
    batch = {"input_ids": torch.randint(0, 7, (3, 5), generator=generator(0))}
    batch["labels"] = batch["input_ids"]
    logits = model(**batch)["logits"]
    F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    tied, body = model.head.weight.grad.clone(), model.body.weight.grad.clone()
    kfac = hk.optim.KFAC(model, torch.optim.SGD(model.parameters()), hk.CausalLM())
    kfac.step(batch)
    assert torch.equal(model.head.weight.grad, tied)
    assert not torch.equal(model.body.weight.grad, body)
    assert "looks rows of it up" in kfac.skipped["head"]


@pytest.mark.filterwarnings("ignore:left out")
def test_an_expert_that_is_reached_late_is_preconditioned_at_once() -> None:
    model = seeded(Routed())
    negative, positive, _ = routed_data()
    kfac = hk.optim.KFAC(model, torch.optim.SGD(model.parameters()), CE, kl_clip=None)
    made = []
    for step in range(8):
        x, y = positive if step == 5 else negative
        model.zero_grad()
        CE(model(x), y).backward()
        plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        kfac.step(x, y)
        for name, gradient in plain.items():
            assert not torch.equal(model.get_parameter(name).grad, gradient), (step, name)
        made.append(kfac.state_dict()["inverses"]["stem"][0])
    assert kfac.layers == ("stem", "positive", "negative")
    assert "unused" in kfac.skipped
    # Inverses are made then, and not again before their time.
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(made)]
    assert changed == [True, True, False, False, True, False, False]


@pytest.mark.parametrize("change", ["layers", "settings", "missing", "format"])
def test_states_of_something_else_are_refused(change: str) -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    x, y = randn(6, 4), classes(6, c=3)
    kfac = hk.optim.KFAC(model, torch.optim.SGD(model.parameters()), CE)
    CE(model(x), y).backward()
    kfac.step(x, y)
    state = kfac.state_dict()
    if change == "layers":
        model = seeded(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    elif change == "missing":
        del state["inverses"]
    elif change == "format":
        state["format"] = 99
    settings = {"decay": 0.5} if change == "settings" else {}
    other = hk.optim.KFAC(model, torch.optim.SGD(model.parameters()), CE, **settings)
    before = other.state_dict()
    match = {
        "layers": r"layer '0' with \(m, d\) = \(5, 5\), here it is \(6, 5\)",
        "settings": "state was made with settings",
        "missing": "it lacks inverses",
        "format": "state has format 99",
    }
    with pytest.raises(ValueError, match=match[change]):
        other.load_state_dict(state)
    assert same(other.state_dict(), before)

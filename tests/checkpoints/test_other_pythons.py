"""Functions that a checkpoint belongs to, read as source, which another Python reads alike."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CE, Attention, classes, randn, seeded
from resumed import bits, broken_off
from torch import Tensor, nn

import hesskern as hk
from hesskern.checkpoints import facts
from hesskern.digests import BYTECODE, digest, marked_digest, module_facts

SOURCE = """
import functools
LIMIT = -1.0

def marked(function):
    return function

def mask(inputs, *, limit=LIMIT):
    kept = inputs[..., 0] > limit
    return kept.float() if limit else None

@marked
@functools.lru_cache
def other(inputs): return [x for x in inputs if (lambda y: y > LIMIT)(x)]
"""
numbers = itertools.count()


def module(folder: Path, source: str = SOURCE) -> Any:
    path = folder / f"module{next(numbers)}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("of_the_user", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def told(function: Any) -> str:
    return marked_digest(function)


def test_layout_and_comments_do_not_count(tmp_path: Path) -> None:
    written = SOURCE.replace("    kept", "\n    # What is there.\n    kept").replace(
        "inputs[..., 0] > limit", "(inputs[ ..., 0 ]\n            > limit)"
    )
    one, other = module(tmp_path), module(tmp_path, "# A word.\n\n" + written)
    assert told(one.mask) == told(other.mask)
    assert told(one.other.__wrapped__) == told(other.other.__wrapped__)
    assert BYTECODE not in told(one.mask)
    assert BYTECODE not in told(one.other.__wrapped__)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("inputs[..., 0] > limit", "inputs[..., 0] < limit"),
        ("inputs[..., 0]", "inputs[..., 1]"),
        ("limit=LIMIT", "limit=0.5"),
        ("LIMIT = -1.0", "LIMIT = -2.0"),
        ("if limit else None", "if not limit else None"),
        ("kept.float()", "kept.double()"),
    ],
)
def test_what_it_computes_does(before: str, after: str, tmp_path: Path) -> None:
    assert before in SOURCE
    changed = module(tmp_path, SOURCE.replace(before, after))
    assert told(changed.mask) != told(module(tmp_path).mask)


def test_a_file_that_was_changed_behind_its_import(tmp_path: Path) -> None:
    found = module(tmp_path)
    before = told(found.mask)
    path = Path(found.__file__)
    path.write_text(SOURCE.replace("> limit", "< limit") + "\n# Longer.\n")
    # What runs is still the old code.
    assert told(found.mask) not in (before, told(module(tmp_path, path.read_text()).mask))
    assert told(found.mask).endswith(BYTECODE)
    path.unlink()
    assert told(found.mask).endswith(BYTECODE)


def without_file(source: str, name: str) -> Callable[..., Any]:
    names: dict[str, Any] = {"__name__": "nowhere"}
    exec(source, names)
    found: Callable[..., Any] = names[name]
    return found


def test_code_without_a_file() -> None:
    one, other = (without_file(f"def f(x): return x[..., 0] > {limit}", "f") for limit in (0, 1))
    assert told(one).endswith(BYTECODE)
    assert digest(one) != digest(other)
    # However deep it lies.
    assert told({"a": [partial(one, 3)]}).endswith(BYTECODE)
    assert told({frozenset([one])}).endswith(BYTECODE)
    # Two on one line cannot be told apart by it.
    first, second = [lambda x: x, lambda x: x + 1]  # fmt: skip
    assert told(first) != told(second)


def test_forwards_of_models(tmp_path: Path) -> None:
    source = "from torch import nn\nclass Net(nn.Linear):\n    def forward(self, x): return {}\n"
    nets = [module(tmp_path, source.format(what)).Net for what in ("x", "( x )", "-x")]
    same, also, other = (module_facts(net(2, 2))[""] for net in nets)
    assert same == also != other
    assert BYTECODE not in same[0]


def kept(inputs: Tensor) -> Tensor:
    return (inputs[..., 0] > -1).float()


NOWHERE = "def kept(x): return (x[..., 0] > {}).float()"


def call(mask: Any, net: nn.Module | None = None, **how: Any) -> hk.Factors:
    data = [(randn(3, 4, 4, seed=i, dtype=torch.float32), classes(3, c=3)) for i in range(4)]
    model = seeded(Attention()).float() if net is None else net
    return hk.kronecker_factors(model, data, CE, position_mask=mask, **how)


@pytest.fixture
def another_python(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes what follows another version's."""

    def become() -> None:
        told = facts.environment
        monkeypatch.setattr(
            "hesskern.checkpoints.checkpoint.environment",
            lambda device: {**told(device), "python": "3.99"},
        )

    return become


def test_it_goes_on_under_another_python(
    another_python: Callable[[], None], tmp_path: Path
) -> None:
    path = tmp_path / "pass.checkpoint"
    whole = bits(call(kept), tmp_path)
    broken_off(partial(call, kept), path, 2)
    another_python()
    with pytest.raises(ValueError, match=r"written elsewhere.*python is '3\.\d+' there and '3.99'"):
        call(kept, checkpoint=path)
    with pytest.raises(ValueError, match="of another call: position_mask is"):
        call(lambda x: kept(x), checkpoint=path, exact_resume=False)
    with pytest.warns(UserWarning, match="python is .* there and '3.99' here") as warned:
        found = call(kept, checkpoint=path, exact_resume=False)
    assert "cannot be compared" not in str(warned[0].message)
    assert bits(found, tmp_path) == whole


def test_what_cannot_be_compared_is_named(
    another_python: Callable[[], None], tmp_path: Path
) -> None:
    path = tmp_path / "pass.checkpoint"
    broken_off(partial(call, without_file(NOWHERE.format(-1), "kept")), path, 2)
    # Under the same version bytecode tells.
    other = without_file(NOWHERE.format(-2), "kept")
    with pytest.raises(ValueError, match="of another call: position_mask is"):
        call(other, checkpoint=path, exact_resume=False)
    another_python()
    with pytest.raises(ValueError, match=r"written elsewhere.*python is"):
        call(other, checkpoint=path)
    with pytest.raises(ValueError, match=r"of another call: output is"):
        call(other, checkpoint=path, output="mc", exact_resume=False)
    with pytest.raises(ValueError, match=r"of another call: position_mask is"):
        call(None, checkpoint=path, exact_resume=False)
    with pytest.warns(
        UserWarning, match=r"'3.99' here; the functions of position_mask cannot be compar"
    ):
        call(other, checkpoint=path, exact_resume=False)


def test_models_whose_forward_cannot_be_compared(
    another_python: Callable[[], None], tmp_path: Path
) -> None:
    path = tmp_path / "pass.checkpoint"

    def net(words: str) -> nn.Module:
        kind = type("Net", (Attention,), {"forward": without_file(words, "forward")})
        kind.__module__ = "of_the_user"
        return seeded(kind()).float()

    source = "def forward(self, x): return (self.q(x) + self.k(x) + self.v(x)).mean(1){}"
    plain, other = net(source.format("")), net(source.format(" * 2"))
    broken_off(partial(call, None, plain), path, 2)
    with pytest.raises(ValueError, match=r"of another model: 'the model' is .*forward"):
        call(None, other, checkpoint=path, exact_resume=False)
    another_python()
    with pytest.warns(UserWarning, match=r"python is .* here; the functions of the model cannot"):
        call(None, other, checkpoint=path, exact_resume=False)

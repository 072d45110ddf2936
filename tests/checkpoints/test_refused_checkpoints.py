"""Files that a pass does not go on from, and files that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CE, Attention, Between, classes, randn, seeded
from resumed import bits, broken_off
from torch import Tensor, nn

import hesskern as hk
from hesskern.checkpoints import facts, file
from hesskern.tensor_files import TensorFormat


def model(seed: int = 0, **shape: int) -> nn.Module:
    return seeded(Between(torch.relu, **shape), seed).float()


def batches(seed: int = 0, count: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [
        (randn(3, 4, seed=10 * seed + i, dtype=torch.float32), classes(3, c=3, seed=i))
        for i in range(count)
    ]


def call(net: nn.Module | None = None, data: Any = None, loss: Any = CE, **how: Any) -> hk.Factors:
    return hk.kronecker_factors(
        model() if net is None else net, batches() if data is None else data, loss, **how
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint behind three batches."""
    path = tmp_path / "pass.checkpoint"
    broken_off(call, path, 3)
    return path


def swapped(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        net.b.bias[0] += 1e-3
    return net


def activated(activation: nn.Module) -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 3))).float()


def otherwise(net: nn.Module) -> nn.Module:
    """The same weights under another ``forward``."""

    class Between(type(net)):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    net.__class__ = Between
    return net


OTHERS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "weights": (lambda: {"net": swapped(model())}, "of another model: 'b.bias' has other values"),
    "shape": (lambda: {"net": model(hidden=7)}, "of another call: geometry is"),
    "dtype": (lambda: {"net": model().double()}, "of another model: 'a.weight' is "),
    "forward": (
        lambda: {"net": otherwise(model())},
        "of another model: 'the model' is .* with forward",
    ),
    "output": (lambda: {"output": "mc"}, "of another call: output is 'exact' there and 'mc' here"),
    "seed": (lambda: {"seed": 1}, "seed is 0 there and 1 here"),
    "layers": (lambda: {"layers": "a"}, r"layers is \['a', 'b'\] there and \['a'\] here"),
    "loss": (lambda: {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss is 'CrossEntropy"),
    "weights of samples": (lambda: {"sample_weight": torch.ones(15)}, "sample_weight is None"),
    "first batch": (lambda: {"data": batches(1)}, "other data: batch 0 is another one"),
    "third batch": (
        lambda: {"data": [*batches()[:2], *batches(1)[2:]]},
        "other data: batch 2 is another one",
    ),
    "fewer": (lambda: {"data": iter(batches()[:2])}, "there are 2 of the 3 batches that were seen"),
    "more": (lambda: {"data": batches(count=6)}, "there were 5 batches of them, and are 6"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_of_something_else(other: str, path: Path, tmp_path: Path) -> None:
    how, message = OTHERS[other]
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"^checkpoint: '{path}' (is|belongs to).*{message}"):
        call(checkpoint=path, **how())
    assert path.read_bytes() == before
    # Nothing is lost: the call that it belongs to goes on.
    assert bits(call(checkpoint=path), tmp_path) == bits(call(), tmp_path)


@pytest.mark.parametrize(
    "other", [nn.Tanh(), nn.LeakyReLU(0.2)], ids=["activation", "its settings"]
)
def test_of_another_activation(other: nn.Module, tmp_path: Path) -> None:
    path, first = tmp_path / "pass.checkpoint", activated(nn.LeakyReLU(0.1))
    broken_off(partial(call, first), path, 3)
    with pytest.raises(ValueError, match=r"of another model: 'module 1' is .*LeakyReLU"):
        call(activated(other), checkpoint=path)


def kept(inputs: Tensor, limit: float) -> Tensor:
    return (inputs[..., 0] > limit).float()


def test_of_another_mask_of_arguments(tmp_path: Path) -> None:
    path, net = tmp_path / "pass.checkpoint", seeded(Attention()).float()
    data = [(randn(3, 4, 4, seed=i, dtype=torch.float32), classes(3, c=3)) for i in range(3)]
    given = [partial(kept, limit=limit) for limit in (-1.0, -0.5)]
    broken_off(partial(call, net, data, position_mask=given[0]), path, 2)
    with pytest.raises(ValueError, match="of another call: position_mask is"):
        call(net, data, position_mask=given[1], checkpoint=path)


def test_under_autocast(path: Path) -> None:
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"autocast is None there and 'torch.bfloat16' here"),
    ):
        call(checkpoint=path)


def test_data_that_end_too_early(tmp_path: Path) -> None:
    path = tmp_path / "pass.checkpoint"
    net = model()
    broken_off(lambda **how: hk.kronecker_factors(net, iter(batches()), CE, **how), path, 3)
    with pytest.raises(ValueError, match="there are 2 of the 3 batches that were seen"):
        hk.kronecker_factors(net, iter(batches()[:2]), CE, checkpoint=path)


def test_other_targets(tmp_path: Path) -> None:
    path = tmp_path / "pass.checkpoint"
    net, data = model(), batches()
    broken_off(lambda **how: hk.kronecker_factors(net, data, CE, **how), path, 3)
    other = [(x, (y + 1) % 3) for x, y in data]
    with pytest.raises(ValueError, match="batch 0 is another one"):
        hk.kronecker_factors(net, other, CE, checkpoint=path)


def test_torn(path: Path) -> None:
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"checkpoint: '{path}' is not a readable checkpoint"):
            call(checkpoint=path)


def test_other_bits(path: Path) -> None:
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for place in (8 + length, len(whole) - 1, 8 + length + (len(whole) - length) // 2):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"checkpoint: '{path}' is damaged: tensor '"):
            call(checkpoint=path)
    header = json.loads(whole[8 : 8 + length])
    text = header["__metadata__"]["hesskern"]
    assert '"seed": 0' in text
    header["__metadata__"]["hesskern"] = text.replace('"seed": 0', '"seed": 1')
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + whole[8 + length :])
    with pytest.raises(ValueError, match="is damaged: its header is not what was written"):
        call(checkpoint=path, seed=1)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "pass.checkpoint"
    path.write_text("my notes")
    with pytest.raises(ValueError, match=f"'{path}' is not a readable checkpoint"):
        call(checkpoint=path)
    assert path.read_text() == "my notes"
    call().save(path)
    with pytest.raises(ValueError, match="does not hold a checkpoint of a pass, but is of format"):
        call(checkpoint=path)
    TensorFormat("hesskern.checkpoint/99", "", "").write(path, {}, {})
    with pytest.raises(ValueError, match="was written by a newer version of hesskern"):
        call(checkpoint=path)


def test_another_environment(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bits(call(), tmp_path)
    monkeypatch.setattr(facts, "__version__", "0.0.1")
    message = f"'{path}' was written elsewhere.*hesskern is '.*' there and '0.0.1' here"
    with pytest.raises(ValueError, match=message + ".*exact_resume=False"):
        call(checkpoint=path)
    with pytest.warns(UserWarning, match=message) as warned:
        found = call(checkpoint=path, exact_resume=False)
    assert warned[0].filename == __file__
    # Nothing but the name of the version was another one.
    assert bits(found, tmp_path) == whole


def test_other_threads(path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(ValueError, match=f"threads is {threads} there and {threads + 1} here"):
            call(checkpoint=path)
    finally:
        torch.set_num_threads(threads)


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no path": ({"checkpoint": 3}, TypeError, "checkpoint must be the path of a file, got int"),
    "no folder": ({"checkpoint": "none/a"}, FileNotFoundError, "checkpoint: there is no folder"),
    "a folder": ({"checkpoint": "."}, ValueError, "must be the path of a file, .* is a folder"),
    "no number": ({"checkpoint_every": "1"}, TypeError, "checkpoint_every must be a number"),
    "negative": ({"checkpoint_every": -1}, ValueError, "must be at least 0 and finite, got -1"),
    "infinite": ({"checkpoint_every": float("inf")}, ValueError, "must be at least 0 and finite"),
    "no bool": ({"exact_resume": 1}, TypeError, "exact_resume must be True or False, got 1"),
}


@pytest.mark.parametrize("given", ARGUMENTS)
def test_arguments(given: str, here: Path) -> None:
    how, error, message = ARGUMENTS[given]
    with pytest.raises(error, match=message):
        call(**how)


def failing(error: BaseException, at: int) -> Callable[[int], None]:
    """In the place of ``os.fsync``: raises at its call of that number."""
    calls = [0]

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise error

    return fsync


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full disk", "ctrl-c"])
@pytest.mark.parametrize("first", [True, False])
def test_a_write_that_fails(
    error: BaseException, first: bool, path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if first:
        path.unlink()
    before = None if first else path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing(error, 1))
        with pytest.raises(type(error)) as raised:
            call(checkpoint=path, checkpoint_every=0)
    if isinstance(error, OSError):
        kept = "there is none yet" if first else "the one before is as it was"
        text = str(raised.value)
        assert text.startswith(f"checkpoint: '{path}' could not be written behind batch ")
        assert "No space left on device" in text
        assert kept in text
    # Nothing half-written, nothing beside it.
    assert (path.read_bytes() if path.exists() else None) == before
    assert list(tmp_path.iterdir()) == [path] * (not first)
    assert bits(call(checkpoint=path), tmp_path) == bits(call(), tmp_path)


def test_a_folder_that_takes_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def refused(*args: Any, **how: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    # Who runs as root is not stopped by permissions.
    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(ValueError, match=r"checkpoint: folder .* cannot be written: .*Read-only"):
        call(checkpoint=path)
    assert path.read_bytes() == before


def test_a_link_to_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    link, target = here / "pass.checkpoint", there / "kept"
    link.symlink_to(target)
    moved: list[tuple[Path, Path]] = []
    replace = os.replace

    def noted(source: Path, destination: Path) -> None:
        moved.append((Path(source).parent, Path(destination)))
        replace(source, destination)

    monkeypatch.setattr(os, "replace", noted)
    broken_off(call, link, 3)
    # A file is renamed within one file system: beside the link's target, not beside the link.
    assert set(moved) == {(there, target)}
    assert link.is_symlink()
    assert target.is_file()
    assert bits(call(checkpoint=link), tmp_path) == bits(call(), tmp_path)
    assert not target.exists()


def test_what_a_killed_process_left_is_removed(path: Path) -> None:
    # No process has a number beyond the largest there is.
    nobody = 2**22 + 1
    abandoned = {f".{path.name}.{nobody}.tmp", f".{path.name}.part3.{nobody}.tmp"}
    others = {f".other.{nobody}.tmp", f".{path.name}.other.{nobody}.tmp"}
    # This one is at work.
    others.add(f".{path.name}.{os.getppid()}.tmp")
    for name in abandoned | others:
        (path.parent / name).write_bytes(b"half")
    call(checkpoint=path)
    assert {found.name for found in path.parent.iterdir()} == others


def test_written_and_read(tmp_path: Path) -> None:
    numbers = torch.arange(6).view(2, 3)
    tensors = {"empty": torch.zeros(0, 4), "scalar": torch.tensor(True), "turned": numbers.T}
    for dtype in (torch.uint8, torch.int32, torch.bfloat16, torch.float16, torch.float64):
        tensors[str(dtype)] = numbers.to(dtype)
    file.write(tmp_path / "a", tensors, {"call": "x"})
    header, found = file.read(tmp_path / "a")
    assert header == {"call": "x"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with pytest.raises(ValueError, match=r"'c' is of torch.complex64, which files do not hold"):
        file.write(tmp_path / "a", {"c": torch.zeros(1, dtype=torch.complex64)}, {})
    assert file.read(tmp_path / "a")[0] == {"call": "x"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_model_is_handed_back_as_it_came(path: Path) -> None:
    net = model()
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    broken_off(partial(call, net), path, 5)
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_precisions_that_were_set_by_backend_and_operation() -> None:
    """torch refuses to name a single one; a checkpoint tells all of them apart."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    plain = facts.cudnn_settings(), facts.matmul_precision()
    try:
        conv.fp32_precision, matmul.fp32_precision = "ieee", "tf32"
        assert facts.cudnn_settings() != plain[0]
        assert facts.matmul_precision() != plain[1]
    finally:
        conv.fp32_precision, matmul.fp32_precision = before
    assert (facts.cudnn_settings(), facts.matmul_precision()) == plain

"""Safetensors files with a header."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CE, Between, classes, randn, seeded

import hesskern as hk
from hesskern.tensor_files import TensorFormat, savable

KIND = TensorFormat("test/1", "test things", "file of tests")


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path, square = tmp_path / "a.safetensors", torch.arange(6.0).view(2, 3)
    tensors = {"a": square, "b": square.T, "c": square[1]}
    KIND.write(path, tensors, {"n": 3, "names": ["x"]})
    assert path.read_bytes() == KIND.packed(tensors, {"n": 3, "names": ["x"]})
    with KIND.opened(path) as file:
        assert file.header == {"n": 3, "names": ["x"]}
        assert sorted(file.names) == ["a", "b", "c"]
        for name, tensor in tensors.items():
            assert torch.equal(file.tensor(name), tensor)


def test_memory_is_copied_only_where_it_is_shared() -> None:
    own, shared = torch.ones(3, requires_grad=True), torch.ones(4)
    found = savable({"own": own, "first": shared, "second": shared[:2]})
    assert found["own"].data_ptr() == own.data_ptr()
    assert not found["own"].requires_grad
    assert found["first"].data_ptr() == shared.data_ptr() != found["second"].data_ptr()


def test_other_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with (
        pytest.raises(FileNotFoundError, match=r"path: there is no file .*a\.safetensors"),
        KIND.opened(path),
    ):
        pass
    TensorFormat("other/2", "", "").write(path, {}, {})
    with pytest.raises(ValueError, match="does not hold test things"), KIND.opened(path):
        pass
    TensorFormat("test/2", "", "").write(path, {}, {})
    with pytest.raises(ValueError, match="by a newer version of hesskern"), KIND.opened(path):
        pass
    KIND.write(path, {}, {})
    with (
        pytest.raises(ValueError, match=r"not a readable file of tests .*nothing"),
        KIND.opened(path) as file,
    ):
        file.tensor("nothing")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        KIND.write(tmp_path / "none" / "a.safetensors", {}, {})


def _data() -> list[Any]:
    return [(randn(5, 4, seed=i), classes(5, c=3, seed=i)) for i in range(2)]


def _model() -> Any:
    return seeded(Between(torch.relu))


RESULTS: dict[str, tuple[Callable[[], Any], Callable[[Path], Any]]] = {
    "factors": (
        lambda: hk.kronecker_factors(_model(), _data(), CE, diagonal=True),
        hk.load_factors,
    ),
    "ekfac": (lambda: hk.ekfac(_model(), _data(), CE), hk.load_ekfac),
    "inputs": (
        lambda: hk.input_covariances(_model(), [x for x, _ in _data()]),
        hk.load_input_covariances,
    ),
    "influence": (
        lambda: hk.influence(None, _model(), _data(), _data(), CE),
        hk.load_influence,
    ),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_any_other_bit_is_noticed(kind: str, tmp_path: Path) -> None:
    make, load = RESULTS[kind]
    path = tmp_path / "result.safetensors"
    found = make()
    found.save(path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for place in range(8 + length, len(whole), 17):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"path: '{path}' is damaged: tensor '.*' holds other"):
            load(path)
    path.write_bytes(whole)
    again = tmp_path / "again.safetensors"
    load(path).save(again)
    assert again.read_bytes() == whole


def _header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the file's header."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    own = json.loads(header["__metadata__"]["hesskern"])
    change(own)
    header["__metadata__"]["hesskern"] = json.dumps(own)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])


def test_headers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    KIND.write(path, {"a": torch.ones(2)}, {"n": 3, "of": {"x": (1, 2)}})
    _header(path, lambda own: own.update(n=4))
    with pytest.raises(ValueError, match="is damaged: its header is not"), KIND.opened(path):
        pass

    def without(own: dict[str, Any]) -> None:
        # As earlier versions wrote them.
        del own["checksums"], own["header"]

    _header(path, without)
    with KIND.opened(path) as file:
        assert file.header == {"n": 4, "of": {"x": [1, 2]}}
        assert torch.equal(file.tensor("a"), torch.ones(2))


@pytest.mark.parametrize("key", ["checksums", "header"])
def test_a_header_that_has_lost_a_name(key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    KIND.write(path, {"a": torch.ones(2)}, {})

    def renamed(own: dict[str, Any]) -> None:
        own[f"{key[:-1]}~"] = own.pop(key)

    _header(path, renamed)
    with pytest.raises(ValueError, match="is damaged: its header is not"), KIND.opened(path):
        pass

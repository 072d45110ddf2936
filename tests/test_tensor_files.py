"""Safetensors files with a header."""

from pathlib import Path

import pytest
import torch

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

"""Readers of the data sets, on files made here; the real MNIST and CIFAR-10 where they are."""

import gzip
import lzma
import pickle
import struct

import numpy as np
import pytest
import torch

from hesskern.zoo import data


def idx(array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def digits_images():
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (7, 28, 28), np.uint8), np.arange(7, dtype=np.uint8)


def write_mnist(folder, images, labels, stem="train", zipped=True):
    folder.mkdir(parents=True, exist_ok=True)
    for part, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx(array)
        if zipped:
            (folder / f"{stem}-{part}-ubyte.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"{stem}-{part}-ubyte").write_bytes(content)


def test_digits_come_with_scikit_learn():
    train, test = data.load("digits"), data.load("digits", train=False)
    assert (len(train), len(test)) == (1437, 360)
    assert train.input_shape == (64,)
    assert train.inputs.dtype == torch.float32
    assert train.targets.dtype == torch.int64
    assert sorted(set(train.targets.tolist())) == list(range(10))
    # The constants are the training split's own.
    assert float(train.inputs.mean()) == pytest.approx(0, abs=2e-3)
    assert float(train.inputs.std()) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("subfolder", ["", "mnist", "MNIST/raw"])
def test_mnist_values_and_labels(tmp_path, digits_images, zipped, subfolder):
    images, labels = digits_images
    write_mnist(tmp_path / subfolder, images, labels, zipped=zipped)
    loaded = data.load("mnist", tmp_path)
    assert loaded.input_shape == (1, 28, 28)
    assert loaded.targets.tolist() == labels.tolist()
    expected = images[:, None] / 127.5 - 1
    np.testing.assert_allclose(loaded.inputs.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_mnist_splits_are_kept_apart(tmp_path, digits_images):
    images, labels = digits_images
    write_mnist(tmp_path, images, labels)
    write_mnist(tmp_path, images[:3], labels[:3], stem="t10k")
    assert len(data.load("mnist", tmp_path)) == 7
    assert len(data.load("mnist", tmp_path, train=False)) == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-10], "truncated or damaged.*promises"),
        (lambda raw: raw + b"x", "truncated or damaged"),
        (lambda raw: b"\0\0\x09\x03" + raw[4:], "no IDX file of unsigned bytes with 3 axes"),
        (lambda raw: raw[:6], "no IDX file"),
        (lambda raw: b"", "no IDX file"),
    ],
)
def test_damaged_idx_files(tmp_path, digits_images, damage, message):
    images, labels = digits_images
    write_mnist(tmp_path, images, labels)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(damage(idx(images))))
    with pytest.raises(ValueError, match=message):
        data.load("mnist", tmp_path)


def test_damaged_gzip(tmp_path, digits_images):
    write_mnist(tmp_path, *digits_images)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    for content in (path.read_bytes()[:-12], b"no gzip at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no readable gzip file"):
            data.load("mnist", tmp_path)


def test_mnist_counts_and_labels_must_fit(tmp_path, digits_images):
    images, labels = digits_images
    write_mnist(tmp_path, images, labels[:5])
    with pytest.raises(ValueError, match="7 MNIST images but 5 labels"):
        data.load("mnist", tmp_path)
    write_mnist(tmp_path, images, labels + 4)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.9"):
        data.load("mnist", tmp_path)


@pytest.fixture
def cifar_images():
    generator = np.random.default_rng(1)
    return generator.integers(0, 256, (6, 3, 32, 32), np.uint8), [0, 9, 3, 4, 5, 1]


def write_python_batch(path, images, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    # Protocol 2 without text, as python 2 wrote the official files.
    batch = {b"data": images.reshape(len(images), -1), b"labels": labels, b"batch_label": b"1"}
    path.write_bytes(pickle.dumps(batch, protocol=2))


def test_cifar10_python_batches(tmp_path, cifar_images):
    images, labels = cifar_images
    folder = tmp_path / "cifar-10-batches-py"
    write_python_batch(folder / "data_batch_1", images[:4], labels[:4])
    write_python_batch(folder / "data_batch_2", images[4:], labels[4:])
    write_python_batch(folder / "test_batch", images[:1], labels[:1])
    train = data.load("cifar10", tmp_path)
    assert train.targets.tolist() == labels
    mean = np.array([0.4914, 0.4822, 0.4465])[:, None, None]
    deviation = np.array([0.2470, 0.2435, 0.2616])[:, None, None]
    np.testing.assert_allclose(
        train.inputs.numpy(), (images / 255 - mean) / deviation, rtol=1e-4, atol=1e-5
    )
    assert "2 training batches" in train.source
    assert len(data.load("cifar10", tmp_path, train=False)) == 1


def python2_string(content):
    return b"T" + struct.pack("<i", len(content)) + content


def test_cifar10_batch_as_python_2_pickled_it(tmp_path, cifar_images):
    """The official files hold python 2's byte strings, which python 3 does not write any more."""
    images, labels = cifar_images
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K\x06M\x00\x0c\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + python2_string(images.tobytes())
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    entries = python2_string(b"data") + array + python2_string(b"labels") + numbers
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02}(" + entries + b"u.")
    read, read_labels = data._read_python_batch(tmp_path / "data_batch_1")
    np.testing.assert_array_equal(read, images)
    assert read_labels.tolist() == labels


class Payload:
    def __reduce__(self):
        return (print, ("code of a pickle ran",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({b"data": Payload(), b"labels": []}),
        b"no pickle",
        b"",
        pickle.dumps([1, 2]),
        pickle.dumps({b"data": np.zeros((2, 99), np.uint8), b"labels": [0, 1]}),
    ],
)
def test_damaged_and_malicious_python_batches(tmp_path, capsys, content):
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_1 is no readable CIFAR-10 python batch"):
        data.load("cifar10", tmp_path)
    assert capsys.readouterr().out == ""


def test_python_batch_with_wrong_number_of_labels(tmp_path, cifar_images):
    images, labels = cifar_images
    write_python_batch(tmp_path / "data_batch_1", images, labels[:2])
    with pytest.raises(ValueError, match="6 images but labels of shape"):
        data.load("cifar10", tmp_path)


def pack(images, labels):
    """The packed form, from its definition, one value at a time."""
    planes = images.astype(int).copy()
    planes[:, 0] -= images[:, 1]
    planes[:, 2] -= images[:, 1]
    planes %= 256
    residuals = np.zeros_like(planes)
    for row in range(32):
        for column in range(32):
            a = planes[:, :, row, column - 1] if column else None
            b = planes[:, :, row - 1, column] if row else None
            if a is not None and b is not None:
                c = planes[:, :, row - 1, column - 1]
                prediction = np.where(
                    c >= np.maximum(a, b),
                    np.minimum(a, b),
                    np.where(c <= np.minimum(a, b), np.maximum(a, b), a + b - c),
                )
            else:
                prediction = a if a is not None else b if b is not None else 0
            residuals[:, :, row, column] = (planes[:, :, row, column] - prediction) % 256
    body = residuals.transpose(1, 0, 2, 3).astype(np.uint8).tobytes()
    names = "\n".join(f"image{i}.png" for i in range(len(labels)))
    return lzma.compress(bytes(labels) + body + names.encode())


def test_packed_cifar10_is_read_without_loss(tmp_path, cifar_images):
    images, labels = cifar_images
    smooth = np.linspace(0, 255, 32).astype(np.uint8)
    images[0] = smooth[:, None] // 2 + smooth[None, :] // 2
    path = tmp_path / "data_batch_1.cifar.xz"
    path.write_bytes(pack(images, labels))
    read, read_labels = data._read_packed(path, count=len(images))
    np.testing.assert_array_equal(read, images)
    assert read_labels.tolist() == labels


def test_damaged_packed_cifar10(tmp_path):
    path = tmp_path / "data_batch_1.cifar.xz"
    path.write_bytes(lzma.compress(b"\0" * 1000))
    with pytest.raises(ValueError, match="is truncated: 10000 labels"):
        data.load("cifar10", tmp_path)
    path.write_bytes(b"no xz")
    with pytest.raises(ValueError, match="no readable xz file"):
        data.load("cifar10", tmp_path)


def test_missing_files_say_what_was_looked_for_and_where(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"MNIST: found no file train-images-idx3-ubyte\.gz or.*--root"
    ):
        data.load("mnist", tmp_path)
    monkeypatch.setenv("HESSKERN_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"data_batch_\[1-5\].*elsewhere"):
        data.load("cifar10")


def test_root_goes_before_the_variable_and_without_both_nothing_is_searched(tmp_path, monkeypatch):
    monkeypatch.setenv("HESSKERN_DATA", str(tmp_path / "variable"))
    assert data.data_root(tmp_path / "given") == tmp_path / "given"
    assert data.data_root() == tmp_path / "variable"
    monkeypatch.delenv("HESSKERN_DATA")
    assert data.data_root() is None
    with pytest.raises(ValueError, match=r"MNIST: no folder was named .* set HESSKERN_DATA"):
        data.load("mnist")


def test_limit_and_wrong_arguments():
    limited = data.load("digits", limit=5)
    assert len(limited) == 5
    assert torch.equal(limited.inputs, data.load("digits").inputs[:5])
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        data.load("digits", limit=0)
    with pytest.raises(ValueError, match="data must be one of digits, mnist, cifar10; got 'svhn'"):
        data.load("svhn")


def test_batches_can_be_iterated_again_and_cover_everything_once():
    dataset = data.load("digits", limit=10)
    batches = dataset.batches(4)
    assert len(batches) == 3
    for _ in range(2):
        inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(inputs, dataset.inputs)
        assert torch.equal(targets, dataset.targets)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        dataset.batches(0)


def load_or_skip(name, train=True):
    """The real data from HESSKERN_DATA; where that is not set the test is skipped."""
    if data.data_root() is None:
        pytest.skip("HESSKERN_DATA names no folder with the real data")
    return data.load(name, train=train)


def test_real_mnist():
    train, test = load_or_skip("mnist"), load_or_skip("mnist", train=False)
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.targets[:5].tolist() == [5, 0, 4, 1, 9]
    assert test.targets[:5].tolist() == [7, 2, 1, 0, 4]
    assert float(train.inputs.mean()) == pytest.approx(2 * 0.1307 - 1, abs=2e-3)
    assert float(train.inputs.std()) == pytest.approx(2 * 0.3081, abs=2e-3)


def test_real_cifar10():
    test = load_or_skip("cifar10", train=False)
    assert test.inputs.shape == (10_000, 3, 32, 32)
    assert test.targets[:5].tolist() == [3, 8, 8, 0, 6]
    assert torch.bincount(test.targets).tolist() == [1000] * 10
    assert test.inputs.mean((0, 2, 3)).abs().max() < 0.05

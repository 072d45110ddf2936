"""Data sets of the command line: scikit-learn's digits, MNIST, CIFAR-10; nothing is downloaded.

Pixels are scaled to [0, 1]. Digits and CIFAR-10 are then standardized with one constant mean and
deviation per channel; MNIST is shifted to [-1, 1], the scale at which arXiv 2010.04261's figures
come out: ``hesskern analyze --data mnist --model f200x2`` gives an overlap of H and its Kronecker
form of .965 in fc1 at k = 9, the paper .94; standardized pixels and pixels in [0, 1] stay lower:

==========  ==================================  ==========================================
digits      pixels / 16, mean .305, dev. .376   over the 1437 training images
mnist       pixels / 127.5 - 1                  background -1, ink 1
cifar10     mean .4914 .4822 .4465,             per channel, over the 50,000 training images
            deviation .2470 .2435 .2616
==========  ==================================  ==========================================
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

__all__ = ["DATASETS", "Batches", "Dataset", "data_root", "load"]

MOMENTS: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "digits": ([0.305], [0.376]),
    "mnist": ([0.5], [0.5]),
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
}
_DIGITS_TRAINING = 1437
_CIFAR_PIXELS = 3 * 32 * 32
_PACKED_IMAGES = 10_000


class Batches:
    """A re-iterable of ``(inputs [n, *shape], targets [n])`` slices; the last one may be smaller.

    Args:
        inputs: [N, *shape], floating.
        targets: [N], integer.
        batch_size: rows per batch, at least 1.

    Raises:
        ValueError: the lengths differ or ``batch_size`` is not positive.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int) -> None:
        if len(inputs) != len(targets):
            raise ValueError(
                f"inputs and targets must have one length, got {len(inputs)} and {len(targets)}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.inputs, self.targets, self.batch_size = inputs, targets, batch_size

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(
            self.inputs.split(self.batch_size), self.targets.split(self.batch_size), strict=True
        )


@dataclass(frozen=True)
class Dataset:
    """Inputs [N, *shape], scaled as above; targets [N] in 0..classes-1; where they came from."""

    name: str
    inputs: Tensor
    targets: Tensor
    classes: int
    source: str

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.inputs.shape[1:])

    def digest(self) -> str:
        """Of all targets and of about 64 inputs: tells data sets apart in files' headers."""
        digest = hashlib.sha256(self.targets.cpu().numpy().tobytes())
        digest.update(self.inputs[:: max(1, len(self) // 64)].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def batches(self, batch_size: int) -> Batches:
        """The data in file order, ``batch_size`` rows at a time."""
        return Batches(self.inputs, self.targets, batch_size)

    def part(self, batch_size: int, rank: int, size: int) -> DataLoader[tuple[Tensor, Tensor]]:
        """The samples of one of ``size`` ranks, in file order; a loader knows their numbers.

        All ranks together have every sample once; a rank beyond the last sample has none.
        """
        begin, end = (len(self) * r // size for r in (rank, rank + 1))
        rows = range(begin, end)
        parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        return DataLoader(
            _Rows(self), batch_sampler=[list(part) for part in parts], collate_fn=_as_is
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Dataset:
        """A copy with the inputs in ``dtype`` and both tensors on ``device``."""
        return replace(self, inputs=self.inputs.to(device, dtype), targets=self.targets.to(device))


class _Rows(MapDataset[tuple[Tensor, Tensor]]):
    """A data set for a loader, which takes a batch's samples at once."""

    def __init__(self, data: Dataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._data.inputs[index], self._data.targets[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(indices, device=self._data.inputs.device)
        return self._data.inputs[rows], self._data.targets[rows]


def _as_is(batch: Any) -> Any:
    return batch


def load(
    name: str, root: str | Path | None = None, train: bool = True, limit: int | None = None
) -> Dataset:
    """One split of a data set, float32 on the CPU.

    Args:
        name: ``"digits"``, ``"mnist"`` or ``"cifar10"``.
        root: folder that holds the files, or a folder above it as described in
            :func:`data_root`; digits need none.
        train: the training split, else the test split. The digits' first 1437 images are the
            training split, the other 360 (by other writers) the test split.
        limit: only the first so many samples.

    Raises:
        ValueError: the name is unknown, ``limit`` is not positive, the files are not found (the
            message says what was looked for and where), or a file is damaged.
    """
    if name not in DATASETS:
        raise ValueError(f"data must be one of {', '.join(DATASETS)}; got {name!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    pixels, labels, source = DATASETS[name](root, train)
    if limit is not None:
        pixels, labels = pixels[:limit], labels[:limit]
    inputs = torch.from_numpy(np.array(pixels, dtype=np.float32))
    mean, deviation = (torch.tensor(values) for values in MOMENTS[name])
    broadcast = (-1, *(1,) * (inputs.dim() - 2)) if inputs.dim() > 2 else (-1,)
    inputs.div_(16.0 if name == "digits" else 255.0)
    inputs.sub_(mean.view(broadcast)).div_(deviation.view(broadcast))
    targets = torch.from_numpy(np.array(labels, dtype=np.int64))
    return Dataset(name, inputs, targets, 10, source)


def data_root(root: str | Path | None = None) -> Path | None:
    """The folder that is searched: ``root`` if given, else ``$HESSKERN_DATA``, else none."""
    given = root or os.environ.get("HESSKERN_DATA")
    return Path(given).expanduser() if given else None


def _digits(root: str | Path | None, train: bool) -> tuple[np.ndarray, np.ndarray, str]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            'the digits data come with scikit-learn; install it: pip install "hesskern[cli]"'
        ) from None
    bunch = load_digits()
    part = slice(None, _DIGITS_TRAINING) if train else slice(_DIGITS_TRAINING, None)
    return bunch.data[part], bunch.target[part], "scikit-learn's digits (8 x 8 pixels, UCI)"


def _mnist(root: str | Path | None, train: bool) -> tuple[np.ndarray, np.ndarray, str]:
    stem = "train" if train else "t10k"
    arrays = []
    for part, axes in (("images-idx3", 3), ("labels-idx1", 1)):
        plain = f"{stem}-{part}-ubyte"
        path = _find("MNIST", root, ["", "mnist", "MNIST", "MNIST/raw"], [f"{plain}.gz", plain])[0]
        arrays.append(_read_idx(path, axes))
    images, labels = arrays
    if len(images) != len(labels):
        raise ValueError(f"{path.parent}: {len(images)} MNIST images but {len(labels)} labels")
    _check_labels(labels, path)
    return images[:, None], labels, f"MNIST ({path.parent.name}: {stem} images, IDX files)"


def _cifar10(root: str | Path | None, train: bool) -> tuple[np.ndarray, np.ndarray, str]:
    folder = "cifar-10-batches-py"
    subfolders = ["", folder, "cifar10", f"cifar10/{folder}", "cifar-10", f"cifar-10/{folder}"]
    if train:
        patterns = ["data_batch_[1-5]", "data_batch_[1-5].cifar.xz"]
    else:
        patterns = ["test_batch", "test_batch.cifar.xz"]
    paths = _find("CIFAR-10", root, subfolders, patterns)
    parts = [_read_packed(p) if p.suffix == ".xz" else _read_python_batch(p) for p in paths]
    split = "training" if train else "test"
    source = f"CIFAR-10 ({len(paths)} {split} batch{'es' if len(paths) > 1 else ''})"
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return images, labels, source


Reader = Callable[[str | Path | None, bool], tuple[np.ndarray, np.ndarray, str]]
DATASETS: dict[str, Reader] = {"digits": _digits, "mnist": _mnist, "cifar10": _cifar10}


def _find(
    what: str, root: str | Path | None, subfolders: Sequence[str], patterns: Sequence[str]
) -> list[Path]:
    """All files of the first pattern that matches in the first of the subfolders that has one."""
    wanted = " or ".join(patterns)
    base = data_root(root)
    if base is None:
        raise ValueError(
            f"{what}: no folder was named to look for {wanted} in; pass --root DIR or set "
            "HESSKERN_DATA to the folder that holds it"
        )
    for folder in (base / sub for sub in subfolders):
        for pattern in patterns:
            if paths := sorted(p for p in folder.glob(pattern) if p.is_file()):
                return paths
    below = ", ".join(s for s in subfolders if s)
    raise ValueError(
        f"{what}: found no file {wanted} in {base} (nor in its subfolders {below}); pass --root "
        "DIR or set HESSKERN_DATA to the folder that holds it"
    )


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """An IDX file of unsigned bytes (gzipped or plain): big-endian sizes, then the values."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no readable gzip file ({error})") from error
    header = 4 + 4 * axes
    if len(raw) < header or raw[:4] != bytes([0, 0, 8, axes]):
        raise ValueError(f"{path} is no IDX file of unsigned bytes with {axes} axes")
    shape = [int(n) for n in np.frombuffer(raw, ">u4", axes, 4)]
    if len(raw) - header != int(np.prod(shape)):
        raise ValueError(
            f"{path} is truncated or damaged: its header promises {shape}, "
            f"that is {int(np.prod(shape))} bytes, but {len(raw) - header} follow"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds numpy arrays and plain containers; every other name in the pickle is refused."""

    _reconstruct = np.empty(0).__reduce__()[0]

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return self._reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how python 3 writes bytes for python 2
            return lambda text, encoding: str(text).encode("latin-1")
        raise pickle.UnpicklingError(f"the name {module}.{name} has no place in image data")


def _read_python_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A batch of the official python version: a pickled dict with b"data" and b"labels"."""
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        images = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(batch[b"labels"], dtype=np.uint8)
    except Exception as error:  # a damaged pickle may raise nearly any type
        raise ValueError(f"{path} is no readable CIFAR-10 python batch ({error})") from error
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{path}: {len(images)} images but labels of shape {list(labels.shape)}")
    _check_labels(labels, path)
    return images, labels


def _read_packed(path: Path, count: int = _PACKED_IMAGES) -> tuple[np.ndarray, np.ndarray]:
    """A losslessly packed batch: one xz stream of labels, prediction residuals and file names.

    The planes are R - G, G and B - G (mod 256); each value is stored as the difference to the
    median edge detector's prediction from its left, upper and upper-left neighbours, as in
    JPEG-LS (Weinberger, Seroussi, Sapiro 2000). Residuals: [3, count, 32, 32].
    """
    try:
        raw = lzma.decompress(path.read_bytes())
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path} is no readable xz file ({error})") from error
    values = count * _CIFAR_PIXELS
    if len(raw) < count + values:
        raise ValueError(
            f"{path} is truncated: {count} labels and images need {count + values} bytes, "
            f"it holds {len(raw)}"
        )
    labels = np.frombuffer(raw, np.uint8, count).copy()
    _check_labels(labels, path)
    residuals = np.frombuffer(raw, np.uint8, values, offset=count).reshape(3 * count, 32, 32)
    # Rows and columns depend on the ones before; the images and planes go side by side.
    planes = np.ascontiguousarray(residuals.transpose(1, 2, 0)).astype(np.int16)
    for row in range(32):
        for column in range(32):
            pixel = planes[row, column]
            if row and column:
                left, above = planes[row, column - 1], planes[row - 1, column]
                corner = planes[row - 1, column - 1]
                low, high = np.minimum(left, above), np.maximum(left, above)
                pixel += np.clip(left + above - corner, low, high)
            elif column:
                pixel += planes[row, column - 1]
            elif row:
                pixel += planes[row - 1, column]
            pixel &= 255
    images = planes.astype(np.uint8).reshape(32, 32, 3, count).transpose(3, 2, 0, 1).copy()
    images[:, 0] += images[:, 1]
    images[:, 2] += images[:, 1]
    return images, labels


def _check_labels(labels: np.ndarray, path: Path) -> None:
    if labels.size == 0 or labels.max() > 9:
        raise ValueError(f"{path} is empty or damaged: labels must lie in 0..9")

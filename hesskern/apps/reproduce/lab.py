"""Trained networks with their factors, Hessians and eigenpairs, kept in a folder and made once."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hesskern.apps.analyze.analysis import plain
from hesskern.apps.analyze.wording import network_name
from hesskern.apps.processes import ONE, Processes
from hesskern.factors.compute import kronecker_factors
from hesskern.factors.result import Factors, load_factors
from hesskern.files import check_writable, keep_if_possible, written_whole
from hesskern.operators.gauss_newton import GaussNewton
from hesskern.operators.layer_hessian import LayerHessian, layer_hessians
from hesskern.progress import Progress, reporter
from hesskern.solvers.eigsh import eigsh
from hesskern.solvers.result import EigenResult
from hesskern.tensor_files import savable
from hesskern.text import counted
from hesskern.zoo import data as datasets
from hesskern.zoo import models, training
from hesskern.zoo.data import Batches, Dataset

__all__ = ["PROFILES", "PUBLISHED_SIZES", "Lab", "Network", "Overrides"]

LOSS = nn.CrossEntropyLoss()
PUBLISHED_SIZES: Mapping[str, int] = {"mnist": 60_000, "cifar10": 50_000}
"""Training samples behind the published figures."""
PROFILES = ("quick", *training.RECIPES)
"""Minutes of training, or a published recipe."""

# In the order in which they stand at a name's end.
_KEPT_SUFFIXES = (("tanh", "gelu"), ("bn", "ln"))
_BATCH = 512
_TOLERANCE = 1e-4
# Epochs of the quick profile where the data set's quick recipe is not meant for the network.
_QUICK_EPOCHS = {"f1500x3": 5, "f600x4": 8, "vgg11-w16": 8, "resnet18-w8-bn": 4}
_QUICK_RANDOM_LABELS = training.Recipe(epochs=60, momentum=0.9)


@dataclass(frozen=True)
class Network:
    """One row of an item: data, network, and what is special about them.

    Attributes:
        data: see :func:`hesskern.zoo.data.load`.
        model: see :func:`hesskern.zoo.models.build`.
        random_labels: whether the targets are drawn at random.
        limit: only the first so many training samples.
        samples: the curvature passes look at the first so many training samples; None for all.
    """

    data: str
    model: str
    random_labels: bool = False
    limit: int | None = None
    samples: int | None = None

    @property
    def name(self) -> str:
        """As the paper writes it, with the data."""
        known = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
        labels = ", random labels" if self.random_labels else ""
        return f"{network_name(self.model)} on {known.get(self.data, self.data)}{labels}"


@dataclass(frozen=True)
class Overrides:
    """What a user may change about an item; a changed item has no verdicts.

    Attributes:
        data, model: stand in for every network's own; norms and activations at a name's end stay.
        limit: only the first so many training samples.
        epochs: of training.
        seeds: number of seeds.
        top: exact eigenpairs per layer.
    """

    data: str | None = None
    model: str | None = None
    limit: int | None = None
    epochs: int | None = None
    seeds: int | None = None
    top: int | None = None

    def network(self, network: Network) -> Network | None:
        """The network as it will be looked at; None where no such variant of it can be named.

        Norms and activations at a name's end are kept, unless ``model`` names others itself. Of a
        user's own function there is one network alone.
        """
        model = network.model
        if self.model is not None:
            variant = _suffixes(network.model)
            if ":" in self.model and any(variant):
                return None
            own = _suffixes(self.model)
            base = [part for part in self.model.split("-") if part.lower() not in own]
            kept = (mine or theirs for mine, theirs in zip(own, variant, strict=True))
            model = "-".join([*base, *filter(None, kept)])
        return replace(
            network,
            data=self.data or network.data,
            model=model,
            limit=self.limit or network.limit,
            samples=None if self.limit else network.samples,
        )

    @property
    def words(self) -> str:
        """What no longer is as published; empty where seeds and eigenpairs alone are other."""
        parts = {
            "data {}": self.data,
            "model {}": self.model,
            "the first {}": None if self.limit is None else counted(self.limit, "sample"),
            "{}": None if self.epochs is None else counted(self.epochs, "epoch"),
        }
        return ", ".join(text.format(v) for text, v in parts.items() if v is not None)


class Lab:
    """Everything that items ask of a trained network; what is expensive is kept on disk.

    Args:
        folder: for the files; one profile's alone.
        profile: "quick", or a published one, see :data:`PROFILES`.
        root: folder of the data's files.
        overrides: see :class:`Overrides`.
        memory_budget: bytes of samples that Hessians keep; layers above it run the model again.
        progress: see :func:`hesskern.progress.reporter`.
        device: where networks, data and what is computed from them are.
        processes: share the samples; the first trains, and writes what is kept.

    Raises:
        ValueError: there is no such profile.
    """

    def __init__(
        self,
        folder: Path,
        profile: str = "quick",
        root: Path | None = None,
        overrides: Overrides = Overrides(),
        progress: bool | Progress = False,
        memory_budget: int = 4 * 2**30,
        device: torch.device | str = "cpu",
        processes: Processes = ONE,
    ) -> None:
        if profile not in PROFILES:
            raise ValueError(f"profile must be one of {', '.join(PROFILES)}; got {profile!r}")
        self.memory_budget, self.device = memory_budget, torch.device(device)
        self.processes = processes
        self.folder, self.profile, self.root = folder, profile, root
        self.overrides = overrides
        self._report = reporter(progress)
        self._label = ""
        self._asked: dict[Network, dict[int, None]] = {}
        # By file: that it cannot be written is no reason to forget it.
        self._fits: dict[Path, dict[str, Any]] = {}
        self._data = lru_cache(maxsize=2)(self._load)
        self._models = lru_cache(maxsize=8)(self._trained)
        self._digests = lru_cache(maxsize=None)(self._digest)
        # Hessians hold every sample's rows, so only one network's stay.
        self._hessians = lru_cache(maxsize=1)(self._layer_hessians)

    def progress(self, description: str, done: int, total: int | None) -> None:
        """Reports with the network's label in front."""
        self._report(f"{self._label}{description}", done, total)

    @property
    def top(self) -> int:
        """Exact eigenpairs per layer."""
        return self.overrides.top or (50 if self.profile == "quick" else 200)

    def seeds(self, quick: int = 3, paper: int = 5) -> list[int]:
        """Seeds of an item."""
        count = self.overrides.seeds or (quick if self.profile == "quick" else paper)
        return list(range(count))

    def networks(self, networks: Sequence[Network]) -> list[Network]:
        """An item's networks after the user's changes, each once.

        Raises:
            ValueError: none is left.
        """
        changed = [self.overrides.network(network) for network in networks]
        # Networks that differed may have become one, of which the first says how much is looked at.
        left = list(
            {replace(n, samples=None): n for n in reversed(changed) if n is not None}.values()
        )[::-1]
        if networks and not left:
            raise ValueError(
                f"model {self.overrides.model!r} has no variants with norms or other activations, "
                "which is all that this item looks at"
            )
        return left

    def begin_item(self) -> None:
        """Forgets whose seeds were asked for."""
        self._asked.clear()

    def seeds_asked(self, network: Network) -> list[int]:
        """Seeds of the network that were looked at since :meth:`begin_item`."""
        return sorted(self._asked.get(network, {}))

    def withheld(self, network: Network) -> str:
        """Why figures of this network get no verdict; empty where they do."""
        if self.overrides.words:
            return "not the published network, data or training"
        published = PUBLISHED_SIZES.get(network.data)
        used = len(self.data(network))
        if published is not None and used != published:
            return f"{used:,} images here, {published:,} in the paper"
        if published is not None and network.samples is not None and network.samples < used:
            return f"curvature of {network.samples:,} images here, of {published:,} in the paper"
        return ""

    def recipe(self, network: Network) -> training.Recipe:
        """How the profile trains the network."""
        if self.profile in training.RECIPES:
            recipe = training.RECIPES[self.profile]
        elif network.random_labels:
            recipe = _QUICK_RANDOM_LABELS
        else:
            recipe = training.recipe_for("quick", network.data)
            if network.data != "digits":
                epochs = _QUICK_EPOCHS.get(network.model, recipe.epochs)
                recipe = replace(recipe, epochs=epochs)
        if self.overrides.epochs is not None:
            recipe = replace(recipe, epochs=self.overrides.epochs)
        return recipe

    def data(self, network: Network) -> Dataset:
        """The training samples."""
        return self._data(network.data, network.limit, network.random_labels)

    def classes(self, network: Network) -> int:
        """c."""
        return self.data(network).classes

    def _load(self, name: str, limit: int | None, random_labels: bool) -> Dataset:
        with self.processes.section("reading the data"):
            data = datasets.load(name, self.root, limit=limit)
        if random_labels:
            generator = torch.Generator().manual_seed(0)
            targets = torch.randint(data.classes, (len(data),), generator=generator)
            data = replace(data, targets=targets)
        return data.to(self.device, data.inputs.dtype)

    def batches(self, network: Network) -> Batches:
        """The samples of the curvature passes."""
        data = self.data(network)
        part = slice(network.samples)
        return Batches(data.inputs[part], data.targets[part], _BATCH)

    def _part(self, network: Network) -> Any:
        """This process's part of :meth:`batches`."""
        whole = self.batches(network)
        data = replace(self.data(network), inputs=whole.inputs, targets=whole.targets)
        return self.processes.batches(data, _BATCH)

    def _keep(self, path: Path, write: Callable[[Path], Any]) -> None:
        self.processes.on_first(f"writing {path.name}", lambda: keep_if_possible(path, write))

    def folder_of(self, network: Network, seed: int, epochs: int | None = None) -> Path:
        """Where the files of one trained network are."""
        recipe = self.recipe(network)
        parts = [network.data, network.model.replace(":", "-").replace("^", "x").lower()]
        if network.random_labels:
            parts.append("random")
        if network.limit:
            parts.append(f"first{network.limit}")
        parts.append(f"{recipe.epochs if epochs is None else epochs}epochs")
        if recipe.momentum:
            parts.append(f"momentum{recipe.momentum:g}")
        return self.folder / "networks" / "-".join(parts) / f"seed{seed}"

    def model(self, network: Network, seed: int, epochs: int | None = None) -> nn.Module:
        """The network trained from ``seed``, for fewer ``epochs`` than the recipe's if given."""
        self._asked.setdefault(network, {})[seed] = None
        return self._models(network, seed, epochs)

    def _trained(self, network: Network, seed: int, epochs: int | None) -> nn.Module:
        data, recipe = self.data(network), self.recipe(network)
        if epochs is not None:
            recipe = replace(recipe, epochs=epochs)
        model = models.build(network.model, data.input_shape, data.classes, seed).to(self.device)
        path = self.folder_of(network, seed, epochs) / "state.pt"
        noted = path.parent / "training.json"

        def train() -> dict[str, Any]:
            if not path.is_file():
                self._continue_from_fewer_epochs(network, seed, recipe.epochs, path)
            with self._named(network, seed):
                history = training.train(model, data, recipe, seed, self.progress, checkpoint=path)
            return self._note_fit(model, data, history, noted)

        fit = self.processes.weights(model, "training", train)
        self._fits[noted] = self.processes.same(fit or {})
        return model

    def _note_fit(
        self, model: nn.Module, data: Dataset, history: training.History, path: Path
    ) -> dict[str, Any]:
        """Writes recipe, losses, final loss and accuracy (None: infinite) once."""
        digest, noted = _digest_of(model, data), _noted(path)
        if noted.get("digest") == digest:
            return noted
        loss, accuracy = training.evaluate(model, data)
        facts = {"train_loss": loss, "train_accuracy": accuracy, "digest": digest}
        fit: dict[str, Any] = plain(history.to_dict() | facts)
        content = json.dumps(fit, indent=1, allow_nan=False) + "\n"
        keep_if_possible(path, lambda temporary: temporary.write_text(content))
        return fit

    def _continue_from_fewer_epochs(
        self, network: Network, seed: int, epochs: int, path: Path
    ) -> None:
        """Copies the state of the longest run that the wanted one begins with."""
        for fewer in range(epochs - 1, 0, -1):
            before = self.folder_of(network, seed, fewer) / "state.pt"
            if before.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                with written_whole(path) as temporary:
                    shutil.copyfile(before, temporary)
                return

    def training(self, network: Network, seed: int, epochs: int | None = None) -> dict[str, Any]:
        """Recipe, losses and seconds of a training, with the final loss and accuracy."""
        self.model(network, seed, epochs)
        return self._fits[self.folder_of(network, seed, epochs) / "training.json"]

    def fit(self, network: Network, seed: int) -> dict[str, Any]:
        """The same of a seed that was looked at; empty where it was not trained to the end."""
        path = self.folder_of(network, seed) / "training.json"
        return self._fits.get(path) or _noted(path)

    def factors(self, network: Network, seed: int, epochs: int | None = None) -> Factors:
        """Kronecker factors of every layer, weights only."""
        path = self._cached(network, seed, epochs, "factors")
        if self.processes.see(path):
            return load_factors(path, self.device)
        model, group = self.model(network, seed, epochs), self.processes.group
        with self._named(network, seed):
            found = kronecker_factors(
                model,
                self._part(network),
                LOSS,
                progress=self.progress,
                group=group,
                checkpoint=self._state(path),
            )
        self._keep(path, found.save)
        return found

    def hessian(
        self, network: Network, seed: int, layer: str, epochs: int | None = None
    ) -> LayerHessian:
        """The exact Hessian of one layer."""
        return self._hessians(network, seed, epochs)[layer]

    def _layer_hessians(
        self, network: Network, seed: int, epochs: int | None
    ) -> dict[str, LayerHessian]:
        self._hessians.cache_clear()
        model = self.model(network, seed, epochs)
        with self._named(network, seed), warnings.catch_warnings():
            # That a smooth layer's block is no Hessian is said where it matters.
            warnings.simplefilter("ignore", UserWarning)
            return layer_hessians(
                model,
                self._part(network),
                LOSS,
                memory_budget=self.memory_budget,
                progress=self.progress,
                group=self.processes.group,
                checkpoint=self._state(self._cached(network, seed, epochs, "hessians")),
            )

    @staticmethod
    def _state(path: Path) -> Path | None:
        """Where a pass keeps its state, beside what it gives; None where nothing can be written."""
        try:
            check_writable(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
        except (ValueError, OSError):
            return None
        return path.with_suffix(".checkpoint")

    def full(self, network: Network, seed: int) -> GaussNewton:
        """The Gauss-Newton matrix over all layers, biases included."""
        self._hessians.cache_clear()
        model = self.model(network, seed)
        with self._named(network, seed):
            return GaussNewton(
                model,
                self._part(network),
                LOSS,
                bias="joint",
                memory_budget=self.memory_budget,
                progress=self.progress,
                group=self.processes.group,
            )

    def eigenpairs(
        self, network: Network, seed: int, layer: str, k: int, epochs: int | None = None
    ) -> EigenResult:
        """At least the k largest eigenpairs of a layer's exact Hessian, cut to k."""
        m, d = self.factors(network, seed, epochs)[layer].layer_shape
        k = min(k, m * d)
        path = self._cached(network, seed, epochs, f"eigen.{layer}")
        return self._kept_pairs(
            path,
            k,
            network,
            seed,
            layer,
            lambda: self.hessian(network, seed, layer, epochs),
        )

    def full_eigenpairs(self, network: Network, seed: int, k: int, G: GaussNewton) -> EigenResult:
        """The k largest eigenpairs of :meth:`full`'s G."""
        path = self._cached(network, seed, None, "eigen-full")
        return self._kept_pairs(path, k, network, seed, "all layers", lambda: G)

    def _kept_pairs(
        self, path: Path, k: int, network: Network, seed: int, what: str, make: Callable[[], Any]
    ) -> EigenResult:
        found = _read_pairs(path, k, self.device) if self.processes.see(path) else None
        if found is not None:
            return found
        operator = make()

        def renamed(_: str, done: int, total: int | None) -> None:
            self.progress(f"top eigenpairs of {what}", min(done, k), k)

        with self._named(network, seed), warnings.catch_warnings():
            # Pairs that did not converge are reported with the item.
            warnings.simplefilter("ignore", RuntimeWarning)
            result = eigsh(operator, k, tol=_TOLERANCE, progress=renamed)
        self._keep(path, partial(_write_pairs, result))
        return result

    def _cached(self, network: Network, seed: int, epochs: int | None, name: str) -> Path:
        """The file of what was computed from these weights and samples, and from no others."""
        suffix = f"-{network.samples}samples" if network.samples else ""
        self.model(network, seed, epochs)
        digest = self._digests(network, seed, epochs)
        return self.folder_of(network, seed, epochs) / f"{name}{suffix}-{digest}.safetensors"

    def _digest(self, network: Network, seed: int, epochs: int | None) -> str:
        return _digest_of(self.model(network, seed, epochs), self.data(network))

    def _named(self, network: Network, seed: int) -> _Label:
        return _Label(self, f"{network.name}, seed {seed}: ")


def _suffixes(model: str) -> list[str]:
    """A name's activation and norm, each empty where there is none."""
    parts = [] if ":" in model else model.lower().split("-")[1:]
    return [next((part for part in parts if part in kind), "") for kind in _KEPT_SUFFIXES]


def _digest_of(model: nn.Module, data: Dataset) -> str:
    """Of the network's modules and weights, and of the data."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    digest.update(data.digest().encode())
    return digest.hexdigest()[:16]


class _Label:
    """Puts a label in front of what the lab reports, for the time of a ``with`` block."""

    def __init__(self, lab: Lab, label: str) -> None:
        self._lab, self._new = lab, label

    def __enter__(self) -> None:
        self._old, self._lab._label = self._lab._label, self._new

    def __exit__(self, *error: Any) -> None:
        self._lab._label = self._old


def _noted(path: Path) -> dict[str, Any]:
    """What is on record of a training; empty where nothing is, or nothing that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_pairs(result: EigenResult, path: Path) -> None:
    tensors = savable({name: getattr(result, name) for name in ("values", "vectors", "residuals")})
    facts = {"converged": str(int(result.converged)), "matvecs": str(result.matvecs)}
    save_file(tensors, path, metadata=facts)


def _read_pairs(path: Path, k: int, device: torch.device | str = "cpu") -> EigenResult | None:
    """The first k pairs of a file, or None where there are not so many."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            values = file.get_tensor("values")
            if len(values) < k:
                return None
            return EigenResult(
                values[:k].clone().to(device),
                file.get_tensor("vectors")[:, :k].contiguous().to(device),
                file.get_tensor("residuals")[:k].clone().to(device),
                facts["converged"] == "1",
                int(facts["matvecs"]),
            )
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it to compute it anew") from None

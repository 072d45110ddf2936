"""Builders of the networks the paper looks at, user-supplied ones, and state loading.

Networks, initialization and names follow arXiv 2010.04261, section 2: F-n^m has m hidden layers of
n ReLU units; weights start at Xavier's uniform values, biases at zero; batch norm, where asked for,
stands after the ReLU and has no affine parameters.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["build", "fully_connected", "lenet5", "load_checkpoint", "read_state"]

_FULLY_CONNECTED = re.compile(r"f(\d+)(?:[x^](\d+))?(-bn)?", re.IGNORECASE)
_LENET5 = re.compile(r"lenet5(?:-w(\d+))?(-bn)?", re.IGNORECASE)
KNOWN_MODELS = (
    "f200x2 (any width x depth, -bn for batch norm), lenet5 (-w80: that many outputs of fc1; -bn), "
    "module:function"
)


def fully_connected(
    inputs: int, width: int, depth: int, classes: int, batch_norm: bool = False
) -> nn.Sequential:
    """F-n^m: ``depth`` hidden layers of ``width`` ReLU units and a linear output layer.

    Args:
        inputs: number of input features; inputs [N, ...] are flattened to [N, inputs].
        width: units of each hidden layer.
        depth: number of hidden layers, at least 1.
        classes: number of outputs.
        batch_norm: a non-affine batch norm after each ReLU.

    Returns:
        A network [N, ...] -> [N, classes] whose Linear layers are named fc1, fc2, ...

    Raises:
        ValueError: a size is not positive.
    """
    for name, size in (
        ("inputs", inputs),
        ("width", width),
        ("depth", depth),
        ("classes", classes),
    ):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    features = inputs
    for i in range(1, depth + 1):
        layers[f"fc{i}"] = nn.Linear(features, width)
        layers[f"relu{i}"] = nn.ReLU()
        if batch_norm:
            layers[f"bn{i}"] = nn.BatchNorm1d(width, affine=False)
        features = width
    layers[f"fc{depth + 1}"] = nn.Linear(features, classes)
    return _initialized(nn.Sequential(layers))


def lenet5(
    input_shape: Sequence[int], classes: int = 10, batch_norm: bool = False, hidden: int = 120
) -> nn.Sequential:
    """LeNet5: 5 x 5 convolutions (6, 16 channels) with max pooling, then 120, 84 and the outputs.

    MNIST's 28 x 28 images are padded by two pixels, as in LeCun et al. 1998, so that both shapes
    lead to the same network; CIFAR's 32 x 32 images are not.

    Args:
        input_shape: [C, H, W] of one image.
        classes: number of outputs.
        batch_norm: a non-affine batch norm after each hidden ReLU.
        hidden: outputs of fc1.

    Returns:
        A network [N, C, H, W] -> [N, classes]; layers are named conv1, conv2, fc1, fc2, fc3.

    Raises:
        ValueError: ``input_shape`` is no image of at least 28 x 28 pixels, or ``hidden`` is not
            positive.
    """
    if hidden < 1:
        raise ValueError(f"hidden must be at least 1, got {hidden}")
    if len(input_shape) != 3 or min(input_shape[1:]) < 28:
        raise ValueError(
            "lenet5 needs images [C, H, W] of at least 28 x 28 pixels, "
            f"got inputs of shape {list(input_shape)}"
        )
    channels, height, width = input_shape
    padding = 2 if min(height, width) < 32 else 0
    pooled = [(((side + 2 * padding - 4) // 2) - 4) // 2 for side in (height, width)]
    layers: OrderedDict[str, nn.Module] = OrderedDict()

    def block(index: int, name: str, layer: nn.Module, norm: nn.Module) -> None:
        layers[name] = layer
        layers[f"relu{index}"] = nn.ReLU()
        if batch_norm:
            layers[f"bn{index}"] = norm

    block(1, "conv1", nn.Conv2d(channels, 6, 5, padding=padding), nn.BatchNorm2d(6, affine=False))
    layers["pool1"] = nn.MaxPool2d(2)
    block(2, "conv2", nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16, affine=False))
    layers["pool2"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    flat = 16 * pooled[0] * pooled[1]
    block(3, "fc1", nn.Linear(flat, hidden), nn.BatchNorm1d(hidden, affine=False))
    block(4, "fc2", nn.Linear(hidden, 84), nn.BatchNorm1d(84, affine=False))
    layers["fc3"] = nn.Linear(84, classes)
    return _initialized(nn.Sequential(layers))


def _initialized(model: nn.Sequential) -> nn.Sequential:
    for module in model:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def build(spec: str, input_shape: Sequence[int], classes: int, seed: int = 0) -> nn.Module:
    """The network that ``spec`` names, initialized from ``seed``; global random state is kept.

    Args:
        spec: ``"f200x2"`` (F-200^2; ``-bn`` appended: with batch norm), ``"lenet5"``,
            ``"lenet5-w80-bn"`` (fc1 with 80 outputs), or ``"module:function"`` for a builder of the
            user's own, found with the current directory on the path. The function is called with
            those of the keywords ``inputs`` (number of features), ``input_shape`` and ``classes``
            that it takes.
        input_shape: shape of one input, without the batch.
        classes: number of outputs.
        seed: seed of the initialization.

    Returns:
        A network [N, *input_shape] -> [N, classes].

    Raises:
        ValueError: ``spec`` is unknown, its module or function is not found or does not return a
            :class:`torch.nn.Module`, or the network does not fit the data.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        if ":" in spec:
            return _build_users(spec, input_shape, classes)
        batch_norm = spec.lower().endswith("-bn")
        if match := _FULLY_CONNECTED.fullmatch(spec):
            width, depth = int(match[1]), int(match[2] or 1)
            return fully_connected(math.prod(input_shape), width, depth, classes, batch_norm)
        if match := _LENET5.fullmatch(spec):
            return lenet5(input_shape, classes, batch_norm, int(match[1] or 120))
    raise ValueError(f"model must be one of {KNOWN_MODELS}; got {spec!r}")


def _build_users(spec: str, input_shape: Sequence[int], classes: int) -> nn.Module:
    module_name, _, function_name = spec.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        raise ValueError(
            f"model {spec!r}: there is no module {module_name!r} in {here} or installed"
        ) from None
    finally:
        sys.path.remove(here)
    builder = getattr(module, function_name, None)
    if not callable(builder):
        raise ValueError(
            f"model {spec!r}: module {module_name!r} has no function {function_name!r}"
        )
    offered = {
        "inputs": math.prod(input_shape),
        "input_shape": tuple(input_shape),
        "classes": classes,
    }
    taken = inspect.signature(builder).parameters
    model = builder(**{name: value for name, value in offered.items() if name in taken})
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model {spec!r}: {function_name} must return a torch.nn.Module, "
            f"got {type(model).__name__}"
        )
    _check_fit(model, spec, input_shape, classes)
    return model


def _check_fit(model: nn.Module, spec: str, input_shape: Sequence[int], classes: int) -> None:
    """Runs two zero inputs through a user's model and looks at what comes out."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(torch.zeros(2, *input_shape))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"model {spec!r} does not take inputs of shape {[2, *input_shape]}: {error}"
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(outputs, Tensor) or tuple(outputs.shape) != (2, classes):
        found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"model {spec!r} must turn inputs {[2, *input_shape]} into logits {[2, classes]}, "
            f"got {found}"
        )


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU; pickled code is never run.

    Args:
        path: a safetensors file, or what ``torch.save`` made of a state dict (also one wrapped
            under ``"state_dict"`` or ``"model"``).

    Raises:
        ValueError: the file is missing, damaged, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    state: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise types of their own for damaged files
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"checkpoint {path} cannot be read as a state dict "
            f"({reason[0] if reason else type(error).__name__})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"checkpoint {path} holds no state dict (a mapping of names to tensors)")
    return dict(state)


def load_checkpoint(model: nn.Module, path: str | Path) -> nn.Module:
    """Copies a checkpoint's tensors into ``model`` and returns it.

    Raises:
        ValueError: the file cannot be read (see :func:`read_state`), or names or shapes differ
            from the model's; the message lists the first of them.
    """
    state = read_state(path)
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in own]
    problems += [
        f"{name} is {list(state[name].shape)}, the model's is {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"checkpoint {path} does not fit the model: {'; '.join(problems[:3])}{more}"
        )
    model.load_state_dict(state)
    return model

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

__all__ = [
    "build",
    "fully_connected",
    "lenet5",
    "load_checkpoint",
    "read_state",
    "resnet18",
    "vgg11",
]

_FULLY_CONNECTED = re.compile(r"f(\d+)(?:[x^](\d+))?(?:-(tanh|gelu))?(?:-(bn|ln))?", re.IGNORECASE)
_ACTIVATIONS: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
_LENET5 = re.compile(r"lenet5(?:-w(\d+))?(-bn)?", re.IGNORECASE)
_WIDE = re.compile(r"(vgg11|resnet18)(?:-w(\d+))?(-bn)?", re.IGNORECASE)
KNOWN_MODELS = (
    "f200x2 (any width x depth; -tanh, -gelu; -bn, -ln for batch or layer norm), "
    "lenet5 (-w80: that many outputs of fc1; -bn), vgg11-w32 and resnet18-w16 "
    "(channels of the first convolution; -bn), module:function"
)
DEFAULT_MODELS = {"digits": "f64x2", "mnist": "f200x2", "cifar10": "lenet5"}
"""The network that a command takes for a data set."""


def fully_connected(
    inputs: int,
    width: int,
    depth: int,
    classes: int,
    norm: str | None = None,
    activation: str = "relu",
) -> nn.Sequential:
    """F-n^m: ``depth`` hidden layers of ``width`` units and a linear output layer.

    Args:
        inputs: number of input features; inputs [N, ...] are flattened to [N, inputs].
        width: units of each hidden layer.
        depth: number of hidden layers, at least 1.
        classes: number of outputs.
        norm: "bn" or "ln" for a non-affine batch or layer norm after each activation.
        activation: "relu", "tanh" or "gelu".

    Returns:
        A network [N, ...] -> [N, classes] whose Linear layers are named fc1, fc2, ...

    Raises:
        ValueError: a size is not positive, or ``norm`` or ``activation`` unknown.
    """
    if norm not in (None, "bn", "ln"):
        raise ValueError(f"norm must be None, 'bn' or 'ln', got {norm!r}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be relu, tanh or gelu, got {activation!r}")
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
        layers[f"{activation}{i}"] = _ACTIVATIONS[activation]()
        if norm == "bn":
            layers[f"bn{i}"] = nn.BatchNorm1d(width, affine=False)
        elif norm == "ln":
            layers[f"ln{i}"] = nn.LayerNorm(width, elementwise_affine=False)
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
    channels, height, width = _image("lenet5", input_shape, 28)
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


def vgg11(
    input_shape: Sequence[int], classes: int = 10, width: int = 64, batch_norm: bool = False
) -> nn.Sequential:
    """VGG11-Wn: eight 3 x 3 convolutions with n, 2n, 4n, 4n, 8n, 8n, 8n, 8n channels, 5 poolings.

    Simonyan & Zisserman's configuration A for 32 x 32 images, with three fully connected layers of
    8n units each but the last.

    Args:
        input_shape: [C, H, W] of one image.
        classes: number of outputs.
        width: n, 64 in the original.
        batch_norm: a non-affine batch norm after each hidden ReLU.

    Returns:
        A network [N, C, H, W] -> [N, classes]; layers are named conv1 ... conv8, fc1, fc2, fc3.

    Raises:
        ValueError: ``input_shape`` is no image of at least 32 x 32 pixels, or ``width`` is not
            positive.
    """
    channels, height, side = _image("vgg11", input_shape, 32)
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    plan = (1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M")
    index = pools = 0
    for entry in plan:
        if isinstance(entry, str):
            pools += 1
            layers[f"pool{pools}"] = nn.MaxPool2d(2)
            continue
        index += 1
        layers[f"conv{index}"] = nn.Conv2d(channels, entry * width, 3, padding=1)
        layers[f"relu{index}"] = nn.ReLU()
        channels = entry * width
        if batch_norm:
            layers[f"bn{index}"] = nn.BatchNorm2d(channels, affine=False)
    layers["flatten"] = nn.Flatten()
    features = channels * (height // 2**pools) * (side // 2**pools)
    for i in (1, 2):
        layers[f"fc{i}"] = nn.Linear(features, 8 * width)
        layers[f"relu{index + i}"] = nn.ReLU()
        features = 8 * width
        if batch_norm:
            layers[f"bn{index + i}"] = nn.BatchNorm1d(features, affine=False)
    layers["fc3"] = nn.Linear(features, classes)
    return _initialized(nn.Sequential(layers))


class _Block(nn.Module):
    """Two 3 x 3 convolutions beside the identity, or beside a 1 x 1 one where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, batch_norm: bool) -> None:
        super().__init__()

        def norm() -> nn.Module:
            return nn.BatchNorm2d(outputs, affine=False) if batch_norm else nn.Identity()

        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.norm3 = norm() if not isinstance(self.shortcut, nn.Identity) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.relu(self.norm1(self.conv1(x)))
        return nn.functional.relu(self.norm2(self.conv2(hidden)) + self.norm3(self.shortcut(x)))


def resnet18(
    input_shape: Sequence[int], classes: int = 10, width: int = 64, batch_norm: bool = False
) -> nn.Sequential:
    """ResNet18-Wn with a 3 x 3 stem for small images: stages of n, 2n, 4n, 8n channels.

    He et al. 2016; batch norm, where asked for, stands after each convolution and is not affine.

    Args:
        input_shape: [C, H, W] of one image.
        classes: number of outputs.
        width: n, 64 in the original.
        batch_norm: whether there is batch norm.

    Returns:
        A network [N, C, H, W] -> [N, classes]; layers are named conv1, block1.conv1, ...,
        block8.conv2, fc.

    Raises:
        ValueError: ``input_shape`` is no image of at least 8 x 8 pixels, or ``width`` is not
            positive.
    """
    channels = _image("resnet18", input_shape, 8)[0]
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    if batch_norm:
        layers["norm1"] = nn.BatchNorm2d(width, affine=False)
    layers["relu1"] = nn.ReLU()
    inputs = width
    for index in range(8):
        outputs = width * 2 ** (index // 2)
        stride = 2 if index in (2, 4, 6) else 1
        layers[f"block{index + 1}"] = _Block(inputs, outputs, stride, batch_norm)
        inputs = outputs
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(inputs, classes)
    return _initialized(nn.Sequential(layers))


def _image(name: str, input_shape: Sequence[int], least: int) -> tuple[int, int, int]:
    """[C, H, W], or a ValueError."""
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        raise ValueError(
            f"{name} needs images [C, H, W] of at least {least} x {least} pixels, "
            f"got inputs of shape {list(input_shape)}"
        )
    channels, height, width = input_shape
    return channels, height, width


def _initialized(model: nn.Sequential) -> nn.Sequential:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def build(spec: str, input_shape: Sequence[int], classes: int, seed: int = 0) -> nn.Module:
    """The network that ``spec`` names, initialized from ``seed``; global random state is kept.

    Args:
        spec: ``"f200x2"`` (F-200^2; ``-tanh`` or ``-gelu`` appended: with that activation; ``-bn``
            or ``-ln``: with batch or layer norm), ``"lenet5"``, ``"lenet5-w80-bn"`` (fc1 with 80
            outputs), ``"vgg11-w32"``, ``"resnet18-w16-bn"``, or ``"module:function"`` for a builder
            of the user's own, found with the current directory on the path. The function is called
            with those of the keywords ``inputs`` (number of features), ``input_shape`` and
            ``classes`` that it takes.
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
            activation, norm = (match[3] or "relu").lower(), match[4] and match[4].lower()
            inputs = math.prod(input_shape)
            return fully_connected(inputs, width, depth, classes, norm, activation)
        if match := _LENET5.fullmatch(spec):
            return lenet5(input_shape, classes, batch_norm, int(match[1] or 120))
        if match := _WIDE.fullmatch(spec):
            network = vgg11 if match[1].lower() == "vgg11" else resnet18
            return network(input_shape, classes, int(match[2] or 64), batch_norm)
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

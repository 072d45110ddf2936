"""Builders, user-supplied builders, and checkpoints."""

import math
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hesskern as hk
from hesskern.apps.analyze.wording import network_name
from hesskern.zoo import models


def layer_shapes(model):
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("f200x2", {"fc1": (200, 784), "fc2": (200, 200), "fc3": (10, 200)}),
        ("F64^2", {"fc1": (64, 784), "fc2": (64, 64), "fc3": (10, 64)}),
        ("f32", {"fc1": (32, 784), "fc2": (10, 32)}),
        (
            "f600x4",
            {f"fc{i}": (600, 784 if i == 1 else 600) for i in range(1, 5)} | {"fc5": (10, 600)},
        ),
    ],
)
def test_fully_connected_names_and_shapes(spec, expected):
    model = models.build(spec, (1, 28, 28), 10)
    assert layer_shapes(model) == expected
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_lenet5_is_the_same_network_on_both_image_sizes(shape):
    model = models.build("lenet5", shape, 10)
    assert layer_shapes(model) == {
        "conv1": (6, shape[0], 5, 5),
        "conv2": (16, 6, 5, 5),
        "fc1": (120, 400),
        "fc2": (84, 120),
        "fc3": (10, 84),
    }
    assert model(torch.zeros(2, *shape)).shape == (2, 10)


def test_xavier_weights_and_zero_biases():
    model = models.build("f200x2", (784,), 10, seed=3)
    for module in model:
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / sum(module.weight.shape))
            weight = module.weight.detach()
            assert float(weight.abs().max()) <= bound
            assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert not module.bias.any()


def test_seed_decides_the_weights_and_global_random_state_is_kept():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again, other = (models.build("f8x1", (5,), 3, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.fc1.weight, again.fc1.weight)
    assert not torch.equal(first.fc1.weight, other.fc1.weight)


@pytest.mark.parametrize("spec", ["f16x2-bn", "lenet5-bn"])
def test_batch_norm_stands_after_relu_without_affine_parameters(spec):
    kinds = [type(module) for module in models.build(spec, (1, 28, 28), 10)]
    norms = [i for i, kind in enumerate(kinds) if kind in (nn.BatchNorm1d, nn.BatchNorm2d)]
    assert norms
    assert all(kinds[i - 1] is nn.ReLU for i in norms)
    assert all(
        "bn" not in name for name, _ in models.build(spec, (1, 28, 28), 10).named_parameters()
    )


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("resnet50", (3, 32, 32), "model must be one of f200x2.*got 'resnet50'"),
        ("lenet5", (64,), r"lenet5 needs images.*\[64\]"),
        ("lenet5", (1, 8, 8), "at least 28 x 28"),
        ("f0x2", (4,), "width must be at least 1, got 0"),
        ("f8x0", (4,), "depth must be at least 1, got 0"),
    ],
)
def test_wrong_specs_say_what_is_expected(spec, shape, message):
    with pytest.raises(ValueError, match=message):
        models.build(spec, shape, 10)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def plain():\n    return nn.Linear(6, 3)\n"
        "def sized(inputs, classes, width=4):\n"
        "    layers = nn.Linear(inputs, width), nn.Linear(width, classes)\n"
        "    return nn.Sequential(nn.Flatten(), *layers)\n"
        "def sized_wrong(inputs):\n    return nn.Linear(inputs, 5)\n"
        "def image_only():\n    return nn.Conv2d(3, 4, 3)\n"
        "def number():\n    return 3\n"
        "value = 7\n"
    )
    (tmp_path / "broken_nets.py").write_text("import no_such_library_anywhere\n")
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("my_nets", "broken_nets"):
        sys.modules.pop(name, None)


def test_own_builders_get_the_arguments_they_take(own_module):
    path = list(sys.path)
    assert models.build("my_nets:plain", (6,), 3)(torch.zeros(1, 6)).shape == (1, 3)
    assert models.build("my_nets:sized", (2, 5), 3)(torch.zeros(4, 2, 5)).shape == (4, 3)
    assert sys.path == path


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_nets:plain", "no module 'no_such_nets'"),
        ("my_nets:missing", "no function 'missing'"),
        ("my_nets:value", "no function 'value'"),
        ("my_nets:image_only", r"does not take inputs of shape \[2, 6\]"),
        ("my_nets:sized_wrong", r"must turn inputs \[2, 6\] into logits \[2, 3\], got \[2, 5\]"),
        ("my_nets:number", "number must return a torch.nn.Module, got int"),
    ],
)
def test_own_builders_errors(own_module, spec, message):
    with pytest.raises(ValueError, match=message):
        models.build(spec, (6,), 3)


def test_missing_import_inside_an_own_module_is_shown_as_it_is(own_module):
    with pytest.raises(ModuleNotFoundError, match="no_such_library_anywhere"):
        models.build("broken_nets:plain", (6,), 3)


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_torch_checkpoints_load(tmp_path, wrap):
    source, target = (models.build("f8x1", (5,), 3, seed=s) for s in (1, 2))
    state = source.state_dict()
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "net.pt")
    models.load_checkpoint(target, tmp_path / "net.pt")
    assert torch.equal(target.fc1.weight, source.fc1.weight)


def test_safetensors_checkpoints_load(tmp_path):
    source, target = (models.build("f8x1", (5,), 3, seed=s) for s in (1, 2))
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    models.load_checkpoint(target, tmp_path / "net.safetensors")
    assert torch.equal(target.fc2.weight, source.fc2.weight)


class Payload:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (print, ("code of a checkpoint ran",))


def test_pickled_code_in_a_checkpoint_never_runs(tmp_path, capsys):
    torch.save({"fc1.weight": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt cannot be read as a state dict"):
        models.read_state(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""


def test_damaged_missing_and_foreign_checkpoints(tmp_path):
    model = models.build("f8x1", (5,), 3)
    with pytest.raises(ValueError, match="does not exist"):
        models.load_checkpoint(model, tmp_path / "nothing.pt")
    for name in ("noise.pt", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint at all")
        with pytest.raises(ValueError, match="cannot be read as a state dict"):
            models.load_checkpoint(model, tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        models.load_checkpoint(model, tmp_path / "list.pt")


def test_a_checkpoint_of_another_network_is_refused_and_the_model_kept(tmp_path):
    model = models.build("f8x1", (5,), 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(models.build("f9x2", (5,), 3).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"does not fit.*fc3\.weight is not in the model.* more"):
        models.load_checkpoint(model, tmp_path / "other.pt")
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_width_of_lenet5():
    model = models.build("lenet5-w80", (3, 32, 32), 10)
    assert layer_shapes(model)["fc1"] == (80, 400)
    assert layer_shapes(model)["fc2"] == (84, 80)
    normed = models.build("LeNet5-w80-bn", (1, 28, 28), 10)
    assert normed.bn3.num_features == 80
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        models.lenet5((1, 28, 28), hidden=0)


def test_vgg11():
    model = models.build("vgg11-w2", (3, 32, 32), 10)
    shapes = layer_shapes(model)
    assert [shapes[f"conv{i}"][0] for i in range(1, 9)] == [2, 4, 8, 8, 16, 16, 16, 16]
    assert [shapes[f"fc{i}"] for i in (1, 2, 3)] == [(16, 16), (16, 16), (10, 16)]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    normed = models.build("VGG11-W2-bn", (3, 32, 32), 10)
    assert sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in normed) == 10
    assert models.build("vgg11", (3, 32, 32), 10).conv1.out_channels == 64
    with pytest.raises(ValueError, match=r"vgg11 needs images .* at least 32 x 32 pixels"):
        models.build("vgg11-w2", (1, 28, 28), 10)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        models.build("vgg11-w0", (3, 32, 32), 10)


def test_resnet18():
    model = models.build("resnet18-w2", (3, 32, 32), 10)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 1 + 8 * 2 + 3
    assert [model.get_submodule(f"block{i}").conv2.out_channels for i in range(1, 9)] == [
        2, 2, 4, 4, 8, 8, 16, 16,
    ]  # fmt: skip
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert model(x).shape == (2, 10)
    assert model.block8(torch.zeros(1, 16, 4, 4)).shape == (1, 16, 4, 4)
    block = model.block3
    hidden = torch.relu(block.conv1(model.block2(x[:, :2])))
    expected = torch.relu(block.conv2(hidden) + block.shortcut(model.block2(x[:, :2])))
    assert torch.equal(block(model.block2(x[:, :2])), expected)
    assert "norm1" not in dict(model.named_children())
    normed = models.build("resnet18-w2-bn", (3, 32, 32), 10)
    norms = [m for m in normed.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == len(convolutions)
    assert not any(m.affine for m in norms)
    bound = (6 / (9 * (2 + 2))) ** 0.5
    assert float(model.block1.conv1.weight.detach().abs().max()) <= bound
    with pytest.raises(ValueError, match="resnet18 needs images"):
        models.build("resnet18-w2", (64,), 10)


@pytest.mark.parametrize("spec", ["vgg11-w2", "resnet18-w2-bn"])
def test_every_layer_of_the_wide_networks_is_analysed(spec):
    model = models.build(spec, (3, 32, 32), 10)
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(6, 3, 32, 32, generator=generator), torch.arange(6) % 10)]
    loss = torch.nn.CrossEntropyLoss()
    factors = hk.kronecker_factors(model, data, loss)
    hessians = hk.layer_hessians(model, data, loss, memory_budget=2**25)
    layers = [
        name
        for name, m in model.named_modules()
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    assert list(factors) == list(hessians) == layers
    for name, H in hessians.items():
        assert H.is_exact, name
        assert H.trace() > 0, name
        assert factors[name].layer_shape == H.layer_shape


def test_activations_and_norms_of_fully_connected_networks():
    names = [name for name, _ in models.build("f8x2-tanh-ln", (4,), 3).named_children()]
    assert names == ["flatten", "fc1", "tanh1", "ln1", "fc2", "tanh2", "ln2", "fc3"]
    assert isinstance(models.build("F8-GELU", (4,), 3).gelu1, nn.GELU)
    assert not models.build("f8-ln", (4,), 3).ln1.elementwise_affine
    with pytest.raises(ValueError, match="norm must be None, 'bn' or 'ln', got 'gn'"):
        models.fully_connected(4, 8, 1, 3, "gn")
    with pytest.raises(ValueError, match="activation must be relu, tanh or gelu, got 'elu'"):
        models.fully_connected(4, 8, 1, 3, activation="elu")


def test_names_of_networks():
    for spec, name in (
        ("f200x2", "F-200²"),
        ("F64^1-BN", "F-64 with batch norm"),
        ("f32x3-gelu-ln", "F-32³ (GELU) with layer norm"),
        ("lenet5-w80-bn", "LeNet5 (fc1 80) with batch norm"),
        ("vgg11", "VGG11"),
        ("resnet18-w16-bn", "ResNet18-W16 with batch norm"),
        ("my.nets:lenet5", "my.nets:lenet5"),
    ):
        assert network_name(spec) == name

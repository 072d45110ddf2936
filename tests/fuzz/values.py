"""Rules of the grammar: what happens to values between layers."""

from __future__ import annotations

from fuzz.builder import Builder, Rejected, Value, production
from fuzz.layers import LAST

ALL = "vsft12"

SMOOTH = (
    "torch.tanh({0})",
    "torch.sigmoid({0})",
    "F.gelu({0})",
    "F.gelu({0}, approximate='tanh')",
    "F.silu({0})",
    "F.softplus({0})",
    "F.elu({0})",
    "F.celu({0})",
    "F.selu({0})",
    "F.mish({0})",
    "F.logsigmoid({0})",
    "F.tanhshrink({0})",
    "F.softsign({0})",
    "{0}.square()",
    "{0}.sin()",
    "{0}.exp().clamp(max=3.0)",
    "{0} ** 2",
    "1 / (1 + {0}.square())",
    "({0}.square() + 0.1).sqrt()",
    "({0}.abs() + 0.1).log()",
)
KINKED = (
    "F.relu({0})",
    "F.relu({0})",
    "F.relu({0})",
    "F.leaky_relu({0}, 0.2)",
    "F.hardtanh({0}, -0.8, 0.7)",
    "F.relu6({0})",
    "F.hardsigmoid({0})",
    "F.hardswish({0})",
    "F.hardshrink({0}, 0.2)",
    "F.softshrink({0}, 0.1)",
    "F.threshold({0}, 0.1, -0.3)",
    "F.rrelu({0})",
    "{0}.abs()",
    "{0}.clamp(-0.5, 0.6)",
    "torch.maximum({0}, -0.3 * {0})",
    "torch.minimum({0}, {0}.new_tensor(0.2))",
)
IN_PLACE = (
    "F.relu_({0})",
    "F.relu({0}, inplace=True)",
    "{0}.clamp_(min=-0.2)",
    "{0}.mul_(1.5)",
    "{0}.add_(0.3)",
    "{0}.tanh_()",
    "{0}.sigmoid_()",
    "F.leaky_relu_({0}, 0.1)",
    "F.silu({0}, inplace=True)",
    "F.hardtanh_({0})",
    "F.elu_({0})",
)


@production(ALL, 5)
def activation(b: Builder, h: Value) -> Value:
    return b.value(b.pick(b.pick((SMOOTH, KINKED), (2, 3))).format(h.name), h.layout)


@production(ALL, 1.2)
def activation_module(b: Builder, h: Value) -> Value:
    kinds = (
        "ReLU()",
        "ReLU(inplace=True)",
        "Hardtanh()",
        "GELU()",
        "Tanh()",
        "SiLU(inplace=True)",
        "Dropout(0.5)",
        "Identity()",
        "RReLU()",
        "CELU()",
        "Softmax(-1)",
        "LogSoftmax(-1)",
        "Softmin(-1)",
    )
    if h.layout == "f":
        kinds = kinds[:-3]
    name = b.module("a", f"nn.{b.pick(kinds)}")
    if b.is_batch(h):
        raise Rejected("the batch itself")
    return b.value(f"self.{name}({h.name})", h.layout)


@production(ALL, 1.2)
def in_place(b: Builder, h: Value) -> Value:
    if b.is_batch(h):
        raise Rejected("the batch itself")
    return b.value(b.pick(IN_PLACE).format(h.name), h.layout)


@production("v1s2", 0.4)
def in_place_on_a_part(b: Builder, h: Value) -> Value:
    if b.is_batch(h):
        raise Rejected("the batch itself")
    copy = b.value(f"{h.name} * 1.0", h.layout)
    b.line(
        b.pick(
            (
                f"{copy.name}[:, 0] = {copy.name}[:, -1]",
                f"{copy.name}[:, :1].relu_()",
                f"{copy.name}[:, :1] *= 2.0",
                f"{copy.name}[..., -1] = 0.0",
            )
        )
    )
    return copy


@production(LAST, 0.8)
def softmax(b: Builder, h: Value) -> Value:
    return b.value(
        f"{h.name}.softmax(-1)" if b.chance(0.7) else f"{h.name}.log_softmax(-1)", h.layout
    )


@production(LAST, 0.5)
def normalized(b: Builder, h: Value) -> Value:
    forms = (
        "F.normalize({0} + 0.1, dim=-1)",
        "{0} / ({0}.abs().sum(-1, keepdim=True) + 0.5)",
        "{0} - {0}.mean(-1, keepdim=True)",
        "{0}.cumsum(-1)",
        "{0} - {0}.logsumexp(-1, keepdim=True)",
        "{0}.sort(-1).values",
        "{0}.flip(-1)",
        "{0}.roll(1, -1)",
    )
    return b.value(b.pick(forms).format(h.name), h.layout)


@production(LAST, 0.7)
def gated_linear_unit(b: Builder, h: Value) -> Value:
    d = b.shape(h)[-1]
    if d % 2:
        raise Rejected("odd width")
    return b.value(
        b.pick((f"F.glu({h.name})", f"{h.name}[..., :{d // 2}] * {h.name}[..., {d // 2}:]")),
        h.layout,
    )


@production(ALL, 2)
def residual(b: Builder, h: Value) -> Value:
    other = b.pick(b.like(h))
    forms = ("{0} + {1}", "{0} - 0.5 * {1}", "torch.add({0}, {1}, alpha=2)", "({0} + {1}) / 2")
    return b.value(b.pick(forms).format(h.name, other.name), h.layout)


@production(ALL, 2)
def gate(b: Builder, h: Value) -> Value:
    other = b.pick(b.like(h) or [h])
    forms = (
        "{0} * {1}.sigmoid()",
        "{0} * {1}",
        "{0} * ({1} > 0.1)",
        "({1} > 0) * {0}",
        "{0} * ({1} > 0).int()",
        "torch.where({1} > 0, {0}, {1})",
        "torch.where({1} > 0, {0}, -0.5 * {0})",
        "torch.where({1} > 0.0, {0}, 0.0)",
        "{0}.masked_fill({1} < -0.5, 0.0)",
        "torch.lerp({0}, {1}, 0.3)",
        "torch.addcmul({0}, {1}, {0}, value=0.3)",
        "{0} / (1.0 + {1}.abs())",
        "torch.maximum({0}, {1})",
    )
    return b.value(b.pick(forms).format(h.name, other.name), h.layout)


@production(ALL, 1.2, strange=True)
def gate_by_constant(b: Builder, h: Value) -> Value:
    other = b.pick(b.like(h) or [h]) if b.chance(0.5) else h
    forms = (
        "{0} * cut({1})",
        "{0} + cut({1})",
        "{0} * cut({1}).sigmoid()",
        "{0} / (1 + cut({1}).abs())",
        "{0} + cut({0}.round() - {0})",
    )
    return b.value(b.pick(forms).format(h.name, other.name), h.layout)


@production(ALL, 1)
def broadcast(b: Builder, h: Value) -> Value:
    shape = b.shape(h)
    forms = ["{0} * 2", "3 - {0}", "{0} * True", "{0} / 3", "-{0}"]
    sizes = [1 if b.chance(0.4) else s for s in shape]
    # The axis of the samples differs between batches.
    axis = 1 if h.layout == "f" else 0
    sizes[axis] = 1
    if h.layout == "f" or h.layout == "t":
        sizes[0] = 1
    name = b.name("k")
    b.setup(f"self.register_buffer('{name}', torch.zeros({tuple(sizes)}).double())")
    forms += [f"{{0}} * self.{name}", f"{{0}} + self.{name}", f"self.{name} - {{0}}"] * 2
    forms += [f"{{0}} * (self.{name} > 0)", f"torch.where(self.{name} > 0, {{0}}, {{0}} * 0.1)"]
    return b.value(b.pick(forms).format(h.name), h.layout)


@production("vst12", 0.8)
def broadcast_of_the_sample(b: Builder, h: Value) -> Value:
    axes = "".join(", None" for _ in range(len(b.shape(h)) - 2))
    forms = (
        "{0} * {0}.amax(-1, keepdim=True)",
        "{0} * {0}.mean(1, keepdim=True).sigmoid()",
        "{0} + {0}.sum(1, keepdim=True)",
        "{0} * ({0}[:, :1] > 0)",
        "{0} * ({0}.flatten(1).sum(1)[:, None" + axes + "] > 0)",
        "{0} * {0}.flatten(1).norm(dim=1)[:, None" + axes + "]",
    )
    return b.value(b.pick(forms).format(h.name), h.layout)


@production("v", 0.7)
def join(b: Builder, h: Value) -> Value:
    other = b.pick([v for v in b.pool if v.layout == "v"])
    forms = ["torch.cat([{0}, {1}], 1)", "torch.cat([{0}, {0}.relu()], dim=-1)"]
    if b.shape(other) == b.shape(h):
        forms += ["torch.stack([{0}, {1}], 1).mean(1)", "torch.stack([{0}, {1}]).amax(0)"]
        forms += ["sum([{0}, {1}])", "torch.stack([{0}, {1}], -1).flatten(1)"]
    return b.value(b.pick(forms).format(h.name, other.name), "v")


@production("vs12", 0.8)
def part(b: Builder, h: Value) -> Value:
    forms = {
        "v": ("{0}[:, 1:]", "{0}[:, ::2]", "{0}[:, [0, -1]]", "F.pad({0}, (1, 1))", "{0}.flip(1)"),
        "s": ("{0}[:, 1:]", "{0}[:, :, :-1]", "F.pad({0}, (0, 0, 1, 0))", "{0}.roll(1, 1)"),
        "1": ("{0}[:, :, 1:]", "F.pad({0}, (1, 0))", "{0}[:, :, ::2]", "{0}.flip(2)"),
        "2": ("{0}[:, :, 1:]", "F.pad({0}, (1, 0, 0, 1))", "{0}[..., ::2]", "{0}.transpose(2, 3)"),
    }[h.layout]
    return b.value(b.pick(forms).format(h.name), h.layout)


@production("12", 1.2)
def pool(b: Builder, h: Value) -> Value:
    a = h.layout
    forms = [
        f"F.max_pool{a}d({{0}}, 2)",
        f"F.avg_pool{a}d({{0}}, 2)",
        f"F.adaptive_avg_pool{a}d({{0}}, 2)",
        f"F.adaptive_max_pool{a}d({{0}}, 2)",
        f"F.max_pool{a}d({{0}}, 2, stride=1, padding=1)",
        "F.interpolate({0}, scale_factor=2)",
        f"F.lp_pool{a}d({{0}}.abs() + 0.1, 2.0, 2)",
    ]
    if a == "2":
        forms += ["F.interpolate({0}, size=(3, 2), mode='bilinear')", "F.pixel_unshuffle({0}, 2)"]
    return b.value(b.pick(forms).format(h.name), a)


@production("v", 1)
def from_vector(b: Builder, h: Value) -> Value:
    d = b.shape(h)[1]
    n = f"len({h.name})"
    options = [("s", f"{h.name}.unsqueeze(1).expand(-1, 3, -1)")]
    for t in (2, 3):
        if d % t == 0:
            options.append(("s", f"{h.name}.view({n}, {t}, {d // t})"))
            options.append(("1", f"{h.name}.reshape({n}, {t}, {d // t})"))
    if d == 4:
        options.append(("2", f"{h.name}.unflatten(1, (1, 2, 2))"))
    layout, expression = b.pick(options)
    return b.value(expression, layout)


@production("s", 2.5)
def from_sequence(b: Builder, h: Value) -> Value:
    x = h.name
    layout, expression = b.pick(
        (
            ("v", f"{x}.mean(1)"),
            ("v", f"{x}.flatten(1)"),
            ("v", f"{x}[:, 0]"),
            ("v", f"{x}[:, -1]"),
            ("v", f"{x}.amax(1)"),
            ("v", f"{x}.max(1).values"),
            ("v", f"({x}.softmax(1) * {x}).sum(1)"),
            ("1", f"{x}.transpose(1, 2)"),
            ("1", f"{x}.permute(0, 2, 1).contiguous()"),
            ("2", f"{x}.unsqueeze(1)"),
            ("f", f"{x}.transpose(0, 1)"),
            ("f", f"{x}.transpose(0, 1).contiguous()"),
        )
    )
    if layout == "f":
        b.feature("sequence first", strange=True)
    return b.value(expression, layout)


@production("f", 3)
def from_sequence_first(b: Builder, h: Value) -> Value:
    x = h.name
    layout, expression = b.pick(
        (
            ("s", f"{x}.transpose(0, 1)"),
            ("v", f"{x}.mean(0)"),
            ("v", f"{x}[-1]"),
            ("v", f"{x}.amax(0)"),
            ("1", f"{x}.permute(1, 2, 0)"),
        )
    )
    return b.value(expression, layout)


@production("1", 1.5)
def from_signal(b: Builder, h: Value) -> Value:
    layout, expression = b.pick(
        (
            ("v", f"{h.name}.flatten(1)"),
            ("v", f"{h.name}.mean(2)"),
            ("v", f"F.adaptive_avg_pool1d({h.name}, 1).squeeze(2)"),
            ("s", f"{h.name}.transpose(1, 2)"),
            ("2", f"{h.name}.unsqueeze(2)"),
        )
    )
    return b.value(expression, layout)


@production("2", 1.5)
def from_image(b: Builder, h: Value) -> Value:
    layout, expression = b.pick(
        (
            ("v", f"{h.name}.flatten(1)"),
            ("v", f"{h.name}.mean((2, 3))"),
            ("v", f"F.adaptive_max_pool2d({h.name}, 1).flatten(1)"),
            ("1", f"{h.name}.flatten(2)"),
            ("s", f"{h.name}.flatten(2).transpose(1, 2)"),
        )
    )
    return b.value(expression, layout)


@production("s", 0.8, strange=True)
def tokens_in_one_axis(b: Builder, h: Value) -> Value:
    """Through a layer on [N T, c] and back."""
    from fuzz.layers import applied, make_linear

    _, t, d = b.shape(h)
    flat = b.value(f"{h.name}.reshape(-1, {d})", "t")
    layer = make_linear(b, d, b.width())
    result = b.value(applied(b, layer, flat.name, 2), "t")
    if b.chance(0.5):
        result = b.value(f"{result.name}.relu()", "t")
    return b.value(f"{result.name}.unflatten(0, (-1, {t}))", "s")

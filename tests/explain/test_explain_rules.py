"""Each rule of maehpc.explain.rules against dense multiplier matrices and relevances written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from maehpc.errors import InputError
from maehpc.explain.rules import Ruled, Tape
from maehpc.explain.rules.tape import tanh_over, threshold

RULES = ("gradient", "deeplift", "captum", "attnlrp")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def recorded(function, baselines, strict="deeplift"):
    tape = Tape(recording=True, strict=strict)
    with Ruled(tape):
        value = function(*(b.detach().clone().requires_grad_() for b in baselines))
    return tape.baseline, value.detach()


def pulled(function, inputs, g, rule, baselines=None, create_graph=False):
    """What `rule` makes of g at the function's value, pulled back to each input."""
    tape = Tape(baseline=[] if baselines is None else recorded(function, baselines)[0], keeps_scores=True)
    points = [x if create_graph else x.detach().clone().requires_grad_() for x in inputs]
    with Ruled(tape):
        value = function(*points)
    tape.rule = rule
    result = torch.autograd.grad(value, points, g, create_graph=create_graph)
    tape.rule = "gradient"
    return result


def close(ours, theirs, relative=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=relative * max(theirs.abs().max().item(), 1e-300))


# Dense references. M is the matrix of multipliers: y - y0 = M (x - x0); what is pulled back is M^T g.


def softmax_multipliers(s, s0):
    """M of one row, element by element: L_i (d_ij - L_j / sum L), L the logarithmic mean of p and p0."""
    log_p, log_p0 = (x - x.logsumexp(0) for x in (s, s0))
    size, mean = len(s), []
    for a, b in zip(log_p.tolist(), log_p0.tolist(), strict=True):
        mean.append(math.exp(a) if abs(a - b) < 1e-9 else (math.exp(a) - math.exp(b)) / (a - b))
    total = sum(mean)
    return torch.tensor(
        [[mean[i] * ((i == j) - mean[j] / total) for j in range(size)] for i in range(size)], dtype=torch.float64
    )


def norm_multipliers(x, x0, weight, eps, centred):
    """M of one token: diag(w) (r' I + c' (r - r0)/(v - v0) 2 c'^T / n) C."""
    size = len(x)
    centring = torch.eye(size, dtype=torch.float64) - (1 / size if centred else 0)
    c, c0 = centring @ x, centring @ x0
    v, v0 = c @ c / size, c0 @ c0 / size
    r, r0 = (v + eps) ** -0.5, (v0 + eps) ** -0.5
    slope = -(r**3) / 2 if v == v0 else (r - r0) / (v - v0)
    middle = (c + c0) / 2
    return (
        torch.diag(weight)
        @ ((r + r0) / 2 * torch.eye(size, dtype=torch.float64) + 2 / size * slope * torch.outer(middle, middle))
        @ centring
    )


def attention_pulled(q, k, v, q0, k0, v0, mask, scale, g):
    """Images and heads one by one; queries [B, H, N, e]; baselines have one image."""
    results = [torch.zeros_like(x) for x in (q, k, v)]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            one, zero = [x[b, h] for x in (q, k, v)], [x[0, h] for x in (q0, k0, v0)]
            bias = 0 if mask is None else mask.expand(q.shape[0], q.shape[1], *mask.shape[2:])[b, h]
            s, s0 = (scale * pair[0] @ pair[1].T + bias for pair in (one, zero))
            p, p0 = s.softmax(1), s0.softmax(1)
            q_mid, k_mid, v_mid = ((x + x0) / 2 for x, x0 in zip(one, zero, strict=True))
            for i in range(len(s)):
                matrix = softmax_multipliers(s[i], s0[i])
                for d in range(v.shape[-1]):
                    results[2][b, h, :, d] += g[b, h, i, d] * (p[i] + p0[i]) / 2
                    to_scores = g[b, h, i, d] * (matrix.T @ v_mid[:, d])
                    results[0][b, h, i] += scale * to_scores @ k_mid
                    results[1][b, h] += scale * torch.outer(to_scores, q_mid[i])
    return results


def attention_inputs(images=2, heads=3, queries=4, keys=5, width=3, values=2, size=1.5, seed=0):
    shapes = [(heads, queries, width), (heads, keys, width), (heads, keys, values)]
    ours = [size * normal(images, *shape, seed=seed + i) for i, shape in enumerate(shapes)]
    return ours, [size * normal(1, *shape, seed=seed + 9 + i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("scale", [None, 0.7, 4.0])
@pytest.mark.parametrize("masked", [None, (1, 1), (1, 3), (2, 3)])
def test_attention(scale, masked):
    inputs, baselines = attention_inputs()
    mask = None if masked is None else normal(*masked, 4, 5, seed=20)
    if masked == (2, 3):  # one mask an image, which a baseline of one image has no counterpart of
        inputs, mask = [x[:1] for x in inputs], mask[:1]
    g = normal(len(inputs[0]), 3, 4, 2, seed=21)

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    ours = pulled(function, inputs, g, "deeplift", baselines)
    theirs = attention_pulled(*inputs, *baselines, mask, scale or 3**-0.5, g)
    for mine, reference in zip(ours, theirs, strict=True):
        close(mine, reference)


@pytest.mark.parametrize("boolean", [True, False])
def test_attention_behind_a_mask(boolean):
    """Keys that no query may see: multipliers are those without these keys, and 0 at them; nothing is NaN."""
    inputs, baselines = attention_inputs()
    g = normal(2, 3, 4, 2, seed=21)
    seen = torch.tensor([True, False, True, True, False]).expand(4, 5)
    mask = seen if boolean else torch.zeros(4, 5).double().masked_fill(~seen, -torch.inf)
    ours = pulled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), inputs, g, "deeplift", baselines)
    kept = [0, 2, 3]
    few = [[q, k[:, :, kept], v[:, :, kept]] for q, k, v in (inputs, baselines)]
    theirs = attention_pulled(*few[0], *few[1], None, 3**-0.5, g)
    close(ours[0], theirs[0])
    for mine, reference in zip(ours[1:], theirs[1:], strict=True):
        close(mine[:, :, kept], reference)
        assert not mine[:, :, [1, 4]].any()


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_softmax(size):
    """Up to weights that underflow to 0 at one of the two points or at both."""
    s, s0 = size * normal(2, 3, 6), size * normal(1, 3, 6, seed=1)
    s[0, 0] = s0[0, 0]
    s[1, 1, :3] = s0[0, 1, :3]
    g = normal(2, 3, 6, seed=2)
    (ours,) = pulled(lambda x: x.softmax(dim=-1), [s], g, "deeplift", [s0])
    rows = [(b, n) for b in range(2) for n in range(3)]
    theirs = torch.stack([softmax_multipliers(s[b, n], s0[0, n]).T @ g[b, n] for b, n in rows]).reshape(g.shape)
    close(ours, theirs, 1e-11)


def test_softmax_behind_a_mask():
    s, s0, g = normal(2, 3, 6), normal(1, 3, 6, seed=1), normal(2, 3, 6, seed=2)
    mask = torch.zeros(6).double()
    mask[[1, 4]] = -torch.inf
    (ours,) = pulled(lambda x: F.softmax(x + mask, -1), [s], g, "deeplift", [s0])
    kept = [0, 2, 3, 5]
    (few,) = pulled(lambda x: F.softmax(x, -1), [s[..., kept]], g[..., kept], "deeplift", [s0[..., kept]])
    close(ours[..., kept], few)
    assert not ours[..., [1, 4]].any()


NORMS = {
    "layer": lambda weight, bias, eps: lambda x: F.layer_norm(x, x.shape[-1:], weight, bias, eps),
    "plain layer": lambda weight, bias, eps: lambda x: F.layer_norm(x, x.shape[-1:], None, None, eps),
    "rms": lambda weight, bias, eps: lambda x: F.rms_norm(x, x.shape[-1:], weight, eps),
    "plain rms": lambda weight, bias, eps: lambda x: F.rms_norm(x, x.shape[-1:], None, eps),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_norm(kind, eps):
    x, x0, g = 2 * normal(2, 3, 5) + 1, normal(1, 3, 5, seed=1), normal(2, 3, 5, seed=2)
    x[0, 0] = x0[0, 0]
    x0[0, 1] = 0.25  # no variance
    weight, bias = normal(5, seed=3), normal(5, seed=4)
    (ours,) = pulled(NORMS[kind](weight, bias, eps), [x], g, "deeplift", [x0])
    used = torch.ones(5).double() if "plain" in kind else weight
    rows = [(b, n) for b in range(2) for n in range(3)]
    matrices = [norm_multipliers(x[b, n], x0[0, n], used, eps, "layer" in kind) for b, n in rows]
    theirs = torch.stack([m.T @ g[b, n] for m, (b, n) in zip(matrices, rows, strict=True)]).reshape(g.shape)
    close(ours, theirs, 1e-11)


def test_rms_norm_without_eps():
    x, x0, g = normal(2, 5), normal(1, 5, seed=1), normal(2, 5, seed=2)
    (ours,) = pulled(nn.RMSNorm(5, elementwise_affine=False), [x], g, "deeplift", [x0])
    eps = torch.finfo(torch.float64).eps
    theirs = [norm_multipliers(a, x0[0], torch.ones(5).double(), eps, False).T @ b for a, b in zip(x, g, strict=True)]
    close(ours, torch.stack(theirs))


@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [((4, 5), (4, 5)), ((4, 5), (4, 1)), ((1, 5), (4, 5)), ((4, 1), (1, 5)), ((4, 5), (1, 1))],
)
def test_product(a_shape, b_shape):
    """Every pair of elements that meet: g (b + b0)/2 to one, g (a + a0)/2 to the other."""
    a, b = normal(2, *a_shape), normal(2, *b_shape, seed=1)
    a0, b0 = normal(1, *a.shape[1:], seed=2), normal(1, *b.shape[1:], seed=3)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    g = normal(*shape, seed=4)
    ours = pulled(lambda x, y: x * y, [a, b], g, "deeplift", [a0, b0])
    theirs = torch.zeros_like(a), torch.zeros_like(b)

    def place(index, like):
        return tuple(0 if size == 1 else i for i, size in zip(index, like.shape, strict=True))

    for index in torch.cartesian_prod(*(torch.arange(size) for size in shape)).tolist():
        at, zero = [place(index, x) for x in (a, b)], [place(index, x) for x in (a0, b0)]
        theirs[0][at[0]] += g[tuple(index)] * (b[at[1]] + b0[zero[1]]) / 2
        theirs[1][at[1]] += g[tuple(index)] * (a[at[0]] + a0[zero[0]]) / 2
    for mine, reference in zip(ours, theirs, strict=True):
        close(mine, reference)


@pytest.mark.parametrize(
    ("a_shape", "b_shape"), [((3, 4, 5), (3, 5, 2)), ((1, 4, 5), (3, 5, 2)), ((3, 4, 5), (1, 5, 2)), ((4, 5), (5, 2))]
)
@pytest.mark.parametrize("product", [torch.matmul, lambda a, b: a @ b])
def test_matrix_product(a_shape, b_shape, product):
    a, b, a0, b0 = normal(2, *a_shape), normal(2, *b_shape, seed=1), normal(1, *a_shape, seed=2), normal(1, *b_shape)
    value = a @ b
    g = normal(*value.shape, seed=3)
    ours = pulled(product, [a, b], g, "deeplift", [a0, b0])
    heads = value.shape[1] if value.ndim == 4 else 1
    wide = [x.reshape(len(x), -1, *x.shape[-2:]).expand(-1, heads, -1, -1) for x in (a, b, a0, b0)]
    middle_a, middle_b = (wide[0] + wide[2]) / 2, (wide[1] + wide[3]) / 2
    out = g.reshape(2, heads, *g.shape[-2:])
    theirs = torch.einsum("bhij,bhkj->bhik", out, middle_b), torch.einsum("bhij,bhik->bhkj", out, middle_a)
    for mine, reference, x in zip(ours, theirs, (a, b), strict=True):
        summed = reference.sum(1, keepdim=True) if x.ndim == 4 and x.shape[1] == 1 else reference
        close(mine, summed.reshape(x.shape))


def test_square_is_a_product_of_one_value():
    x, x0, g = normal(2, 3), normal(1, 3, seed=1), normal(2, 3, seed=2)
    (ours,) = pulled(lambda x: x * x, [x], g, "deeplift", [x0])
    close(ours, g * (x + x0))


def erf_gelu(x):
    return x / 2 * math.erfc(-x / 2**0.5)


def tanh_gelu(x):
    return x / 2 * (1 + math.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def logistic(x):
    return 1 / (1 + math.exp(-x))


ACTIVATIONS = {
    "gelu": (F.gelu, erf_gelu),
    "tanh gelu": (lambda x: F.gelu(x, approximate="tanh"), tanh_gelu),
    "silu": (F.silu, lambda x: x * logistic(x)),
    "relu": (F.relu, lambda x: max(x, 0.0)),
    "sigmoid": (torch.sigmoid, logistic),
    "tanh": (torch.tanh, math.tanh),
    "elu": (F.elu, lambda x: x if x > 0 else math.expm1(x)),
    "steep elu": (lambda x: F.elu(x, 1.5), lambda x: x if x > 0 else 1.5 * math.expm1(x)),
    "leaky relu": (F.leaky_relu, lambda x: x if x > 0 else 0.01 * x),
    "softplus": (F.softplus, lambda x: math.log1p(math.exp(-abs(x))) + max(x, 0.0)),
}
CAPTUM = {"relu", "sigmoid", "tanh", "elu", "steep elu", "leaky relu", "softplus"}
POINTS = torch.tensor([-30, -6, -2.5, -1, -0.3, 0, 0.2, 0.9, 1.7, 4, 30], dtype=torch.float64)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name):
    """The rescale rule at every pair of points: the quotient of differences."""
    function, value = ACTIVATIONS[name]
    x, x0 = POINTS[:, None].expand(-1, len(POINTS)).clone(), POINTS[None].clone()
    g = normal(*x.shape)
    (ours,) = pulled(function, [x], g, "deeplift", [x0])
    (gradient,) = pulled(function, [x], g, "gradient")
    quotients = torch.tensor(
        [[(value(a) - value(b)) / (a - b) if a != b else math.nan for b in POINTS.tolist()] for a in POINTS.tolist()],
        dtype=torch.float64,
    )
    theirs = torch.where(quotients.isnan(), gradient, g * quotients)
    close(ours, theirs, 1e-13)
    close(pulled(function, [x], g, "captum", [x0])[0], theirs if name in CAPTUM else gradient, 1e-13)


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"relu", "leaky relu", "elu", "steep elu"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy_near_the_baseline(name, dtype):
    """The mean of the derivative between two points, by quadrature in float64, is what both branches approximate.

    The bound lies far below what the bare quotient of differences gives at the smallest steps.
    """
    function, _ = ACTIVATIONS[name]
    x0 = torch.linspace(-4, 4, 401, dtype=dtype)[None]
    steps = torch.logspace(math.log10(torch.finfo(dtype).eps), 0, 40, dtype=dtype)[:, None]
    x = x0 + steps
    (ours,) = pulled(function, [x], torch.ones_like(x), "deeplift", [x0])
    wide, wide0 = x.double(), x0.double()
    nodes = torch.tensor([-(0.6**0.5), 0, 0.6**0.5], dtype=torch.float64)
    theirs = torch.zeros_like(wide)
    for part in range(16):  # Gauss's rule of three nodes on each sixteenth
        for node, weight in zip(nodes, (5 / 18, 8 / 18, 5 / 18), strict=True):
            point = wide0 + (wide - wide0) * (part + (1 + node) / 2) / 16
            theirs += pulled(function, [point], torch.ones_like(point), "gradient")[0] * weight / 16
    error = (ours.double() - theirs).abs().max().item()
    # Where the quotient takes over it divides PyTorch's own error by the least step: in float32 its GELU is off by 4 to
    # 9 eps at -3.5, depending on the CPU. Below, the derivative in the middle is off by step^2 / 24 times the third.
    own = max((function(at).double() - function(at.double())).abs().max().item() for at in (x, x0))
    least = threshold(x)
    assert error < 2 * max(own, 4 * torch.finfo(dtype).eps) / least + least**2 / 24
    quotient = ((function(x) - function(x0)) / (x - x0)).nan_to_num()
    assert (quotient.double() - theirs).abs().max() > 20 * error


def test_activation_of_a_transposed_input():
    x, x0, g = normal(2, 3, 4), normal(1, 3, 4, seed=1), normal(2, 4, 3, seed=2)
    (ours,) = pulled(lambda x: F.gelu(x.transpose(1, 2)), [x], g, "deeplift", [x0])
    (straight,) = pulled(F.gelu, [x], g.transpose(1, 2).contiguous(), "deeplift", [x0])
    close(ours, straight)


def test_gates():
    """SwiGLU, silu(a) b, and the sigmoid form of GELU: rescale rule inside, midpoints of the product outside."""
    a, b, g = normal(2, 5), normal(2, 5, seed=1), normal(2, 5, seed=2)
    a0, b0 = normal(1, 5, seed=3), normal(1, 5, seed=4)
    secant = (F.silu(a) - F.silu(a0)) / (a - a0)
    ours = pulled(lambda a, b: F.silu(a) * b, [a, b], g, "deeplift", [a0, b0])
    close(ours[0], g * (b + b0) / 2 * secant)
    close(ours[1], g * (F.silu(a) + F.silu(a0)) / 2)
    (quick,) = pulled(lambda a: a * torch.sigmoid(1.702 * a), [a], g, "deeplift", [a0])
    gate, gate0 = torch.sigmoid(1.702 * a), torch.sigmoid(1.702 * a0)
    close(quick, g * ((gate + gate0) / 2 + (a + a0) / 2 * (gate - gate0) / (a - a0)))


def test_gates_of_halves_of_one_value():
    """SwiGLU as timm packs it: both factors are views of one tensor, not contiguous."""
    x, x0, g = normal(2, 3, 8), normal(1, 3, 8, seed=1), normal(2, 3, 4, seed=2)

    def packed(x):
        a, b = x.chunk(2, dim=-1)
        return F.silu(a) * b

    (ours,) = pulled(packed, [x], g, "deeplift", [x0])
    halves = [[y[..., :4].contiguous(), y[..., 4:].contiguous()] for y in (x, x0)]
    close(ours, torch.cat(pulled(lambda a, b: F.silu(a) * b, halves[0], g, "deeplift", halves[1]), dim=-1))


# Summation to delta, at any two points.


FUNCTIONS = {
    **{name: function for name, (function, _) in ACTIVATIONS.items()},
    **{name: make(None, None, 1e-6) for name, make in NORMS.items() if "plain" in name},
    "softmax": lambda x: x.softmax(-1),
    "attention": lambda x: F.scaled_dot_product_attention(*x[:, None].chunk(3, dim=-1)),
    "square": lambda x: x * x,
    "gram": lambda x: x @ x.transpose(-1, -2),
    "gate": lambda x: F.silu(x) * x.flip(-1),
}


@given(
    st.sampled_from(sorted(FUNCTIONS)),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([1e-3, 1.0, 20.0, 300.0]),
    st.sampled_from([0.0, 1e-12, 1e-7, 1e-4, 3e-3, 0.1, 1.0, 40.0]),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.integers(0, 1000),
)
@example("gate", torch.float32, 1, 1, 1, 1e-3, 40.0, 0.5, 64)
@example("gelu", torch.float64, 1, 1, 1, 20.0, 1e-7, 0.0, 491)
@example("gelu", torch.float32, 3, 1, 2, 20.0, 1e-4, 0.0, 279)
@example("tanh gelu", torch.float64, 2, 1, 1, 20.0, 1e-12, 0.5, 274)
@settings(max_examples=400, deadline=None)
def test_summation_to_delta(name, dtype, images, tokens, width, size, step, equal, seed):
    """sum m (x - x0) = g (f(x) - f(x0)), up to rounding; x and x0 are equal in a share of places."""
    function = FUNCTIONS[name]
    x0 = size * normal(1, tokens, 3 * width, seed=seed)
    keep = torch.rand(images, tokens, 3 * width, generator=torch.Generator().manual_seed(seed)) >= equal
    x, x0 = (x0 + step * normal(images, tokens, 3 * width, seed=seed + 1) * keep).to(dtype), x0.to(dtype)
    value, value0 = function(x), function(x0)
    g = normal(*value.shape, seed=seed + 2, dtype=dtype)
    (m,) = pulled(function, [x], g, "deeplift", [x0])
    assert m.isfinite().all()
    terms = (m.double() * (x - x0).double()).flatten(1)
    change = (g.double() * (value.double() - value0.double())).flatten(1)
    rounding = torch.finfo(dtype).eps
    allowed = 60 * rounding * (terms.abs().sum(1) + (g.double() * value.double()).abs().flatten(1).sum(1))
    if "plain" in name:  # both terms of a multiplier are as large as the larger factor, and may cancel
        factor = max((y.double().var(-1, unbiased=False) + 1e-6).rsqrt().max() for y in (x, x0))
        allowed = allowed + 60 * rounding * factor * (g * (x - x0)).double().abs().flatten(1).sum(1)
    if name == "gate":  # a place in the middle gates itself: the two terms of its multiplier may cancel
        (s, v), (s0, v0) = ((F.silu(y.double()), y.double().flip(-1)) for y in (x, x0))
        slope = ((s - s0) / (x.double() - x0.double())).nan_to_num(0.0, 0.0, 0.0).abs()
        as_gate = g.double().abs() * (v.abs() + v0.abs()) * slope
        as_value = (g.double().abs() * (s.abs() + s0.abs())).flip(-1)
        allowed = allowed + 60 * rounding * ((as_gate + as_value) * (x - x0).double().abs()).flatten(1).sum(1)
    if name in ("softmax", "attention"):  # weights are only as accurate as the scores, however small their change
        largest = (x.abs().amax() + x0.abs().amax()).double() ** (2 if name == "attention" else 1)
        allowed = allowed * (1 + largest * width**0.5)
    if name in ("gelu", "tanh gelu"):  # x/2 (1 + erf): the bracket is rounded next to 1, however small the value
        allowed = allowed + 4 * rounding * (g * x).double().abs().flatten(1).sum(1)
    if step < threshold(x) and name in ACTIVATIONS:
        allowed = allowed + g.abs().double().flatten(1).sum(1) * step**3 / 4
    assert ((terms.sum(1) - change.sum(1)).abs() <= allowed).all()


@given(st.sampled_from(["softmax", "attention"]), st.integers(0, 1000), st.sampled_from([100.0, 1000.0, 20000.0]))
@settings(max_examples=60, deadline=None)
def test_weights_that_underflow(name, seed, size):
    """Where nearly every weight is 0 in float32, multipliers are finite and close to those in float64."""
    x, x0 = size**0.5 * normal(2, 4, 12, seed=seed), size**0.5 * normal(1, 4, 12, seed=seed + 1)
    if name == "softmax":
        x, x0 = x * size**0.5, x0 * size**0.5
    g = normal(*FUNCTIONS[name](x).shape, seed=seed + 2)
    x, x0, g = (value.float() for value in (x, x0, g))
    (ours,) = pulled(FUNCTIONS[name], [x], g, "deeplift", [x0])
    (exact,) = pulled(FUNCTIONS[name], [x.double()], g.double(), "deeplift", [x0.double()])
    assert ours.isfinite().all()
    close(ours.double(), exact, 2e-3)


# The derivative, and relevance.


def two_blocks(x):
    """Every ruled function once or twice, and the linear ones between them."""
    q, k, v = (3 * x[:, None] + 0.1).chunk(3, dim=-1)
    x = F.scaled_dot_product_attention(q, k, v)[:, 0]
    x = F.layer_norm(torch.cat([x, x.flip(-1)], -1), (2 * x.shape[-1],), eps=1e-3)
    a, b = x.chunk(2, -1)
    x = F.rms_norm(F.silu(a) * b + F.gelu(a) - torch.tanh(b), a.shape[-1:], eps=1e-3)
    x = torch.softmax(x @ x.transpose(1, 2), dim=-1) @ x
    return F.gelu(x, approximate="tanh") / 2 + x.sigmoid()


@pytest.mark.parametrize("function", [*FUNCTIONS.values(), two_blocks], ids=[*FUNCTIONS, "two blocks"])
def test_gradient_is_autograds(function):
    x = normal(2, 3, 6)
    plain = x.clone().requires_grad_()
    value = function(plain)
    g = normal(*value.shape, seed=1)
    (theirs,) = torch.autograd.grad(value, plain, g)
    close(pulled(function, [x], g, "gradient")[0], theirs)
    close(pulled(function, [x], g, "gradient", create_graph=False, baselines=[x[:1] / 2])[0], theirs)
    graph = pulled(function, [x.clone().requires_grad_()], g, "gradient", create_graph=True)[0]
    close(graph.detach(), theirs)
    with Ruled(Tape()):
        close(function(x.clone().requires_grad_()).detach(), value.detach())


@pytest.mark.parametrize("name", ["gelu", "tanh gelu", "silu", "relu", "tanh", "elu", "leaky relu"])
def test_relevance_passes_through_activations(name):
    """The identity rule: x m = f(x) g. Others, whose value at 0 is not 0, take the derivative."""
    x, g = POINTS[None], normal(1, len(POINTS))
    (m,) = pulled(ACTIVATIONS[name][0], [x], g, "attnlrp")
    close(x * m, ACTIVATIONS[name][0](x) * g)


@pytest.mark.parametrize("name", ["sigmoid", "softplus"])
def test_relevance_of_activations_that_do_not_pass_zero(name):
    x, g = POINTS[None], normal(1, len(POINTS))
    close(pulled(ACTIVATIONS[name][0], [x], g, "attnlrp")[0], pulled(ACTIVATIONS[name][0], [x], g, "gradient")[0])


def product_relevance(a, b, out):
    """R of y = a b: half to either factor of each term a_ik b_kj, in proportion to the term's share of y_ij."""
    y = a @ b
    first, second = torch.zeros_like(a), torch.zeros_like(b)
    for i in range(a.shape[0]):
        for j in range(b.shape[1]):
            for k in range(a.shape[1]):
                share = a[i, k] * b[k, j] / (2 * y[i, j]) * out[i, j]
                first[i, k] += share
                second[k, j] += share
    return first, second


def softmax_relevance(s, out):
    """R_j = s_j (R_j - p_j sum R), row by row."""
    p = s.softmax(1)
    return torch.stack([s[i] * (out[i] - p[i] * out[i].sum()) for i in range(len(s))])


def test_relevance_of_products():
    a, b, g = normal(3, 4), normal(4, 2, seed=1), normal(3, 2, seed=2)
    ours = pulled(torch.matmul, [a, b], g, "attnlrp")
    for x, m, reference in zip((a, b), ours, product_relevance(a, b, a @ b * g), strict=True):
        close(x * m, reference)
    gate = normal(3, 4, seed=3)
    out = a * gate * (g := normal(3, 4, seed=4))
    for x, m in zip((a, gate), pulled(torch.mul, [a, gate], g, "attnlrp"), strict=True):
        close(x * m, out / 2)


def test_relevance_of_softmax():
    s, g = normal(3, 4), normal(3, 4, seed=1)
    close(s * pulled(lambda s: s.softmax(-1), [s], g, "attnlrp")[0], softmax_relevance(s, s.softmax(1) * g))


def test_relevance_of_attention():
    (q, k, v), _ = attention_inputs()
    g = normal(2, 3, 4, 2, seed=21)
    ours = pulled(F.scaled_dot_product_attention, [q, k, v], g, "attnlrp")
    for b in range(2):
        for h in range(3):
            scaled = q[b, h] / 3**0.5
            s = scaled @ k[b, h].T
            p = s.softmax(1)
            to_p, to_v = product_relevance(p, v[b, h], p @ v[b, h] * g[b, h])
            to_q, to_k = product_relevance(scaled, k[b, h].T, softmax_relevance(s, to_p))
            for x, m, reference in zip((q, k, v), ours, (to_q, to_k.T, to_v), strict=True):
                close((x * m)[b, h], reference, 1e-10)


@pytest.mark.parametrize("kind", NORMS)
def test_relevance_of_norms(kind):
    """The norm's factor is taken for a constant; centring is linear: x_j's share of (C x)_i is C_ij x_j."""
    x, g, weight = normal(2, 5), normal(2, 5, seed=1), normal(5, seed=2)
    norm = NORMS[kind](weight, torch.zeros(5).double(), 1e-6)
    (m,) = pulled(norm, [x], g, "attnlrp")
    centring = torch.eye(5).double() - (1 / 5 if "layer" in kind else 0)
    out = norm(x) * g
    for row in range(2):
        terms = centring * x[row]  # [i, j]
        close(x[row] * m[row], (terms / terms.sum(1, keepdim=True) * out[row][:, None]).sum(0))


# Derivatives of what is pulled back.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("function", [*FUNCTIONS.values(), two_blocks], ids=[*FUNCTIONS, "two blocks"])
def test_second_derivative(function, rule):
    """The multipliers' derivatives, by autograd through the rule's backward, against finite differences."""
    x, x0 = normal(2, 2, 3, seed=5), normal(1, 2, 3, seed=6)
    g = normal(*function(x).shape, seed=7)
    torch.autograd.gradcheck(
        lambda x, g: pulled(function, [x], g, rule, [x0], create_graph=True),
        (x.requires_grad_(), g.requires_grad_()),
        eps=1e-6,
        atol=1e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize("rule", RULES)
def test_second_derivative_of_attention_with_a_mask(rule):
    inputs, baselines = attention_inputs(images=1, heads=2, queries=2, keys=3, width=2)
    mask = normal(1, 2, 2, 3, seed=30)

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    g = normal(1, 2, 2, 2, seed=31)
    torch.autograd.gradcheck(
        lambda *inputs: pulled(function, inputs, g, rule, baselines, create_graph=True),
        tuple(x.requires_grad_() for x in inputs),
    )


@pytest.mark.parametrize("name", ["gelu", "softmax", "attention", "plain layer", "gate"])
def test_second_derivative_at_the_baseline(name):
    """Where x = x0 every quotient is 0/0; derivatives of the multipliers are still those nearby."""
    function, x0 = FUNCTIONS[name], normal(1, 2, 3, seed=6)
    weights = normal(1, 2, 3, seed=8)
    g = normal(*function(x0).shape, seed=7)

    def derivative(x):
        x = x.clone().requires_grad_()
        (m,) = pulled(function, [x], g, "deeplift", [x0], create_graph=True)
        return torch.autograd.grad((m * weights).sum(), x)[0]

    at, nearby = derivative(x0), derivative(x0 + 1e-3 * normal(1, 2, 3, seed=9))
    assert at.isfinite().all()
    close(at, nearby, 2e-2)


@pytest.mark.parametrize(("dtype", "value", "slope"), [(torch.float32, 2e-7, 5e-6), (torch.float64, 4e-16, 5e-13)])
def test_tanh_over(dtype, value, slope):
    """tanh(h)/h and its derivative, on either side of where the series takes over."""
    h = torch.cat([torch.zeros(1, dtype=dtype), torch.logspace(-9, 2, 500, dtype=dtype)])
    h = torch.cat([-h, h])
    wide = h.double()
    square = wide**2
    series = 1 - square / 3 + 2 * square**2 / 15 - 17 * square**3 / 315 + 62 * square**4 / 2835
    steep = wide * (-2 / 3 + 8 * square / 15 - 34 * square**2 / 105 + 496 * square**3 / 2835)
    small = wide.abs() < 0.02
    safe = torch.where(small, 1.0, wide)
    exact = torch.where(small, series, safe.tanh() / safe)
    exact_slope = torch.where(small, steep, (1 - safe.tanh() ** 2) / safe - safe.tanh() / safe**2)
    with torch.no_grad():
        quick = tanh_over(h.clone())
    assert (quick.double() - exact).abs().max() < value
    h.requires_grad_()
    result = tanh_over(h)
    assert (result.double() - exact).abs().max() < value
    (derivative,) = torch.autograd.grad(result.sum(), h)
    assert (derivative.double() - exact_slope).abs().max() < slope


# Which functions are answered.


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: x.pow(2), "pow"),
        (lambda x: x**2, "pow"),
        (lambda x: x.exp(), "exp"),
        (lambda x: 1 / x, "rtruediv"),
        (lambda x: x / x.sum(), "div"),
        (lambda x: x.detach() * x, "detach"),
        (lambda x: x.data * x, "data"),
        (lambda x: x.amax(-1), "amax"),
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: F.normalize(x, dim=-1), "normalize"),
        (lambda x: F.linear(x, x[0]), "linear"),
        (lambda x: F.layer_norm(x, x.shape[1:]), "layer_norm"),
        (lambda x: F.scaled_dot_product_attention(*[x[:, None]] * 3, is_causal=True), "scaled_dot_product_attention"),
        (lambda x: F.dropout(x), "dropout"),
        (lambda x: torch.where(x > 0, x, 0.0), "gt"),
    ],
)
def test_refuses_what_has_no_rule(function, name):
    with pytest.raises(InputError) as caught:
        recorded(function, [normal(1, 2, 3)])
    message = str(caught.value)
    assert message.startswith("explain.methods: deeplift has no exact rule for")
    assert name in message
    assert message.endswith("leave deeplift out, or take deeplift-captum")
    with pytest.raises(InputError, match=r"attnlrp has no rule for.*leave attnlrp out$"):
        recorded(function, [normal(1, 2, 3)], strict="attnlrp")
    torch.manual_seed(0)
    value = recorded(function, [x := normal(1, 2, 3)], strict=None)[1]
    torch.manual_seed(0)
    torch.testing.assert_close(value, function(x.requires_grad_()).detach())


def test_what_does_not_depend_on_the_image_is_left_alone():
    position = normal(2, 3).exp()
    recorded(lambda x: x + position.exp().pow(2) * position.shape[0], [normal(1, 2, 3)])


def test_writing_over_a_value_is_seen_by_its_other_names():
    factor, g = normal(3, seed=1), normal(2, 3, seed=2)

    def scaled(x):
        same = x = x + 1
        x *= factor
        x.div_(2)
        x.mul_(same.clone())
        return same

    x, x0 = normal(2, 3), normal(1, 3, seed=3)
    with Ruled(Tape()):
        torch.testing.assert_close(scaled(x.clone().requires_grad_()), ((x + 1) * factor / 2) ** 2)
    (m,) = pulled(scaled, [x], g, "deeplift", [x0])
    close(m, g * factor**2 / 4 * (x + x0 + 2))


def test_patches_are_embedded_as_by_a_convolution():
    x, weight, bias = normal(2, 3, 8, 12), normal(5, 3, 4, 4, seed=1), normal(5, seed=2)
    for options in ({"stride": 4}, {"stride": (4, 4), "padding": 0}, {"stride": 2, "padding": 1}, {"stride": 3}):
        plain = x.clone().requires_grad_()
        value = F.conv2d(plain, weight, bias, **options)
        g = normal(*value.shape, seed=3)
        (theirs,) = torch.autograd.grad(value, plain, g)
        with Ruled(Tape()):
            close(F.conv2d(x.clone().requires_grad_(), weight, bias, **options).detach(), value.detach())
        close(pulled(lambda x, options=options: F.conv2d(x, weight, bias, **options), [x], g, "gradient")[0], theirs)

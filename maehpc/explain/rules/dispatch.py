"""Which function is pulled back by which rule: a network is run under `Ruled`, and its own code stays as it is.

Linear functions are listed, and so are those with a rule. What is on neither list and depends on the image would have
no exact rule and is refused by name while the baseline is recorded.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from maehpc.errors import InputError
from maehpc.explain.rules import elementwise as functions
from maehpc.explain.rules.attention import attention
from maehpc.explain.rules.elementwise import Activation, elementwise
from maehpc.explain.rules.linear import linear, unbound
from maehpc.explain.rules.norm import norm
from maehpc.explain.rules.product import product, softmax
from maehpc.explain.rules.tape import Tape

_LINEAR: frozenset[Any] = frozenset(
    {
        *(F.linear, F.pad, F.interpolate, F.avg_pool2d, F.adaptive_avg_pool2d),
        *(torch.add, torch.sub, torch.cat, torch.stack, torch.chunk, torch.split, torch.flatten, torch.reshape),
        *(torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.sum, torch.mean, torch.neg),
        *(Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__, Tensor.sub, Tensor.__sub__),
        *(Tensor.sub_, Tensor.__isub__, torch.roll, Tensor.roll, torch.flip, Tensor.flip, Tensor.swapaxes),
        *(Tensor.__rsub__, Tensor.neg, Tensor.__neg__, Tensor.sum, Tensor.mean),
        *(Tensor.reshape, Tensor.view, Tensor.flatten, Tensor.unflatten, Tensor.permute, Tensor.transpose, Tensor.t),
        *(Tensor.expand, Tensor.expand_as, Tensor.repeat, Tensor.repeat_interleave, Tensor.contiguous, Tensor.clone),
        *(Tensor.unbind, Tensor.split, Tensor.chunk, Tensor.narrow, Tensor.select, Tensor.squeeze, Tensor.unsqueeze),
        *(Tensor.__getitem__, Tensor.type_as, Tensor.to, Tensor.float, Tensor.index_select, Tensor.movedim),
        *(torch.unbind, torch.narrow, torch.index_select, torch.repeat_interleave, torch.movedim),
    }
)
_TIMES: frozenset[Any] = frozenset({torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__})
_TIMES_IN_PLACE: frozenset[Any] = frozenset({Tensor.mul_, Tensor.__imul__})
_DIVIDED: frozenset[Any] = frozenset({torch.div, Tensor.div, Tensor.__truediv__})
_DIVIDED_IN_PLACE: frozenset[Any] = frozenset({Tensor.div_, Tensor.__itruediv__})
_MATRIX: frozenset[Any] = frozenset({torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm})
_SOFTMAX: frozenset[Any] = frozenset({F.softmax, torch.softmax, Tensor.softmax})
_DROPOUT: frozenset[Any] = frozenset({F.dropout, torch.dropout})
_DATA = inspect.getattr_static(Tensor, "data").__get__
"""A way out of the graph: what follows would count as a constant."""
_ACTIVATIONS: dict[Any, Activation] = {
    F.silu: functions.SILU,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), functions.RELU),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, Tensor.sigmoid), functions.SIGMOID),
    **dict.fromkeys((F.tanh, torch.tanh, Tensor.tanh), functions.TANH),
}


def _depends(*values: object) -> bool:
    """Whether one of the values is computed from the image: weights are frozen, so gradients tell."""
    return any(
        value.requires_grad if isinstance(value, Tensor) else isinstance(value, (list, tuple)) and _depends(*value)
        for value in values
    )


class _UnruledError(Exception):
    """A function of the image that has no rule."""


class Ruled(TorchFunctionMode):
    """Inside this block a network's nonlinear functions are pulled back by the tape's rule.

    The network's weights must be frozen and its input must require a gradient. The mode belongs to the thread that
    enters it.

    Args:
        tape: of the pass.

    Raises:
        InputError: (while the baseline is recorded) a function of the image has no rule.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answers one call of one function."""
        kwargs = kwargs or {}
        if not _depends(*args, *kwargs.values()):
            return _linear(self._tape, *args, **kwargs) if func is F.linear else func(*args, **kwargs)
        handler = _RULED.get(func)
        try:
            if handler is not None:
                return handler(self._tape, *args, **kwargs)
        except (TypeError, _UnruledError):
            self._refuse(func)
            return func(*args, **kwargs)
        if func not in _LINEAR and not _harmless(func):
            self._refuse(func)
        return func(*args, **kwargs)

    def _refuse(self, func: Any) -> None:
        method = self._tape.strict
        if self._tape.recording and method is not None:
            name = resolve_name(func) or getattr(func, "__name__", repr(func))
            rule, fix = ("exact rule", ", or take deeplift-captum") if method == "deeplift" else ("rule", "")
            raise InputError(
                f"explain.methods: {method} has no {rule} for {name}, which this classifier computes from the image; "
                f"leave {method} out{fix}"
            )


def _harmless(func: Any) -> bool:
    """Attributes such as shape, and whatever gives no tensor."""
    if func == _DATA:
        return False
    return getattr(func, "__name__", "") in (
        "__get__",
        "size",
        "dim",
        "numel",
        "is_contiguous",
        "stride",
        "__len__",
        "get_device",
        "is_floating_point",
    )


def _attention(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or is_causal or enable_gqa or _depends(attn_mask) or query.ndim != 4:
        raise _UnruledError
    if not query.shape[:2] == key.shape[:2] == value.shape[:2] or key.shape[2] != value.shape[2]:
        raise _UnruledError
    if attn_mask is not None:
        lowest = torch.finfo(query.dtype).min / 4  # for -inf: its weights are 0 too, and differences are numbers
        if attn_mask.dtype == torch.bool:
            attn_mask = query.new_zeros(attn_mask.shape).masked_fill(~attn_mask, lowest)
        attn_mask = attn_mask.clamp(min=lowest)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return attention(query, key, value, attn_mask, scale, tape)


def _layer_norm(
    tape: Tape,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if len(normalized_shape) != 1 or _depends(weight, bias):
        raise _UnruledError
    return norm(x, weight, bias, eps, True, tape)


def _rms_norm(
    tape: Tape, x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if len(normalized_shape) != 1 or _depends(weight):
        raise _UnruledError
    return norm(x, weight, None, torch.finfo(x.dtype).eps if eps is None else eps, False, tape)


def _gelu(tape: Tape, x: Tensor, approximate: str = "none") -> Tensor:
    return elementwise(functions.GELU_TANH if approximate == "tanh" else functions.GELU, x, tape)


def _activation(activation: Activation) -> Callable[..., Tensor]:
    return lambda tape, x, inplace=False: elementwise(activation, x, tape)


def _elu(tape: Tape, x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    return elementwise(functions.elu(alpha), x, tape)


def _leaky_relu(tape: Tape, x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    return elementwise(functions.leaky_relu(negative_slope), x, tape)


def _softplus(tape: Tape, x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return elementwise(functions.softplus(beta, threshold), x, tape)


def _times(tape: Tape, a: Tensor | float, b: Tensor | float) -> Tensor:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.requires_grad and b.requires_grad:
        return product(a, b, False, tape)
    result: Tensor = torch.mul(a, b)
    return result


def _divided(tape: Tape, a: Tensor, b: Tensor | float) -> Tensor:
    if isinstance(b, Tensor) and b.requires_grad:
        raise _UnruledError
    return torch.div(a, b)


def _times_in_place(tape: Tape, a: Tensor, b: Tensor | float) -> Tensor:
    """For other names of the same memory the product must be written over a."""
    if isinstance(b, Tensor) and b.requires_grad:
        return a.copy_(product(a.clone(), b, False, tape) if a.requires_grad else a * b)
    return a.mul_(b)


def _divided_in_place(tape: Tape, a: Tensor, b: Tensor | float) -> Tensor:
    if isinstance(b, Tensor) and b.requires_grad:
        raise _UnruledError
    return a.div_(b)


def _matrix(tape: Tape, a: Tensor, b: Tensor) -> Tensor:
    if a.requires_grad and b.requires_grad:
        if min(a.ndim, b.ndim) < 2:
            raise _UnruledError
        return product(a, b, True, tape)
    return torch.matmul(a, b)


def _softmax(tape: Tape, s: Tensor, dim: int, *further: Any, dtype: torch.dtype | None = None, **unused: Any) -> Tensor:
    kinds = {dtype, *(value for value in further if isinstance(value, torch.dtype))}
    if dim not in (-1, s.ndim - 1) or not kinds <= {None, s.dtype}:
        raise _UnruledError
    return softmax(s, tape)


def _linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product with weights, in lower precision where the tape says so."""
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise _UnruledError
    if tape.products is None:
        return linear(input, weight, bias)
    low = tape.products
    return F.linear(input.to(low), weight.to(low), None if bias is None else bias.to(low)).to(input.dtype)


def _convolution(
    tape: Tape,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution over patches that do not overlap is a matrix product, which is faster on a CPU, above all back."""
    size = tuple(weight.shape[2:])
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise _UnruledError
    steps = (stride, stride) if isinstance(stride, int) else tuple(stride)
    plain = padding in (0, (0, 0)) and dilation in (1, (1, 1)) and groups == 1
    if steps != size or not plain or x.shape[2] % size[0] or x.shape[3] % size[1]:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    patches = x.unflatten(3, (-1, size[1])).unflatten(2, (-1, size[0])).permute(0, 2, 4, 1, 3, 5)
    tokens = _linear(tape, patches.flatten(3), weight.flatten(1), bias)
    return tokens.permute(0, 3, 1, 2)


def _unbind(tape: Tape, x: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    return x.unbind(dim) if dim or x.is_contiguous() else unbound(x)


def _dropout(tape: Tape, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if training and p:
        raise _UnruledError
    return x


_RULED: dict[Any, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    F.scaled_dot_product_attention: _attention,
    F.linear: _linear,
    F.conv2d: _convolution,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.gelu: _gelu,
    F.elu: _elu,
    F.leaky_relu: _leaky_relu,
    F.softplus: _softplus,
    **{function: _activation(activation) for function, activation in _ACTIVATIONS.items()},
    **dict.fromkeys(_TIMES, _times),
    **dict.fromkeys(_TIMES_IN_PLACE, _times_in_place),
    **dict.fromkeys(_DIVIDED, _divided),
    **dict.fromkeys(_DIVIDED_IN_PLACE, _divided_in_place),
    **dict.fromkeys(_MATRIX, _matrix),
    **dict.fromkeys(_SOFTMAX, _softmax),
    **dict.fromkeys(_DROPOUT, _dropout),
    **dict.fromkeys((torch.unbind, Tensor.unbind), _unbind),
}

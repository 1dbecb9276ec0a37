"""How a derivative, or what stands in its place, is pulled back through the nonlinear functions of a transformer.

    dispatch ──► attention, norm, elementwise, product ──► tape

While a network runs under `Ruled`, each call of a nonlinear function is answered by an autograd Function of this
package. It computes the same value, and its backward follows the rule that the pass's `Tape` names at that moment, so
that one forward pass serves pullbacks by several rules. Linear functions (matrix products with weights, convolutions,
sums, reshapes) have the same pullback by every rule and are left to autograd.

Rules:
    gradient: the derivative.
    deeplift: multipliers m with sum(m * (x - x0)) = f(x) - f(x0) for each function f and baseline x0, hence for
        the whole network (summation to delta, Shrikumar et al. 2017, section 3.1).
    captum: the rescale rule for activations that captum 0.9 rescales, the derivative for everything else.
    attnlrp: what LRP's rules for transformers (Achtibat et al. 2024) come to when relevance is input times gradient.
"""

from maehpc.explain.rules.dispatch import Ruled
from maehpc.explain.rules.tape import Rule, Tape

__all__ = ["Rule", "Ruled", "Tape"]

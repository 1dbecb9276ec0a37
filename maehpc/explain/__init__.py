"""Explanations: attribution maps of a classifier, and how far they move when the image hardly does.

    noise, attacks ──► explainer ◄── engine ◄── methods/ ◄── passes ◄── network ◄── rules/

`Explainer` is what a stage uses; `Engine` is where maps come from; a method is a file of `methods/`.
"""

from maehpc.explain.engine import Attribution, Engine
from maehpc.explain.explainer import Explainer, Explanation
from maehpc.explain.noise import NoiseKey

__all__ = ["Attribution", "Engine", "Explainer", "Explanation", "NoiseKey"]

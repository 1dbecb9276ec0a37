"""Attribution methods, one a file: a file `integrated_gradients.py` here is the method `integrated-gradients`.

A new method is a new file with one subclass of `Method`. Recipes, command line, stores, tables and figures know it by
its file's name and by what the class says of itself.
"""

from maehpc.explain.methods.base import MapKind, Method, Setup
from maehpc.explain.methods.registry import make_methods, method_class

__all__ = ["MapKind", "Method", "Setup", "make_methods", "method_class"]

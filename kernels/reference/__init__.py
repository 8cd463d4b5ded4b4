"""The oracle of every op, in plain torch: each has the name and the signature of its kernel."""

import gemcut.kernels.reference.ops as ops
from gemcut.kernels.reference.ops import *

__all__: list[str] = []
__all__ += ops.__all__

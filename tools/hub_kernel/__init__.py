"""Gemma's ops and layers as a kernel of the Hugging Face Hub; build_hub_kernel.py makes it one.

The built folder's first file: every op of `kernels` by its name, registered under a namespace that
is this build's alone, the three ops of pointwise.py, and `layers`.  `kernels` holds the launchers.
"""

import torch

from gemcut import kernels
from gemcut.tools.hub_kernel import layers, pointwise

_NAMES = [*kernels.__all__, *pointwise.__all__]
globals().update({name: getattr(torch.ops.gemcut, name) for name in _NAMES})

__all__ = ["kernels", "layers", *_NAMES]  # pyright: ignore[reportUnsupportedDunderAll]

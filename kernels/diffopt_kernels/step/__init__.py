"""What of a denoising step is not attention: norms, activations and sums, each in one pass, and on Hopper GPUs products
with what follows them.

A package of its own, so that work on these leaves alone the attention kernels' hash, under which their checks and
tuned launches are kept.
"""

from diffopt_kernels.step.geglu import geglu
from diffopt_kernels.step.group_norm import group_norm
from diffopt_kernels.step.layer_norm import add_layer_norm, layer_norm
from diffopt_kernels.step.products import convolution, geglu_product
from diffopt_kernels.step.sums import bias_add
from diffopt_kernels.step.thin_convolution import thin_convolution

__all__ = [
    "add_layer_norm",
    "bias_add",
    "convolution",
    "geglu",
    "geglu_product",
    "group_norm",
    "layer_norm",
    "thin_convolution",
]

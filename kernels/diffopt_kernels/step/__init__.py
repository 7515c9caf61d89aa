"""What of a denoising step is not attention: norms, activations, sums and larger images, each in one pass; on Hopper
GPUs products with what follows them.

A package of its own, so that work on these leaves alone the attention kernels' hash, under which their checks and
tuned launches are kept.
"""

from diffopt_kernels.step.geglu import geglu
from diffopt_kernels.step.group_norm import group_norm, group_norm_joined
from diffopt_kernels.step.layer_norm import add_layer_norm, layer_norm
from diffopt_kernels.step.products import convolution, geglu_product
from diffopt_kernels.step.summed_weights import summed_weights
from diffopt_kernels.step.sums import bias_add
from diffopt_kernels.step.thin_convolution import thin_convolution
from diffopt_kernels.step.upsample import upsample
from diffopt_kernels.step.upsampled_convolution import upsampled_convolution

__all__ = [
    "add_layer_norm",
    "bias_add",
    "convolution",
    "geglu",
    "geglu_product",
    "group_norm",
    "group_norm_joined",
    "layer_norm",
    "summed_weights",
    "thin_convolution",
    "upsample",
    "upsampled_convolution",
]

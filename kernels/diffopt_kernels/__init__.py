"""GPU kernels for attention: they know torch and triton, nothing of diffusers or diffopt.

Importing this package needs neither a GPU nor triton; a call does.
"""

from diffopt_kernels.attention import attention, launch_attention
from diffopt_kernels.cost import attention_bytes, attention_flops
from diffopt_kernels.launch import HEAD_DIMS, AttentionLaunch, attention_launch, attention_launches
from diffopt_kernels.reference import attention_reference
from diffopt_kernels.support import device_reasons, unsupported_reasons

__all__ = [
    "HEAD_DIMS",
    "AttentionLaunch",
    "attention",
    "attention_bytes",
    "attention_flops",
    "attention_launch",
    "attention_launches",
    "attention_reference",
    "device_reasons",
    "launch_attention",
    "unsupported_reasons",
]

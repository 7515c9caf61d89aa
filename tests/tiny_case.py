"""The smallest case of a workload: random weights, 64×64 pixels, two steps."""

from diffopt.bench.workloads import Case


def tiny_case(model: str = "random:tiny", **changes) -> Case:
    values = {
        "name": "tiny-64",
        "model": model,
        "width": 64,
        "height": 64,
        "steps": 2,
        "repetitions": 2,
        "warmup": 1,
        "unet_repetitions": 2,
        "unet_warmup": 1,
        "guidance": 3.0,
        "exactness_steps": 2,
    }
    return Case(**{**values, **changes})

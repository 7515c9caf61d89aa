"""What tests share: without a GPU, kernels run in Triton's interpreter, and gpu tests skip with the reason."""

import os

# Before torch loads its OpenMP library: on a machine with other work, threads that spin for each other cost tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that a red one can be repeated; HYPOTHESIS_PROFILE=random looks for new ones.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # before anything imports triton: it reads this once
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; torch.cuda.is_available() is False here"))


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where kernels run in this session: compiled on the GPU, or interpreted on the CPU."""
    return torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")

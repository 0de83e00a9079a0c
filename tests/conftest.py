"""What every test gets: fixed seeds, and a stated reason where a device is missing."""

import random

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests where there is no GPU; torch is imported only where such a test is about to run."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start each test from the same random state, so that its result depends on no other test."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

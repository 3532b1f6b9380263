"""GPU tests use the tiny base and dataset of the training tests, on the GPU."""

import pytest

from tests.training.conftest import async_io, base_folder, make_spec

__all__ = ["async_io", "base_folder", "make_spec"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if "/tests/gpu/" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))

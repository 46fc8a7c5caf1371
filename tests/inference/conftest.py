import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads cost more than they give on matrices of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""Settings that every test shares."""

import pytest
import torch

torch.set_num_threads(1)  # tiny models run many times slower when threads compete


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fill every uninitialised tensor with NaN, so that an unwritten block shows."""
    from fastdit.bench.measuring.verify import UNINITIALISED, poisoned

    for owner, name in UNINITIALISED:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))

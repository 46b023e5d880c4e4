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

    def poison(make):
        def wrapped(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return wrapped

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))

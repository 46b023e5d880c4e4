"""Settings that every test shares."""

import os

import pytest
import torch

torch.set_num_threads(1)  # tiny models run many times slower when threads compete

LONG = "interpreter"  # in the names of tests that run a whole file of tests


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Return the cores that this process may use; pytest-xdist would count those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def pytest_collection_modifyitems(items):
    """Start with the longest tests, so that no core is left with one of them at the end."""
    items.sort(key=lambda item: (LONG not in item.name, item.get_closest_marker("slow") is None))


def pytest_configure():
    if os.environ.get("TRITON_INTERPRET") == "1":
        _patch_the_language_once()


def _patch_the_language_once():
    """Save a third of the interpreter's time: it patches the whole language anew for each call of a device function."""
    from triton import language as tl
    from triton.runtime import interpreter

    def patch_lang(fn, patch=interpreter._patch_lang):
        languages = [module for module in fn.__globals__.values() if module is tl or module is tl.core]
        # A launch restores what it has patched, so this is the call of a device function, which needs nothing back.
        patched = not any(tl.core.is_builtin(language.load) for language in languages)
        return None if patched else patch(fn)

    interpreter._patch_lang = patch_lang


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fill every uninitialised tensor with NaN, so that an unwritten block shows."""
    from fastdit.bench.measuring.verify import UNINITIALISED, poisoned

    for owner, name in UNINITIALISED:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))

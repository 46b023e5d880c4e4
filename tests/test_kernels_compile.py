"""Every entry of the Triton tables compiles for its GPU into the code it was chosen for. No GPU is needed."""

import os
from dataclasses import replace
from tempfile import TemporaryDirectory

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from kernel_compile import SHARED_LIMIT, compile_entry, faults
from kernel_entries import BF16, FP16, FP32, entries, fwd_entry

from fastdit.attention.kernels.options import VARIANTS
from fastdit.attention.kernels.triton.tiles import CANDIDATES, TABLE, Config, choose_config, table_arch

ENTRIES = entries()


@pytest.fixture(scope="module", autouse=True)
def _own_cache():
    """Write compiled kernels to a folder that is removed: whatever is there already is not read."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", folder)
        yield


@pytest.mark.parametrize(
    "name", [pytest.param(e.name, marks=() if e.quick else pytest.mark.slow) for e in ENTRIES.values()]
)
def test_is_clean(name):
    built = compile_entry(ENTRIES[name])
    assert faults(ENTRIES[name], built) == [], built


def test_a_bad_kernel_is_found():
    entry = fwd_entry(90, 128, BF16, (128, 128), Config(128, 128, 4, 2), False)
    wrong = faults(entry, compile_entry(entry))
    assert [any(text in fault for fault in wrong) for text in ("spills", "wait for each other")] == [True, True]


def test_a_loop_without_prefetch_is_found():
    entry = fwd_entry(80, 64, BF16, (64, 64), Config(64, 64, 4, 1), False)
    built = compile_entry(entry)
    assert faults(entry, built) == ["2 of 2 loops read without asynchronous copies, 0 may"]
    small = replace(built, plain_loops=0, shared_kib=164, tensor_ops=0)
    assert faults(entry, small) == ["164.0 KiB of shared memory, 163 is the limit", "no HMMA"]


def test_only_known_variants():
    assert {config.variant for configs in TABLE.values() for config in configs} == {"loads"}
    assert {config.variant for configs in CANDIDATES.values() for config in configs} == set(VARIANTS)
    assert not any(set(TABLE[key]) & set(configs) for key, configs in CANDIDATES.items())


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_some_tiles_fit_any_block(capability, dtype):
    assert table_arch(capability) in SHARED_LIMIT
    for dim in (16, 32, 64, 72, 96, 128):
        for block in (16, 32, 48, 64, 128, 256, 384):
            for compensate in (False, True):
                config = choose_config(capability, dim, dtype, block, 16 * block, compensate=compensate)
                assert block % config.tile_q == 0 and 16 * block % config.tile_k == 0


def test_best_tiles():
    assert choose_config((9, 0), 128, BF16, 128, 128) == Config(128, 64, 8, 2)
    assert choose_config((9, 0), 128, BF16, 64, 64) == Config(64, 64, 4, 2)
    assert choose_config((8, 6), 128, BF16, 64, 64) == Config(64, 32, 4, 2)

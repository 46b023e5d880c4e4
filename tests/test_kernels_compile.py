"""Every entry of the Triton tables compiles for its GPU into the code it was chosen for. No GPU is needed."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from kernel_compile import SHARED_LIMIT, compile_fwd, compile_means

from fastdit.attention.kernels.triton_config import TABLE, TABLE_SINGLE_MEANS, Config, choose_config, table_arch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def entries():
    for (arch, dim, bits), configs in TABLE.items():
        quick = bits == 16 and arch in (80, 90)
        yield from of_table(arch, dim, bits, configs, False, quick)
        with_means = configs if bits == 16 else TABLE_SINGLE_MEANS[dim]
        yield from of_table(arch, dim, bits, with_means, True, quick and (arch, dim) == (90, 128))


def of_table(arch, dim, bits, configs, compensate, quick):
    dtype = BF16 if bits == 16 else FP32
    for rank, config in enumerate(configs):
        # The best entry is compiled for a mask whose blocks are larger than its tiles.
        blocks = (128, 128) if rank == 0 else (config.tile_q, config.tile_k)
        yield case(arch, dim, dtype, blocks, config, compensate, quick and rank == 0)
    if bits == 16:
        yield case(arch, dim, FP16, (128, 128), configs[0], compensate, False)
    yield case(arch, 96 if dim == 128 else 32, dtype, (128, 128), configs[0], compensate, False)


def case(arch, dim, dtype, blocks, config, compensate, quick):
    tiles = f"{config.tile_q}x{config.tile_k}x{config.num_warps}"
    name = f"sm_{arch}-{str(dtype)[6:]}-{dim}-{tiles}{'-means' if compensate else ''}"
    marks = () if quick else pytest.mark.slow
    return pytest.param(arch, dim, dtype, blocks, config, compensate, id=name, marks=marks)


@pytest.mark.parametrize(("arch", "dim", "dtype", "blocks", "config", "compensate"), list(entries()))
def test_compiles_clean(arch, dim, dtype, blocks, config, compensate, record_property):
    built = compile_fwd(arch, dim, dtype, *blocks, config, compensate=compensate)
    record_property("compiled", str(built))
    assert built.spilled == 0, built
    assert not built.serialized, built
    assert built.shared_kib <= SHARED_LIMIT[arch], built
    assert built.async_copies > 0, built
    assert built.tensor_ops != 0, built


@pytest.mark.parametrize("arch", [80, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (89, 90, 100, 120))])
@pytest.mark.parametrize(("dim", "dtype"), [(128, BF16), (72, FP32)], ids=str)
def test_means_compile_clean(arch, dim, dtype):
    built = compile_means(arch, dim, dtype, 128)
    assert built.spilled == 0 and built.shared_kib <= 4 and built.registers <= 64, built


def test_only_known_variants():
    assert {config.variant for configs in TABLE.values() for config in configs} == {"loads"}


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

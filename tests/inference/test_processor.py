import pytest
import torch

from auto_round.inference import processor

INTEL = "vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512f {}\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (INTEL.format("avx512_vnni amx_int8"), True),
        (INTEL.format("avx_vnni"), True),
        (INTEL.format("avx512_bf16"), False),
        (INTEL.format("avx512_4vnniw"), False),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: avx512_vnni\n", False),
        ("CPU implementer\t: 0x41\nFeatures\t: asimd asimddp\n", False),
    ],
)
def test_eight_bit_kernels_of_auto_round_lib_need_intel_and_vnni(cpuinfo, expected):
    assert processor._lists_intel_with_vnni(cpuinfo) is expected


def test_where_products_are_said_to_be_exact_the_largest_ones_are():
    """Pairs of such products overflow 16 bits, which older instructions saturate at."""
    if not processor.has_int8_dot_product():
        pytest.skip("this processor has no VNNI")
    x = torch.full((17, 64), 127, dtype=torch.int8)
    weight = torch.full((64, 32), -128, dtype=torch.int8)
    assert bool((torch._int_mm(x, weight) == -128 * 127 * 64).all())

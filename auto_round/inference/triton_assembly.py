"""PTX for the Triton kernels: codes out of packed words, as 16-bit numbers.

`triton_kernels` says which numbers these are. Compilers make about twice the instructions of the same expressions.
"""

from __future__ import annotations

import triton
import triton.language as tl

# For one position of the codes: $0 and on are the results, then come the packed numbers, then the
# negative zero points, both in the order of the results. Two 16-bit values are in a register, four or two 8- or 32-bit
# ones in one or two.
FOUR_BITS = """{
    .reg .b32 code, one;
    shr.u32 code, $1, SHIFT;
    lop3.b32 code, code, 0x000f000f, MAGIC, 0xea;
    mov.b32 one, ONE;
    fma.rn.TYPE $0, code, one, $2;
}"""
TWO_BITS = """{
    .reg .b32 code, low, high, one;
    shr.u32 code, $2, SHIFT;
    and.b32 code, code, 0x03030303;
    prmt.b32 low, code, MAGIC, 0x5150;
    prmt.b32 high, code, MAGIC, 0x5352;
    mov.b32 one, ONE;
    fma.rn.TYPE $0, low, one, $3;
    fma.rn.TYPE $1, high, one, $4;
}"""
EIGHT_BITS = """{
    .reg .b32 code, one;
    prmt.b32 code, $1, $2, BYTES;
    lop3.b32 code, code, 0x00ff00ff, MAGIC, 0xea;
    mov.b32 one, ONE;
    fma.rn.TYPE $0, code, one, $3;
}"""
# In bfloat16 codes at bits 4 to 7 are linear too, but 16 times as large, which MULTIPLY makes up for.
FOUR_BITS_AS_THEY_ARE = """{
    .reg .b32 code;
    shr.u32 code, $1, SHIFT;
    and.b32 $0, code, MASK;
}"""
# Two activations times 2**70 or 2**66, which keeps products with numbers around 2**-130 out of float32's subnormals.
MULTIPLY = """{
    .reg .b32 factor, zero;
    mov.b32 factor, FACTOR;
    mov.b32 zero, 0x80008000;
    fma.rn.bf16x2 $0, $1, factor, zero;
}"""
# Words 0, 1, 2 of both units are $1 $2, $3 $4, $5 $6.
THREE_BITS = """{
    .reg .b32 code, next, one;
    shf.r.clamp.b32 code, FIRST0, SECOND0, SHIFT;
    shf.r.clamp.b32 next, FIRST1, SECOND1, SHIFT;
    prmt.b32 code, code, next, 0x5410;
    lop3.b32 code, code, 0x00070007, MAGIC, 0xea;
    mov.b32 one, ONE;
    fma.rn.TYPE $0, code, one, $7;
}"""
AWQ = """{
    .reg .b32 code, next, one;
    shr.u32 code, $1, $3;
    shr.u32 next, $2, $4;
    prmt.b32 code, code, next, 0x5410;
    lop3.b32 code, code, 0x000f000f, MAGIC, 0xea;
    mov.b32 one, ONE;
    fma.rn.TYPE $0, code, one, $5;
}"""


@triton.constexpr_function
def assembly(bits: int, position: int, dtype: tl.dtype) -> str:
    """Returns the assembly for code number `position`, with constants filled in."""
    is_bf16 = dtype == tl.bfloat16
    word, shift = divmod(position * bits, 32)
    following = min(word + 1, 2)
    values = {
        "SHIFT": shift,
        "BYTES": 0x4400 + 0x1111 * position,
        "FIRST0": f"${1 + 2 * word}",
        "FIRST1": f"${2 + 2 * word}",
        "SECOND0": f"${1 + 2 * following}",
        "SECOND1": f"${2 + 2 * following}",
        "MAGIC": 0x43004300 if is_bf16 else 0x64006400,
        "ONE": 0x3F803F80 if is_bf16 else 0x3C003C00,
        "TYPE": "bf16x2" if is_bf16 else "f16x2",
    }
    text = {2: TWO_BITS, 3: THREE_BITS, 4: FOUR_BITS, 8: EIGHT_BITS, 0: AWQ}[bits]
    for name, value in values.items():
        text = text.replace(name, str(value))
    return text


@triton.constexpr_function
def code_assembly(position: int, dtype: tl.dtype) -> str:
    """Returns the assembly which leaves code number `position` where 16-bit numbers are linear."""
    if dtype == tl.float16:
        shift, mask = 4 * position, "0x000f000f"
    else:
        shift, mask = 8 * (position // 2), "0x00f000f0" if position % 2 else "0x000f000f"
    text = FOUR_BITS_AS_THEY_ARE
    for name, value in {"SHIFT": str(shift), "MASK": mask}.items():
        text = text.replace(name, value)
    return text


@triton.constexpr_function
def activation_assembly(position: int) -> str:
    """Returns the assembly which multiplies bfloat16 activations of code number `position` by 2**70 or 2**66."""
    text = MULTIPLY
    return text.replace("FACTOR", "0x60806080" if position % 2 else "0x62806280")

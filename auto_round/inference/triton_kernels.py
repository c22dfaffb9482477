"""Triton kernels for integer weights in the GPTQ and AWQ layouts: one multiplies, one dequantizes.

Both read the checkpoint's packed words as they lie in memory. What differs between groups is read from one table,
`grid`: the low 16 bits of an entry are the scale, bits 16 to 23 the zero point, bits 24 to 28 the position of the row's
codes in AWQ words.

The product is a tensor-core one whatever the number of tokens, with the weight as the left factor. No code moves
between threads: the sum over the input does not depend on its order, so each code position of the words is a factor of
its own, multiplied with the activations that belong to it. These are loaded by fours, as numbers of 64 bits; the words
as numbers which hold four codes.

Codes become numbers by their bits. Four bits in GPTQ's layout, in groups as long as a step, are taken as they are: a
16-bit number of which only the lowest bits are set is below the normal numbers, where it is linear in these bits (code
* 2**-133 in bfloat16, code * 2**-24 in float16), and tensor cores compute with such numbers. Then the zero point
multiplies the sum of the activations, which one more product gives, and powers of two go into the group's scale.
Elsewhere 0x4300 | code is 128 + code in bfloat16 and 0x6400 | code is 1024 + code in float16, from which the zero point
is subtracted, exactly; a group's scale multiplies the float32 sum over the group or, where groups are shorter than a
step, the 16-bit weights.

Shape letters: O out features, I in features, G groups, T tokens, S slices of a step, one for each warp, C columns of a
slice, W packed numbers of a slice's row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from auto_round.inference.triton_assembly import activation_assembly, assembly, code_assembly

# Two codes and their exponents in one word.
MAGIC_BF16 = tl.constexpr(0x43004300)
MAGIC_FP16 = tl.constexpr(0x64006400)


@triton.jit
def _load(pointer, column, width, EVEN: tl.constexpr):
    """Loads from pointers, zeros where `column` is not below `width`."""
    if EVEN:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=column < width, other=0)


@triton.jit
def _slices(tile, S: tl.constexpr):
    """(R, S * C) -> (S, R, C)."""
    return tl.permute(tl.reshape(tile, (tile.shape[0], S, tile.shape[1] // S)), (1, 0, 2))


@triton.jit
def _by_slices(tile, S: tl.constexpr):
    """(S * C, R) -> (S, R, C)."""
    return tl.permute(tl.reshape(tile, (S, tile.shape[0] // S, tile.shape[1])), (0, 2, 1))


@triton.jit
def _repeat(tile, C: tl.constexpr):
    """(S, R, G) -> (S, R, C), each value C / G times."""
    S: tl.constexpr = tile.shape[0]
    R: tl.constexpr = tile.shape[1]
    G: tl.constexpr = tile.shape[2]
    return tl.reshape(tl.broadcast_to(tile[:, :, :, None], (S, R, G, C // G)), (S, R, C))


@triton.jit
def _number(code, dtype: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns code + 128 in bfloat16, code + 1024 in float16."""
    magic: tl.constexpr = (MAGIC_BF16 if dtype == tl.bfloat16 else MAGIC_FP16) & 0xFFFF
    return (code.to(tl.uint16) | magic).to(dtype, bitcast=True).to(COMPUTE)


@triton.jit
def _minus_zero(entry, dtype: tl.constexpr):
    """Returns the bits of the negative of `_number(zero point)`."""
    magic: tl.constexpr = (MAGIC_BF16 if dtype == tl.bfloat16 else MAGIC_FP16) & 0xFFFF
    return (((entry >> 16) & 255) | magic | 0x8000).to(tl.uint16)


@triton.jit
def _code(packed, position: tl.constexpr, BITS: tl.constexpr):
    """Returns code number `position` of each packed number, which is a tuple of three words for 3 bits."""
    bit: tl.constexpr = position * BITS
    if BITS == 3:
        code = packed[bit // 32] >> (bit % 32)
        if bit % 32 + BITS > 32:
            code = code | (packed[bit // 32 + 1] << (32 - bit % 32))
    else:
        code = packed[0] >> bit
    return code & (2**BITS - 1)


@triton.jit
def _weight(packed, entry, position: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns (S, O, W): code number `position` of each packed number minus its zero point."""
    if BITS == 8 and dtype == tl.bfloat16:
        # 0x4B000000 | code is 2**23 + code in float32; bfloat16 holds 128 + code only up to 7 bits.
        number = (_code(packed, position, BITS) | 0x4B000000).to(tl.float32, bitcast=True)
        return (number - (((entry >> 16) & 255) | 0x4B000000).to(tl.float32, bitcast=True)).to(COMPUTE)
    minus_zero = _minus_zero(entry, dtype)
    if COMPUTE != dtype:  # Triton's interpreter, which runs no assembly
        return _number(_code(packed, position, BITS), dtype, COMPUTE) + minus_zero.to(dtype, bitcast=True).to(COMPUTE)
    text: tl.constexpr = assembly(BITS, position, dtype)
    if BITS == 2:
        bits = tl.inline_asm_elementwise(
            text, "=r,=r,r,r,r", [packed[0], minus_zero], dtype=tl.uint16, is_pure=True, pack=4
        )
    elif BITS == 3:
        arguments = [packed[0], packed[1], packed[2], minus_zero]
        bits = tl.inline_asm_elementwise(text, "=r,r,r,r,r,r,r,r", arguments, dtype=tl.uint16, is_pure=True, pack=2)
    elif BITS == 4:
        bits = tl.inline_asm_elementwise(text, "=r,r,r", [packed[0], minus_zero], dtype=tl.uint16, is_pure=True, pack=2)
    else:
        bits = tl.inline_asm_elementwise(
            text, "=r,r,r,r", [packed[0], minus_zero], dtype=tl.uint16, is_pure=True, pack=2
        )
    return bits.to(dtype, bitcast=True)


@triton.jit
def _awq_weight(word, entry, dtype: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns (S, O, C): the row's code in each word minus its zero point."""
    minus_zero = _minus_zero(entry, dtype)
    if COMPUTE != dtype:
        number = _number((word >> (entry >> 24)) & 15, dtype, COMPUTE)
        return number + minus_zero.to(dtype, bitcast=True).to(COMPUTE)
    text: tl.constexpr = assembly(0, 0, dtype)
    bits = tl.inline_asm_elementwise(
        text, "=r,r,r,r,r,r", [word, entry >> 24, minus_zero], dtype=tl.uint16, is_pure=True, pack=2
    )
    return bits.to(dtype, bitcast=True)


@triton.jit
def _gptq_step(
    part, x, words, entry, scale, start, t, tokens, width, row_words,
    BITS: tl.constexpr, S: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Adds the product of one step to `part`; `scale` (S, O, W) multiplies the weights if it is a tensor."""
    dtype: tl.constexpr = x.dtype.element_ty
    # Fours of codes in a packed number: 4 codes of 2, 4, 8 bits are 8, 16, 32 bits, 32 codes of 3 bits three words.
    FOURS: tl.constexpr = 8 if BITS == 3 else 1
    W: tl.constexpr = C // (4 * FOURS)
    w = start // (4 * FOURS) + tl.arange(0, S * W)
    if BITS == 3:
        # Columns first, as for x below.
        first = tl.trans(words) + w[:, None] * 3
        packed = (
            _by_slices(_load(first, w[:, None] * 3, row_words, EVEN), S),
            _by_slices(_load(first + 1, w[:, None] * 3, row_words, EVEN), S),
            _by_slices(_load(first + 2, w[:, None] * 3, row_words, EVEN), S),
        )
    else:
        packed = (_slices(_load(words + w[None, :], w[None, :], width // 4, EVEN), S),)
    for four in tl.static_range(FOURS):
        # Columns first: Triton lets neighbouring threads go along the first dimension if it sees no other reason.
        column = (w * FOURS + four)[:, None]
        inside = t < tokens if EVEN else (t < tokens) & (column < width // 4)
        fours = tl.load(x.to(tl.pointer_type(tl.int64)) + t * (width // 4) + column, mask=inside, other=0)
        fours = tl.reshape(fours, (S, W, fours.shape[1]))
        for element in tl.static_range(4):
            weight = _weight(packed, entry, four * 4 + element, BITS, dtype, COMPUTE)
            if scale is not None:
                weight = weight * scale
            columns = (fours >> (16 * element)).to(tl.int16).to(dtype, bitcast=True).to(COMPUTE)
            part = tl.dot(weight, columns, part)
    return part


@triton.jit
def _linear_step(
    x, words, entry, start, t, tokens, width,
    S: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Returns (S, O, T): the product of one step of 4-bit codes, each slice in one group, `entry` (S, O, 1)."""
    dtype: tl.constexpr = x.dtype.element_ty
    W: tl.constexpr = C // 4
    w = start // 4 + tl.arange(0, S * W)
    packed = _slices(_load(words + w[None, :], w[None, :], width // 4, EVEN), S)
    # Columns first, as in `_gptq_step`.
    inside = t < tokens if EVEN else (t < tokens) & (w[:, None] < width // 4)
    fours = tl.load(x.to(tl.pointer_type(tl.int64)) + t * (width // 4) + w[:, None], mask=inside, other=0)
    fours = tl.reshape(fours, (S, W, fours.shape[1]))
    part = tl.zeros((S, packed.shape[1], fours.shape[2]), tl.float32)
    total = tl.zeros((S, packed.shape[1], fours.shape[2]), tl.float32)
    for position in tl.static_range(4):
        code = tl.inline_asm_elementwise(
            code_assembly(position, dtype), "=r,r", [packed], dtype=tl.uint16, is_pure=True, pack=2
        )
        columns = (fours >> (16 * position)).to(tl.uint16)
        if dtype == tl.bfloat16:
            columns = tl.inline_asm_elementwise(
                activation_assembly(position), "=r,r", [columns], dtype=tl.uint16, is_pure=True, pack=2
            )
        columns = columns.to(dtype, bitcast=True)
        one = tl.full(packed.shape, 16 if dtype == tl.bfloat16 and position % 2 else 1, tl.uint16)
        part = tl.dot(code.to(dtype, bitcast=True), columns, part)
        total = tl.dot(one.to(dtype, bitcast=True), columns, total)
    zero = (((entry >> 16) & 255) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    scale = entry.to(tl.uint16).to(SCALE, bitcast=True).to(tl.float32)
    # 2**-133 of a code times 2**70, or float16's 2**-24.
    return (part - zero * total) * (scale * (2.0**63 if dtype == tl.bfloat16 else 2.0**24))


@triton.jit
def _awq_step(
    part, x, words, entry, scale, start, t, tokens, width,
    R: tl.constexpr, S: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Adds the product of one step to `part`; `scale` (S, O, C) multiplies the weights if it is a tensor."""
    k = start + tl.arange(0, S * C)
    word = _slices(_load(words + k[None, :], k[None, :], width, EVEN), S)
    word = tl.reshape(tl.broadcast_to(word[:, :, None, :], (S, R // 8, 8, C)), (S, R, C))
    weight = _awq_weight(word, entry, x.dtype.element_ty, COMPUTE)
    if scale is not None:
        weight = weight * scale
    inside = t < tokens if EVEN else (t < tokens) & (k[:, None] < width)
    columns = tl.load(x + t * width + k[:, None], mask=inside, other=0.0)
    return tl.dot(weight, tl.reshape(columns, (S, C, columns.shape[1])).to(COMPUTE), part)


@triton.jit(do_not_specialize=["tokens"])
def multiply_kernel(
    x, words, grid, bias, y, tokens, width, height, row_words, groups,
    BITS: tl.constexpr, AWQ: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    S: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, FULL: tl.constexpr, SCALE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """y (T, O) = x (T, I) times the weight, plus bias; one program for ROWS rows and TOKENS tokens.

    Args:
        words: GPTQ (O, row_words), AWQ (O / 8, row_words), int32.
        grid: (groups, O), see the module; bias: (O,) or None.
        GROUP: weights that share a scale. UNIT: what it has in common with C, the columns of a slice: 64 or more for
            GPTQ (512 for 3 bits), because tensor cores want 16 packed numbers.
        SCALE: dtype of the scales. COMPUTE: x's dtype; float32 in the interpreter, which cannot compute in bfloat16.
        EVEN: whether I is a multiple of S * C. FULL: whether O is a multiple of ROWS.
    """
    G: tl.constexpr = C // UNIT
    W: tl.constexpr = C if AWQ else C // (32 if BITS == 3 else 4)
    LINEAR: tl.constexpr = BITS == 4 and not AWQ and G == 1 and COMPUTE == x.dtype.element_ty
    PACK: tl.constexpr = 8 if AWQ else 1
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[None, :]
    packed_row = tl.program_id(0) * (ROWS // PACK) + tl.arange(0, ROWS // PACK)
    packed_row = (packed_row if FULL else tl.minimum(packed_row, (height - 1) // PACK))[:, None]
    inner = o if FULL else tl.minimum(o, height - 1)
    if BITS == 2:
        row_of_words = words.to(tl.pointer_type(tl.uint8)) + packed_row * (row_words * 4)
    elif BITS == 4 and not AWQ:
        row_of_words = words.to(tl.pointer_type(tl.uint16)) + packed_row * (row_words * 2)
    else:
        row_of_words = words.to(tl.pointer_type(tl.uint32)) + packed_row * row_words
    column_of_grid = grid.to(tl.pointer_type(tl.uint32)) + inner[None, :]
    acc = tl.zeros((S, ROWS, TOKENS), tl.float32)
    for start in tl.range(0, width, S * C, num_stages=STAGES):
        group = ((start + tl.arange(0, S * G) * UNIT) // GROUP)[:, None]
        entry = _by_slices(_load(column_of_grid + group * height, group, groups, EVEN), S)
        if LINEAR:
            acc += _linear_step(x, row_of_words, entry, start, t, tokens, width, S, C, EVEN, SCALE)
        else:
            wide = _repeat(entry, W)
            scale = None if G == 1 else wide.to(tl.uint16).to(SCALE, bitcast=True).to(COMPUTE)
            part = tl.zeros((S, ROWS, TOKENS), tl.float32) if G == 1 else acc
            if AWQ:
                part = _awq_step(part, x, row_of_words, wide, scale, start, t, tokens, width, ROWS, S, C, EVEN, COMPUTE)
            else:
                part = _gptq_step(
                    part, x, row_of_words, wide, scale, start, t, tokens, width, row_words, BITS, S, C, EVEN, COMPUTE
                )
            acc = acc + part * entry.to(tl.uint16).to(SCALE, bitcast=True).to(tl.float32) if G == 1 else part
    out = tl.sum(acc, 0)
    if bias is not None:
        out += tl.load(bias + inner).to(tl.float32)[:, None]
    tl.store(y + t * height + o[:, None], out.to(y.dtype.element_ty), mask=(t < tokens) & (o < height)[:, None])


@triton.jit
def _words_as_codes(
    words, entry, o, start, height, width, row_words, BITS: tl.constexpr, AWQ: tl.constexpr, COLUMNS: tl.constexpr
):
    """Returns (ROWS, COLUMNS) words with a code in the lowest bits; `entry` are the grid's, repeated for each code."""
    ROWS: tl.constexpr = o.shape[0]
    if AWQ:
        k = start + tl.arange(0, COLUMNS)[None, :]
        o8 = tl.program_id(0).to(tl.int64) * (ROWS // 8) + tl.arange(0, ROWS // 8)[:, None]
        word = tl.load(words + o8 * row_words + k, mask=(o8 * 8 < height) & (k < width), other=0)
        return tl.reshape(tl.broadcast_to(word[:, None, :], (ROWS // 8, 8, COLUMNS)), (ROWS, COLUMNS)) >> (entry >> 24)
    elif BITS == 3:
        unit = start // 32 + tl.arange(0, COLUMNS // 32)[None, :]
        first = words + o * row_words + unit * 3
        inside = (o < height) & (unit * 32 < width)
        low = tl.load(first, mask=inside, other=0)[:, :, None]
        middle = tl.load(first + 1, mask=inside, other=0)[:, :, None]
        high = tl.load(first + 2, mask=inside, other=0)[:, :, None]
        bit = (tl.arange(0, 32) * 3)[None, None, :]
        word = tl.where(bit < 32, low, tl.where(bit < 64, middle, high))
        following = tl.where(bit < 32, middle, high)
        shift = (bit % 32).to(tl.uint32)
        # Two codes lie across a border, at bits 30 and 31 of a word.
        code = (word >> shift) | tl.where(shift > 29, following << ((32 - shift) & 31), 0)
        return tl.reshape(code, (ROWS, COLUMNS))
    else:
        PER: tl.constexpr = 32 // BITS
        column = start // PER + tl.arange(0, COLUMNS // PER)[None, :]
        word = tl.load(words + o * row_words + column, mask=(o < height) & (column < row_words), other=0)
        shifts = (tl.arange(0, PER) * BITS).to(tl.uint32)
        return tl.reshape(word[:, :, None] >> shifts[None, None, :], (ROWS, COLUMNS))


@triton.jit
def dequantize_kernel(
    words, grid, weight, width, height, row_words,
    BITS: tl.constexpr, AWQ: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """weight (O, I) = scale * (code - zero point), computed in float32 and rounded once. Arguments as above."""
    o = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    start = tl.program_id(1) * COLUMNS
    first = start + tl.arange(0, COLUMNS // UNIT)[None, :] * UNIT
    table = grid.to(tl.pointer_type(tl.uint32)) + first // GROUP * height + o
    entry = tl.load(table, mask=(o < height) & (first < width), other=0)
    entry = tl.reshape(tl.broadcast_to(entry[:, :, None], (ROWS, COLUMNS // UNIT, UNIT)), (ROWS, COLUMNS))
    words = words.to(tl.pointer_type(tl.uint32))
    code = _words_as_codes(words, entry, o, start, height, width, row_words, BITS, AWQ, COLUMNS) & (2**BITS - 1)
    # 0x4B000000 | n is 2**23 + n in float32, of which the difference is exact.
    number = (code | 0x4B000000).to(tl.float32, bitcast=True)
    number -= (((entry >> 16) & 255) | 0x4B000000).to(tl.float32, bitcast=True)
    value = number * entry.to(tl.uint16).to(SCALE, bitcast=True).to(tl.float32)
    k = start + tl.arange(0, COLUMNS)[None, :]
    tl.store(weight + o * width + k, value.to(weight.dtype.element_ty), mask=(o < height) & (k < width))

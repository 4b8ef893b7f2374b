# type: ignore  # Triton's own language and its launches are no Python to a type checker.
"""Packed 2:4 groups to the two 16-bit pairs a tensor core reads: PTX byte lookups, and plain Triton.

A word of codes holds the pattern numbers 0..5 of eight groups, four bits each. `prmt`, which picks
any four bytes of eight, turns four numbers at once into selectors of bytes, and two more of it put
the kept values where they belong and zeros elsewhere. Integers become exact bf16 or fp16 numbers
through the bits of a power of two (Kim et al., arXiv:2211.10017); their scale is applied to sums.
The plain version computes the same and runs wherever there is no PTX.
"""

import triton
import triton.language as tl

_KEPT = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
_ZERO = 0x44
_FLOAT_SELECTORS = (0x10, 0x32, _ZERO)
# The low byte is the integer, the high one its sign (prmt repeats a sign if bit 3 is set).
_INT8_SELECTORS = (0x80, 0x91, _ZERO)
# The high byte is byte 5, a constant; so is byte 4, which holds the code of 0.
_INT4_SELECTORS = (0x50, 0x51, 0x54)
_OFFSET = {"bf16": 0x4300, "fp16": 0x6400}
_MINUSONES = {"bf16": 0xBF80, "fp16": 0xBC00}
ONES = {"bf16": 0x3F80, "fp16": 0x3C00}
_EXPONENT = {"bf16": 0xFF80, "fp16": 0xFC00}


def _twice(half: int) -> int:
    return half << 16 | half


def _lookup(selectors: tuple[int, int, int]) -> str:
    """Selectors of four groups for each of the four columns, s0 to s3, out of codes c."""
    first, second, zero = selectors
    lines = []
    for column in range(4):
        table = [
            first if kept[0] == column else second if kept[1] == column else zero for kept in _KEPT
        ]
        low = int.from_bytes(bytes(table[:4]), "little")
        high = int.from_bytes(bytes(table[4:]), "little")
        lines.append(f"prmt.b32 s{column}, {low}, {high}, c;")
    return "".join(lines)


def _group(plane: int, word: str, constants: str, finish: str) -> str:
    """Both pairs of columns of one group whose values are the low bytes of `word`."""
    pick = (plane % 4) | (plane % 4 + 4) << 4
    lines = []
    for target, left, right in ((plane, "s0", "s1"), (8 + plane, "s2", "s3")):
        lines.append(f"prmt.b32 t, {left}, {right}, {pick};")
        lines.append(f"prmt.b32 t, {word}, {constants}, t;")
        lines.append(finish.format(out=f"${target}"))
    return "".join(lines)


def _codes(plane: int, selectors: tuple[int, int, int]) -> str:
    """The lookup before planes 0 and 4; the codes are operand 16."""
    if plane % 4:
        return ""
    shift = "mov.b32 c, $16;" if plane == 0 else "shr.b32 c, $16, 16;"
    return shift + _lookup(selectors)


def _assembly(body: str) -> str:
    return "{.reg .b32 s0, s1, s2, s3, c, t, u, v, w, z, k, e, o, h;" + body + "}"


def float_assembly() -> str:
    """Eight words of two 16-bit values, operands 17 to 24."""
    body = "mov.b32 z, 0;"
    for plane in range(8):
        body += _codes(plane, _FLOAT_SELECTORS)
        body += _group(plane, f"${17 + plane}", "z", "mov.b32 {out}, t;")
    return _assembly(body)


def int8_assembly(dtype: str) -> str:
    """Four words, operands 17 to 20, of two groups each; bytes are sign and magnitude.

    A selected pair of bytes is the sign repeated and the byte; with the exponent of 128 (bf16) or
    1024 (fp16) in place it is plus or minus (2^n + magnitude), from which plus or minus 2^n goes.
    """
    finish = (
        "lop3.b32 u, t, k, e, 0xEA; and.b32 v, u, o;"
        f"fma.rn.{'bf16x2' if dtype == 'bf16' else 'f16x2'} {{out}}, v, w, u;"
    )
    masks = (("k", 0x807F), ("e", _OFFSET[dtype]), ("o", _EXPONENT[dtype]))
    body = f"mov.b32 z, 0; mov.b32 w, {_twice(_MINUSONES[dtype])};"
    body += "".join(f"mov.b32 {name}, {_twice(mask)};" for name, mask in masks)
    for plane in range(8):
        body += _codes(plane, _INT8_SELECTORS)
        word = f"${17 + plane // 2}"
        if plane % 2:
            body += f"shr.u32 h, {word}, 16;"
            word = "h"
        body += _group(plane, word, "z", finish)
    return _assembly(body)


def int4_assembly(dtype: str) -> str:
    """Two words, operands 17 and 18, of four groups each; a byte holds both values, each plus 8."""
    constants = _OFFSET[dtype] | 8
    minus = _twice(constants | 0x8000)
    finish = f"fma.rn.{'bf16x2' if dtype == 'bf16' else 'f16x2'} {{out}}, t, w, z;"
    body = f"mov.b32 w, {_twice(ONES[dtype])}; mov.b32 z, {minus}; mov.b32 k, {constants};"
    for plane in range(8):
        body += _codes(plane, _INT4_SELECTORS)
        if plane % 4 == 0:
            word = f"${17 + plane // 4}"
            body += f"and.b32 u, {word}, 0x0F0F0F0F; shr.u32 v, {word}, 4;"
            body += "and.b32 v, v, 0x0F0F0F0F; prmt.b32 e, u, v, 0x5140; prmt.b32 o, u, v, 0x7362;"
        pair = "e" if plane % 4 < 2 else "o"
        if plane % 2:
            body += f"shr.u32 h, {pair}, 16;"
            pair = "h"
        body += _group(plane, pair, "k", finish)
    return _assembly(body)


_FLOAT = tl.constexpr(float_assembly())
_INT8 = {dtype: tl.constexpr(int8_assembly(dtype)) for dtype in _OFFSET}
_INT4 = {dtype: tl.constexpr(int4_assembly(dtype)) for dtype in _OFFSET}
_INT8_BF16, _INT8_FP16 = _INT8["bf16"], _INT8["fp16"]
_INT4_BF16, _INT4_FP16 = _INT4["bf16"], _INT4["fp16"]
_OUTPUTS = tl.constexpr("=&r," * 16)
_TYPES = tl.constexpr((tl.int32,) * 16)


@triton.jit
def load_words(base, offset_r, start_r, COUNT: tl.constexpr, limit, EVEN: tl.constexpr):
    """COUNT words of each row from `start_r`, read once and not kept; 0 past the row's end."""
    at = offset_r[:, None] + tl.arange(0, COUNT)[None, :]
    if EVEN:
        words = tl.load(base + at, eviction_policy="evict_first")
    else:
        there = start_r[:, None] + tl.arange(0, COUNT)[None, :] < limit
        words = tl.load(base + at, mask=there, other=0, eviction_policy="evict_first")
    return words


@triton.jit
def _two(words, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Words (ROWS, 2 * HALF) as their first and their second half."""
    return tl.split(tl.permute(words.reshape(ROWS, 2, HALF), (0, 2, 1)))


@triton.jit
def _four(words, ROWS: tl.constexpr, QUARTER: tl.constexpr):
    low, high = _two(words, ROWS, 2 * QUARTER)
    w0, w1 = _two(low, ROWS, QUARTER)
    w2, w3 = _two(high, ROWS, QUARTER)
    return w0, w1, w2, w3


@triton.jit
def expand(
    codes,
    packed,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    PTX: tl.constexpr,
):
    """A span's codes (ROWS, 8) and values as sixteen words of pairs, see `expand_floats`."""
    W: tl.constexpr = 8
    if KIND == 8:
        q0, q1, q2, q3 = _four(packed, ROWS, W)
        pairs = expand_int8(codes, q0, q1, q2, q3, HALF, PTX)
    elif KIND == 4:
        q0, q1 = _two(packed, ROWS, W)
        pairs = expand_int4(codes, q0, q1, HALF, PTX)
    else:
        low, high = _two(packed, ROWS, 4 * W)
        p0, p1, p2, p3 = _four(low, ROWS, W)
        p4, p5, p6, p7 = _four(high, ROWS, W)
        pairs = expand_floats(codes, p0, p1, p2, p3, p4, p5, p6, p7, PTX)
    return pairs


@triton.jit
def expand_floats(codes, p0, p1, p2, p3, p4, p5, p6, p7, PTX: tl.constexpr):
    """Columns 0 and 1 of eight groups, then 2 and 3: sixteen words, two 16-bit values each."""
    if PTX:
        return tl.inline_asm_elementwise(
            _FLOAT,
            _OUTPUTS + "r,r,r,r,r,r,r,r,r",
            [codes, p0, p1, p2, p3, p4, p5, p6, p7],
            dtype=_TYPES,
            is_pure=True,
            pack=1,
        )
    l0, h0 = _halves(codes, p0)
    l1, h1 = _halves(codes >> 4, p1)
    l2, h2 = _halves(codes >> 8, p2)
    l3, h3 = _halves(codes >> 12, p3)
    l4, h4 = _halves(codes >> 16, p4)
    l5, h5 = _halves(codes >> 20, p5)
    l6, h6 = _halves(codes >> 24, p6)
    l7, h7 = _halves(codes >> 28, p7)
    return l0, l1, l2, l3, l4, l5, l6, l7, h0, h1, h2, h3, h4, h5, h6, h7


@triton.jit
def expand_int8(codes, q0, q1, q2, q3, HALF: tl.constexpr, PTX: tl.constexpr):
    """The same from signed magnitudes, two groups a word; integers as `HALF` numbers."""
    if PTX:
        return tl.inline_asm_elementwise(
            _INT8_BF16 if tl.bfloat16 == HALF else _INT8_FP16,
            _OUTPUTS + "r,r,r,r,r",
            [codes, q0, q1, q2, q3],
            dtype=_TYPES,
            is_pure=True,
            pack=1,
        )
    return expand_floats(
        codes,
        _bytes(q0, 0, HALF),
        _bytes(q0, 16, HALF),
        _bytes(q1, 0, HALF),
        _bytes(q1, 16, HALF),
        _bytes(q2, 0, HALF),
        _bytes(q2, 16, HALF),
        _bytes(q3, 0, HALF),
        _bytes(q3, 16, HALF),
        PTX,
    )


@triton.jit
def expand_int4(codes, q0, q1, HALF: tl.constexpr, PTX: tl.constexpr):
    """The same from codes stored 8 higher, four groups a word; integers as `HALF` numbers."""
    if PTX:
        return tl.inline_asm_elementwise(
            _INT4_BF16 if tl.bfloat16 == HALF else _INT4_FP16,
            _OUTPUTS + "r,r,r",
            [codes, q0, q1],
            dtype=_TYPES,
            is_pure=True,
            pack=1,
        )
    return expand_floats(
        codes,
        _nibbles(q0, 0, HALF),
        _nibbles(q0, 8, HALF),
        _nibbles(q0, 16, HALF),
        _nibbles(q0, 24, HALF),
        _nibbles(q1, 0, HALF),
        _nibbles(q1, 8, HALF),
        _nibbles(q1, 16, HALF),
        _nibbles(q1, 24, HALF),
        PTX,
    )


@triton.jit
def _halves(code, word):
    """Columns 0 and 1, and 2 and 3, of the group whose two kept 16-bit values are `word`."""
    code = code & 15
    first = word & 0xFFFF
    second = (word >> 16) & 0xFFFF
    c0 = tl.where(code < 3, first, 0)
    c1 = tl.where(code == 0, second, tl.where((code == 3) | (code == 4), first, 0))
    c2 = tl.where((code == 1) | (code == 3), second, tl.where(code == 5, first, 0))
    c3 = tl.where((code == 2) | (code > 3), second, 0)
    return c0 | (c1 << 16), c2 | (c3 << 16)


@triton.jit
def _bytes(word, SHIFT: tl.constexpr, HALF: tl.constexpr):
    """Two signed magnitudes of a word as two 16-bit numbers."""
    return _signed(word >> SHIFT, HALF) | (_signed(word >> (SHIFT + 8), HALF) << 16)


@triton.jit
def _signed(byte, HALF: tl.constexpr):
    magnitude = byte & 127
    return _bits(tl.where((byte & 128) != 0, -magnitude, magnitude), HALF)


@triton.jit
def _nibbles(word, SHIFT: tl.constexpr, HALF: tl.constexpr):
    """Two codes of a word, each stored 8 higher, as two 16-bit numbers."""
    first = ((word >> SHIFT) & 15) - 8
    second = ((word >> (SHIFT + 4)) & 15) - 8
    return _bits(first, HALF) | (_bits(second, HALF) << 16)


@triton.jit
def _bits(integer, HALF: tl.constexpr):
    """The bits of a small integer as a 16-bit number."""
    if tl.bfloat16 == HALF:
        return (integer.to(tl.float32).to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    return integer.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def columns(low, high, HALF: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Words of pairs (ROWS, WORDS) as numbers (ROWS, 4 * WORDS) in the order of the columns."""
    left = tl.join(low.to(tl.int16), (low >> 16).to(tl.int16))
    right = tl.join(high.to(tl.int16), (high >> 16).to(tl.int16))
    both = tl.permute(tl.join(left, right), (0, 1, 3, 2)).reshape(ROWS, 4 * WORDS)
    return both.to(HALF, bitcast=True)

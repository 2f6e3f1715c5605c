"""A register of the CPU as a value: 64 bytes of numbers, and one instruction for all of them.

A compiler puts a plain loop into such registers where it can prove that it may and believes that it
pays; both change with every line around the loop, and it prefers registers of half the size. The
innermost loop of attention is worth saying exactly. Here a register is a value of its own:

    s = zeros(acc)                           0   0   0   0  ..       16 float32, or 8 float64
    for d in range(0, 64, lanes(acc)):
        s += load(q, d, 64 - d) * load(k, row + d, 64 - d)           16 products, 16 sums
    score = total(s)                         halves added: 16 -> 8 -> 4 -> 2 -> 1

bfloat16 becomes float32 on its way into a register and is rounded on its way back. A register that
a row does not fill is padded with zeros, so a head size need not be a multiple of anything; such an
end of a row is copied number by number. Where the processor's registers are shorter, a value simply
takes two or four of them. Each word below is a few lines of the language of LLVM, the compiler that
Numba hands its loops to.

What a production engine does beyond this: the same in C++, and for each kind of processor the
registers and the instructions that it has.

Kretz and Lindenstruth 2012, "Vc: a C++ library for explicit vectorization", SPE 42(11).
Run: python -m kernels.vector_cpu
Try: give power_of_two a term less and watch its error.
"""

import math
import operator

import numpy as np

from kernels.numba_tools import HAS_NUMBA, compiled

if HAS_NUMBA:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.core.errors import TypingError
    from numba.extending import intrinsic, models, overload, register_model

    I32, I64 = ir.IntType(32), ir.IntType(64)
else:

    def intrinsic(function):
        """Nothing is compiled: the words stay as they are, and nobody calls them."""
        return function


REGISTER = 512  # bits
TERMS = {32: 8, 64: 15}  # of a series that has to be as exact as the numbers
EXPONENT = {32: (23, 127), 64: (52, 1023)}  # where a number's exponent begins, what it has added


# ---- the type ------------------------------------------------------------------------------------
if HAS_NUMBA:

    class Vector(types.Type):
        """What Numba knows of a register: the type of its numbers, and how many there are."""

        def __init__(self, element):
            self.element, self.lanes = element, REGISTER // element.bitwidth
            super().__init__(f"Vector({element})")

    @register_model(Vector)
    class VectorModel(models.PrimitiveModel):
        """The same to the compiler behind it, which knows such values well."""

        def __init__(self, manager, kind):
            element = manager.lookup(kind.element).get_value_type()
            super().__init__(manager, kind, ir.VectorType(element, kind.lanes))


def computed_as(array):
    """The register that an array's numbers are computed in: bfloat16 comes as its bits."""
    if array.layout != "C" or array.dtype not in (types.float64, types.float32, types.uint16):
        raise TypingError(f"a register takes numbers of its own side by side, not {array}")
    return Vector(types.float64 if array.dtype == types.float64 else types.float32)


def constant(kind, number):
    """A number, or a register full of it."""
    return kind([number] * kind.count) if isinstance(kind, ir.VectorType) else kind(number)


def in_all_lanes(builder, number, num_lanes):
    """A register full of a number that is known when the loop runs."""
    nothing = ir.VectorType(number.type, num_lanes)(ir.Undefined)
    first = builder.insert_element(nothing, number, I32(0))
    return builder.shuffle_vector(first, nothing, ir.VectorType(I32, num_lanes)([0] * num_lanes))


def call(builder, name, *args):
    """LLVM's own function of this name on numbers or registers, one that takes each lane alone."""
    kind = args[0].type
    element, count = (kind.element, f"v{kind.count}") if hasattr(kind, "count") else (kind, "")
    bits = 64 if isinstance(element, ir.DoubleType) else 32
    declared = ir.FunctionType(kind, [kind] * len(args))
    full_name = f"llvm.{name}.{count}f{bits}"
    return builder.call(cgutils.get_or_insert_function(builder.module, declared, full_name), args)


def join_lanes(builder, vectors, join):
    """Each of one, two or four registers joined to a number; these in a short register.

    The lower half of each and the upper one are joined until one number of each is left. Two
    registers become one on the way, the halves of both side by side:  aaaa bbbb -> aabb -> ab
    """
    width = vectors[0].type.count
    while width > 1:
        pairs = [vectors[i : i + 2] for i in range(0, len(vectors), 2)]
        vectors = [join(*lower_and_upper(builder, pair, width)) for pair in pairs]
        width //= 2
    return vectors[0]


def lower_and_upper(builder, vectors, width):
    """Of each `width` numbers in one register or two: the lower halves and the upper ones."""
    count = sum(vector.type.count for vector in vectors)
    for begin in (0, width // 2):
        order = [i for i in range(count) if begin <= i % width < begin + width // 2]
        yield builder.shuffle_vector(vectors[0], vectors[-1], ir.VectorType(I32, len(order))(order))


# ---- from memory and back ------------------------------------------------------------------------
@intrinsic
def lanes(typingctx, array):
    """How many of an array's numbers a register holds; known while compiling."""
    count = computed_as(array).lanes
    return types.int64(array), lambda *_: I64(count)


@intrinsic
def zeros(typingctx, array):
    """A register of zeros for what is computed from an array."""
    kind = computed_as(array)
    return kind(array), lambda context, *_: context.get_value_type(kind)(None)


def one_by_one(builder, source, target, count):
    """Copy so many numbers, each alone: the end of a row that does not fill a register."""
    with cgutils.for_range(builder, count, intp=I64) as loop:
        number = builder.load(builder.gep(source, [loop.index]))
        builder.store(number, builder.gep(target, [loop.index]))


@intrinsic
def load(typingctx, array, at, count):
    """array[at], array[at + 1] and so on; if `count` is less than there are lanes, then so many,
    and zeros."""
    kind, align = computed_as(array), array.dtype.bitwidth // 8  # numbers begin anywhere

    def generate(context, builder, signature, args):
        data = context.make_array(array)(context, builder, args[0]).data
        begin, stored = builder.gep(data, [args[1]]), ir.VectorType(data.type.pointee, kind.lanes)
        room = cgutils.alloca_once(builder, stored)
        is_whole = builder.icmp_signed(">=", args[2], I64(kind.lanes))
        with builder.if_else(is_whole, likely=True) as (whole, part):
            with whole:
                all_of_it = builder.load(builder.bitcast(begin, stored.as_pointer()), align=align)
                after_whole = builder.block
            with part:
                builder.store(stored(None), room)
                one_by_one(builder, begin, builder.bitcast(room, data.type), args[2])
                some_of_it = builder.load(room)
                after_part = builder.block
        vector = builder.phi(stored)
        vector.add_incoming(all_of_it, after_whole)
        vector.add_incoming(some_of_it, after_part)
        if array.dtype == types.uint16:  # a bfloat16 is the upper half of a float32
            words = builder.zext(vector, ir.VectorType(I32, kind.lanes))
            words = builder.shl(words, constant(words.type, 16))
            vector = builder.bitcast(words, context.get_value_type(kind))
        return vector

    return kind(array, types.int64, types.int64), generate


@intrinsic
def store(typingctx, array, at, count, vector):
    """Put a register to array[at] and behind it; if `count` is less than there are lanes, then so
    many of its numbers. To bfloat16 they are rounded, halves to the even neighbour."""
    if vector != computed_as(array):
        raise TypingError(f"{vector} does not go into {array}")

    def generate(context, builder, signature, args):
        data = context.make_array(array)(context, builder, args[0]).data
        begin, value = builder.gep(data, [args[1]]), args[3]
        if array.dtype == types.uint16:
            value = rounded(builder, value)
        room = cgutils.alloca_once(builder, value.type)
        is_whole = builder.icmp_signed(">=", args[2], I64(vector.lanes))
        with builder.if_else(is_whole, likely=True) as (whole, part):
            with whole:
                to = builder.bitcast(begin, value.type.as_pointer())
                builder.store(value, to, align=array.dtype.bitwidth // 8)
            with part:
                builder.store(value, room)
                one_by_one(builder, builder.bitcast(room, data.type), begin, args[2])
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, vector), generate


def rounded(builder, vector):
    """float32 to the bits of bfloat16: the upper halves, after adding half a place or just less."""
    words = builder.bitcast(vector, ir.VectorType(I32, vector.type.count))

    def number(x):
        return constant(words.type, x)

    is_odd = builder.and_(builder.lshr(words, number(16)), number(1))
    up = builder.add(words, builder.add(is_odd, number(0x7FFF)))
    # What is not a number stays so: adding could carry it to an infinity, or through the sign.
    quiet = builder.or_(words, number(0x400000))
    words = builder.select(builder.fcmp_unordered("uno", vector, vector), quiet, up)
    upper = builder.lshr(words, number(16))
    return builder.trunc(upper, ir.VectorType(ir.IntType(16), vector.type.count))


# ---- arithmetic ----------------------------------------------------------------------------------
def arithmetic(name):
    """A word for two registers, or a register and a number for all lanes; x * y + z is one step."""

    @intrinsic
    def word(typingctx, a, b):
        kind = a if isinstance(a, Vector) else b

        def generate(context, builder, signature, args):
            pair = [
                x if hasattr(x.type, "count") else in_all_lanes(builder, x, kind.lanes)
                for x in args
            ]
            return getattr(builder, name)(*pair, flags=("contract",))

        number = kind.element
        return kind(*(x if isinstance(x, Vector) else number for x in (a, b))), generate

    return word


add, subtract = arithmetic("fadd"), arithmetic("fsub")
multiply, divide = arithmetic("fmul"), arithmetic("fdiv")

if HAS_NUMBA:

    def say(symbol, word):
        """What a symbol between two values means, where one of them is a register."""

        @overload(symbol)
        def chosen(a, b):
            if isinstance(a, Vector) or isinstance(b, Vector):
                return lambda a, b: word(a, b)
            return None

    say(operator.add, add)
    say(operator.iadd, add)
    say(operator.sub, subtract)
    say(operator.mul, multiply)
    say(operator.truediv, divide)


@intrinsic
def total(typingctx, vector):
    """The sum of a register's numbers."""

    def generate(context, builder, signature, args):
        return builder.extract_element(join_lanes(builder, args, builder.fadd), I32(0))

    return vector.element(vector), generate


@intrinsic
def store_totals(typingctx, array, at, a, b, c, d):
    """array[at], array[at + 1] and the next two = the sums of four registers' numbers."""

    def generate(context, builder, signature, args):
        data = context.make_array(array)(context, builder, args[0]).data
        sums = join_lanes(builder, args[2:], builder.fadd)
        to = builder.bitcast(builder.gep(data, [args[1]]), sums.type.as_pointer())
        builder.store(sums, to, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, a, b, c, d), generate


@intrinsic
def largest(typingctx, vector):
    """The largest of a register's numbers; which, if one is not a number, is left open."""

    def generate(context, builder, signature, args):
        def join(a, b):
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        return builder.extract_element(join_lanes(builder, args, join), I32(0))

    return vector.element(vector), generate


@intrinsic
def at_most(typingctx, vector, limit):
    """The smaller of each number and a limit; what is not a number stays so."""

    def generate(context, builder, signature, args):
        limits = in_all_lanes(builder, args[1], vector.lanes)
        return builder.select(builder.fcmp_ordered(">", args[0], limits), limits, args[0])

    return vector(vector, vector.element), generate


@intrinsic
def first(typingctx, vector, count):
    """The first `count` of a register's numbers; minus infinity in the other lanes."""

    def generate(context, builder, signature, args):
        kind = args[0].type
        limit = in_all_lanes(builder, builder.trunc(args[1], I32), kind.count)
        is_first = builder.icmp_signed("<", limit.type(list(range(kind.count))), limit)
        return builder.select(is_first, args[0], constant(kind, -math.inf))

    return vector(vector, types.int64), generate


@intrinsic
def power_of_two(typingctx, x):
    """2^x for x of at most 126, a number or a register; minus infinity gives the smallest number.

    2^x is 2^n 2^f with n whole and f in [-1/2, 1/2]: the first is the exponent's bits, the second a
    series, e^(f ln 2).
    """
    kind = x.element if isinstance(x, Vector) else x

    def generate(context, builder, signature, args):
        (x,), bits = args, kind.bitwidth
        (begin, bias), integers = EXPONENT[bits], ir.IntType(bits)
        if hasattr(x.type, "count"):
            integers = ir.VectorType(integers, x.type.count)
        terms = [math.log(2) ** i / math.factorial(i) for i in range(TERMS[bits])]
        terms = [constant(x.type, term) for term in terms]
        smallest, half = constant(x.type, 1.0 - bias), constant(x.type, 0.5)
        # A choice and not a maximum: what is not a number stays so.
        x = builder.select(builder.fcmp_ordered("<", x, smallest), smallest, x)
        n = call(builder, "floor", builder.fadd(x, half))
        f, series = builder.fsub(x, n), terms[-1]
        for term in reversed(terms[:-1]):
            series = call(builder, "fmuladd", f, series, term)
        n = builder.select(builder.fcmp_ordered(">", n, smallest), n, smallest)
        exponent = builder.fptosi(builder.fadd(n, constant(x.type, float(bias))), integers)
        exponent = builder.shl(exponent, constant(integers, begin))
        return builder.fmul(series, builder.bitcast(exponent, x.type))

    return x(x), generate


# --------------------------------------------------------------------------------------------------
@compiled
def powers(x, out):
    """2 ** x, a register at a time."""
    for i in range(0, len(x), lanes(x)):
        store(out, i, len(x) - i, power_of_two(load(x, i, len(x) - i)))


@compiled
def dot(a, b):
    """The inner product."""
    s = zeros(a)
    for i in range(0, len(a), lanes(a)):
        s += load(a, i, len(a) - i) * load(b, i, len(a) - i)
    return total(s)


def demo():
    """Products of rows of any length and type, and powers with their error in last places."""
    if not HAS_NUMBA:
        print("ok: nothing to compile without numba")
        return
    generator = np.random.default_rng(0)
    for length in (64, 80, 7):
        a, b = generator.integers(-8, 8, (2, length))
        a16 = (a.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        got = dot(a16, b.astype(np.float32)), dot(a.astype(np.float64), b.astype(np.float64))
        print(f"{length:2} products: bfloat16 x float32 {got[0]:5.0f}, float64 {got[1]:5.0f}")
        assert got == (a @ b, a @ b)
    for dtype in (np.float32, np.float64):
        x = np.linspace(-20, 0, 10_001, dtype=dtype)
        out = np.empty_like(x)
        powers(x, out)
        error = np.abs(out / np.exp2(x.astype(np.longdouble)) - 1).max() / np.finfo(dtype).eps
        print(f"2^x, {len(x):,} numbers in {dtype.__name__}: at most {error:.2f} eps off")
        assert error < 2
    print("ok: registers full and not full, widened, multiplied, added and raised")


if __name__ == "__main__":
    demo()

"""The latency model: what it reads from a listing, how it counts time, and that it refuses what it does not know."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
from latency import cards, predict, sass, trips
from latency.launches import Compiled, resident
from latency.warp import Warp, walked

SOURCE = """\
def leaf(n):
    for i in range(n):
        work(i)


def kernel(n, m):
    leaf(n)
    for j in range(m):
        while m > 0:
            m -= 1
    leaf(m)
"""
# what a line after "at" comes from: (line, line of the call around it)
LISTING = """
at 2 7
        /*0010*/                   IMAD.MOV.U32 R2, RZ, RZ, RZ ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P1 BRA `(.L_x_4) ;
.L_x_1:
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
at 2 7
        /*0050*/               @P0 BRA `(.L_x_0) ;
at 8
        /*0060*/                   MUFU.EX2 R9, R4 ;
.L_x_2:
        /*0070*/                   STS.64 [R1], R8 ;
.L_x_3:
        /*0080*/                   SHFL.BFLY PT, R9, R9, 0x4, 0x1f ;
at 9
        /*0090*/               @P0 BRA `(.L_x_3) ;
at 8
        /*00a0*/               @P1 BRA `(.L_x_2) ;
        /*00b0*/                   ATOMG.E.ADD.STRONG.GPU PT, R5, desc[UR4][R2.64], R5 ;
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   HMMA.16816.F32.BF16 R12, R4, R8, RZ ;
        /*00e0*/                   BRA `(.L_x_1) ;
.L_x_5:
        /*00f0*/                   BRA `(.L_x_5);
"""


@pytest.fixture
def code(tmp_path):
    file = tmp_path / "source.py"
    file.write_text(SOURCE)
    lines = []
    for line in LISTING.splitlines():
        if not line.startswith("at "):
            lines.append(line)
            continue
        at, *calls = line.split()[1:]
        lines += [
            f'\t//## File "{file}", line {at}' + (f' inlined at "{file}", line {calls[0]}' if calls else "")
        ]
        lines += [f'\t//## File "{file}", line {call}' for call in calls]
    return sass.parse("\n".join(lines))


def straight(*lines):
    return sass.parse("\n".join(f"/*{i:04x}*/ {line} ;" for i, line in enumerate(lines, 16)))


def test_loops_have_the_names_of_their_python(code):
    """Nested ones, one in a called function; a block that was moved to the end and a branch to itself are none."""
    names = [(depth, str(loop.source)) for depth, loop in code.every_loop()]
    assert names == [
        (0, "leaf: for i in range(n), called as leaf(n)"),
        (0, "kernel: for j in range(m)"),
        (1, "kernel: while m > 0"),
    ]


def test_loops_are_counted(code):
    first, second = code.loops
    counts = {kind: n for kind, n in code.counts(first).items() if n}
    assert counts == {"instructions": 4, "global loads": 1, "barriers": 1}
    counts = {kind: n for kind, n in code.counts(second).items() if n}
    assert counts == {"instructions": 4, "shared": 1, "SHFL": 1}
    assert code.counts(sass.Loop(0, 12, None))["atomics"] == code.counts(sass.Loop(0, 12, None))["MMA"] == 1


@pytest.mark.parametrize(
    "text, writes, reads",
    [
        ("LDG.E.128 R4, desc[UR4][R2.64+0x10]", "R4 R5 R6 R7", "UR4 R2 R3"),
        ("@!P3 STG.E.64 desc[UR4][R2.64], R8", "", "UR4 R2 R3 R8 R9 P3"),
        ("ISETP.GE.AND P0, PT, R4, R33, P1", "P0", "R4 R33 P1"),
        ("IADD3 R18, P1, R18, UR4, RZ", "R18 P1", "R18 UR4"),
        ("ATOMG.E.ADD.STRONG.GPU PT, R10, desc[UR14][R8.64], R5", "R10", "UR14 R8 R9 R5"),
        ("IMAD.WIDE.U32 R22, R25, 0x7, R22", "R22 R23", "R25 R22"),
        ("LDGSTS.E.BYPASS.128 [R94+0x1000], desc[UR12][R114.64], P6", "", "R94 UR12 R114 R115 P6"),
    ],
)
def test_operands(text, writes, reads):
    (x,) = straight(text).instructions
    assert (" ".join(x.writes), " ".join(x.reads)) == (writes, reads)


@pytest.mark.parametrize(
    "warps, registers, shared, programs",
    [
        (16, 128, 0, 1),  # all 65,536 registers
        (8, 128, 0, 2),
        (8, 129, 0, 1),  # given out 8 at a time
        (4, 168, 0, 3),
        (4, 32, 0, 16),  # 64 warps
        (1, 32, 0, 32),  # 32 blocks
        (4, 32, 66048, 3),  # 228 KB
        (16, 128, 232448, 1),
    ],
)
def test_programs_on_a_multiprocessor(warps, registers, shared, programs):
    assert resident(warps, registers, shared) == programs


STEPS = cards.guess("H200").steps._replace(fetch=0, in_step=0)
LOAD = 700


def cycles(code, load=1.0, times=1.0):
    last = len(code.instructions) - 1
    return walked(Warp(STEPS, LOAD, load), code, 0, last, lambda loop: times)


def test_loads_wait_for_those_they_need():
    apart = straight("LDG.E R2, [R4.64]", "LDG.E R3, [R6.64]", "FADD R8, R2, R3")
    chained = straight("LDG.E R6, [R4.64]", "LDG.E R3, [R6.64]", "FADD R8, R2, R3")
    assert LOAD < cycles(apart) < LOAD + 20
    assert 2 * LOAD < cycles(chained) < 2 * LOAD + 20


def test_copies_are_waited_for_by_group():
    lines = [
        "LDGSTS [R4], [R6.64]",
        "LDGDEPBAR",
        *["FADD R1, R1, R2"] * 50,
        "LDGSTS [R5], [R8.64]",
        "LDGDEPBAR",
    ]
    one_open = cycles(straight(*lines, "DEPBAR.LE SB0, 0x1"))
    none_open = cycles(straight(*lines, "DEPBAR.LE SB0, 0x0"))
    assert LOAD < one_open < LOAD + 20 and none_open - one_open > 50


def test_many_warps_wait_for_the_pipes():
    """64 lanes of integers, 16 of special functions and 32 of shuffles a cycle and multiprocessor."""
    for line, cost in (("LOP3.LUT R1, R2, R3", 2), ("MUFU.EX2 R1, R2", 8), ("SHFL.BFLY PT, R1, R2", 4)):
        block = straight(*[line] * 1000)
        assert cycles(block, load=16) == pytest.approx(16 * 1000 * cost, rel=0.01)


def test_rounds_take_alike(code):
    once, twice, often = (cycles(code, times=n) for n in (1, 2, 12))
    assert cycles(code, times=0) < once < twice
    assert often > twice + 9 * LOAD  # the first loop loads one register again and again


def launch_of(code, name="_gather_tokens_kernel", grid=(1, 1, 1), **arguments):
    return Compiled(name, grid, SimpleNamespace(**arguments), 4, 32, 0, code)


def test_an_unknown_loop_is_an_error(code):
    with pytest.raises(
        LookupError, match=r"expected an entry of LOOPS in latency.trips, got none for leaf: for i"
    ):
        trips.trips(code.loops[0].source, launch_of(code), STEPS)
    with pytest.raises(LookupError, match="one that a line of Python stands for"):
        trips.trips(None, launch_of(code), STEPS)
    changed = sass.Source("score_part", "for h_kv in range(h_first)", None)
    with pytest.raises(LookupError, match="score_part: for h_kv"):
        trips.trips(changed, launch_of(code), STEPS)


def test_parts_end_where_programs_count_themselves_in(code):
    score = launch_of(code, "_score_select_kernel", SPLIT=True, SELECTS=False)
    assert [(part.column, first, last) for part, first, last in predict.sections(score)] == [
        ("score", 0, 10),
        ("join", 11, 14),
    ]
    with pytest.raises(ValueError, match="between any two of gather, got 1 atomics"):
        predict.sections(launch_of(code))
    with pytest.raises(LookupError, match=r"kernel: expected one of _score_select_kernel, .*got _other"):
        predict.sections(launch_of(code, "_other"))


def test_loops_that_the_model_would_get_wrong_are_errors(code):
    first, second = code.loops
    rest = sass.Loop(second.first, second.last, first.source)
    unrolled = dataclasses.replace(code, loops=(first, rest))
    score = dict(name="_score_select_kernel", SPLIT=True, SELECTS=False)
    with pytest.raises(ValueError, match=r"expected one loop, got 2 \(unrolled\?\) of leaf: for i"):
        predict.sections(launch_of(unrolled, **score))
    around = dataclasses.replace(code, loops=(sass.Loop(0, 11, second.source),))
    with pytest.raises(ValueError, match="expected no atomic in a loop, got one in kernel: for j"):
        predict.sections(launch_of(around, **score))


def test_passes_over_columns_and_positions():
    def passes(function, **arguments):
        (count,) = trips.LOOPS[function].values()
        return count(launch_of(None, **arguments), STEPS)

    alone = dict(name="_score_select_kernel", grid=(45, 16, 1))
    shares = dict(name="_select_columns_kernel", grid=(8, 1, 1))
    sizes = dict(N=2880, positions=4100, CHUNK=2048)
    assert passes("number_columns", **sizes, **alone) == 2
    assert passes("_place_positions", **sizes, **alone) == 3
    sizes = dict(N=16384, positions=16448, CHUNK=2048)
    assert passes("number_columns", **sizes, **shares) == 1
    assert passes("_place_positions", **sizes, **shares) == 2  # with the text before or behind it
    assert passes("count_before", **sizes, **shares) == 7
    assert passes("_last_kept", **sizes, **shares) == 14 * STEPS.rounds
    assert passes("join_parts", name="_score_select_kernel", grid=(9, 32, 1)) == 2


def test_before_triton_3_9_the_longest_call_counts(code):
    by_call = sass.Source("_fill", "for begin in range(start, stop, CHUNK)", None)
    launch = launch_of(code, "_score_select_kernel", N=4096, positions=4160, CHUNK=1024)
    assert trips.trips(by_call, launch, STEPS) == 5
    with pytest.raises(LookupError, match="called as _fill"):
        trips.trips(sass.Source("_fill", by_call.header, "_fill(marks_ptr)"), launch, STEPS)


def test_constants_have_an_order_and_a_source():
    every = {**cards.COMMON, **cards.STEPS, **cards.CARDS["H100"]}
    assert cards.names() == [*cards.CARDS["H100"], *cards.COMMON, *cards.STEPS]
    for name, constant in every.items():
        faster = name in ("clock", "bandwidth")
        assert constant[:3] == tuple(sorted(constant[:3], reverse=faster)) and constant.source, name
    varied = cards.guess("H100", "dram", "worse")
    assert varied.steps.dram == cards.STEPS["dram"].worse and varied.gap == cards.COMMON["gap"].typical
    assert math.isclose(cards.guess("H200").bandwidth, 4.1)

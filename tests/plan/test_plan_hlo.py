"""The parser of compiled programs, on texts of known content."""

import pytest

from opd_jax.plan.collectives import collectives, copies
from opd_jax.plan.hlo import parse
from opd_jax.plan.loops import run_counts, trip_count

# Layouts, tuples with comments, and places in the source as the TPU compiler prints them.
HEADER = """HloModule jit_step, is_scheduled=true, num_partitions=8

FileNames
1 "/usr/lib/site-packages/opd_jax/losses.py"
2 "/usr/lib/site-packages/opd_jax/model.py"

FunctionNames
1 "_logits"
2 "forward.<locals>.block"

FileLocations
1 {file_name_id=1 function_name_id=1 line=35 end_line=35 column=4 end_column=9}
2 {file_name_id=2 function_name_id=2 line=70 end_line=70 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

"""
ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

"""


def loop(
    *,
    name: str = "",
    body: str = "",
    bound: int = 28,
    step: int = 1,
    direction: str = "LT",
    state: str = "s32[], f32[4,8]{1,0}",
) -> str:
    """A condition and a body that counts in element 0 of its state."""
    return f"""%cond{name} (p.c: ({state})) -> pred[] {{
  %limit{name} = s32[]{{:T(128)}} constant({bound})
  %p.c = ({state}) parameter(0)
  %at{name} = s32[]{{:T(128)}} get-tuple-element(%p.c), index=0
  ROOT %go{name} = pred[] compare(%at{name}, %limit{name}), direction={direction}
}}

%body{name} (p.b: ({state})) -> ({state}) {{
  %p.b = ({state}) parameter(0)
  %i{name} = s32[] get-tuple-element(%p.b), index=0
  %x{name} = f32[4,8]{{1,0:T(8,128)}} get-tuple-element(%p.b), index=1
  %one{name} = s32[] constant({step})
{body}  %next{name} = s32[] add(%i{name}, %one{name})
  ROOT %out{name} = ({state}) tuple(%next{name}, %x{name})
}}

"""


def entry(*, start: int = 0, more: str = "", loops: str = "%state") -> str:
    return f"""ENTRY %main (x: f32[4,8]) -> f32[4,8] {{
  %x = f32[4,8]{{1,0:T(8,128)}} parameter(0)
  %zero = s32[] constant({start})
  %begin = s32[]{{:T(128)}} copy(%zero)
  %state = (s32[], f32[4,8]{{1,0}}) tuple(%begin, %x)
{more}  %while = (s32[], f32[4,8]{{1,0}}) while({loops}), condition=%cond, body=%body
  ROOT %result = f32[4,8]{{1,0}} get-tuple-element(%while), index=1
}}
"""


def trips(text: str) -> int | None:
    module = parse(text)
    return trip_count(module, module.entry, module.computations["main"]["while"])


@pytest.mark.parametrize(
    ("start", "bound", "step", "direction", "expected"),
    [
        (0, 28, 1, "LT", 28),
        (3, 28, 1, "LT", 25),
        (0, 8, 2, "LT", 4),
        (0, 7, 2, "LT", 4),
        (0, 8, 2, "LE", 5),
        (27, 0, -1, "GE", 28),
        (27, 0, -1, "GT", 27),
        (0, 8, 2, "NE", 4),
        (5, 5, 1, "LT", 0),
        # It would never end, or nobody can say.
        (0, 7, 2, "NE", None),
        (0, 8, -1, "LT", None),
        (0, 8, 0, "LT", None),
    ],
)
def test_a_loop_runs_from_its_start_to_its_bound_in_steps(start, bound, step, direction, expected):
    text = HEADER + loop(bound=bound, step=step, direction=direction) + entry(start=start)
    assert trips(text) == expected


def test_a_count_that_is_printed_is_taken():
    text = HEADER + loop() + entry()
    known = 'body=%body, backend_config={"known_trip_count":{"n":"12"}}'
    assert trips(text.replace("body=%body", known)) == 12


def test_of_a_loop_that_may_end_early_the_bound_counts():
    text = HEADER + loop(bound=16) + entry()
    early = text.replace(
        "  ROOT %go = pred[] compare(%at, %limit), direction=LT\n",
        "  %more = pred[] compare(%at, %limit), direction=LT\n"
        "  %seen = f32[4,8]{1,0} get-tuple-element(%p.c), index=1\n"
        "  %any = pred[] fusion(%seen), kind=kLoop, calls=%alive\n"
        "  ROOT %go = pred[] and(%more, %any)\n",
    )
    alive = "%alive (s: f32[4,8]) -> pred[] {\n  %s = f32[4,8] parameter(0)\n"
    alive += '  ROOT %r = pred[] custom-call(%s), custom_call_target="Any"\n}\n\n'
    assert trips(early.replace("ENTRY", alive + "ENTRY")) == 16


def test_counters_and_comparisons_inside_fusions_are_followed():
    text = HEADER + loop(bound=10, step=5) + entry()
    text = text.replace(
        "ROOT %go = pred[] compare(%at, %limit), direction=LT",
        "ROOT %go = pred[] fusion(%limit, %at), kind=kLoop, calls=%less",
    ).replace(
        "%next = s32[] add(%i, %one)", "%next = s32[] fusion(%i, %one), kind=kLoop, calls=%plus"
    )
    fused = """%less (l: s32[], a: s32[]) -> pred[] {
  %l = s32[] parameter(0)
  %a = s32[] parameter(1)
  ROOT %c = pred[] compare(%a, %l), direction=LT
}

%plus (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %s = s32[] add(%b, %a)
}

"""
    assert trips(text.replace("%cond (", fused + "%cond (")) == 2


def test_a_bound_in_the_loops_own_state_is_found():
    state = "s32[], f32[4,8]{1,0}, s32[]"
    text = HEADER + loop(state=state) + entry()
    text = text.replace(
        "  %limit = s32[]{:T(128)} constant(28)\n",
        "",
    ).replace("  ROOT %go =", "  %limit = s32[] get-tuple-element(%p.c), index=2\n  ROOT %go =")
    text = text.replace("tuple(%next, %x)", "tuple(%next, %x, %same)").replace(
        "  %one = ", "  %same = s32[] get-tuple-element(%p.b), index=2\n  %one = "
    )
    text = text.replace("tuple(%begin, %x)", "tuple(%begin, %x, %many)").replace(
        "  %zero = ", "  %many = s32[] constant(9)\n  %zero = "
    )
    assert trips(text) == 9


def test_a_loop_whose_bound_is_computed_is_unknown_and_says_so():
    text = HEADER + loop(body=REDUCE) + ADD + entry()
    text = text.replace("constant(28)", 'custom-call(), custom_call_target="Ask"')
    assert trips(text) is None
    (found,) = collectives(parse(text))
    assert (found.times, found.known) == (1, False)


REDUCE = (
    "  %sum = f32[4,8]{1,0:T(8,128)} all-reduce(%x), channel_id=1, "
    "replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, "
    'metadata={op_name="jit(step)/while/body/add" stack_frame_id=2}\n'
)


def test_loops_inside_loops_multiply():
    state = "s32[], f32[4,8]{1,0}"
    inner = f"  %again = ({state}) while(%p.b), condition=%cond.in, body=%body.in\n"
    text = (
        HEADER
        + ADD
        + loop(name=".in", bound=36, body=REDUCE.replace("%x)", "%x.in)"))
        + loop(bound=4, body=inner)
        + entry()
    )
    # The inner loop starts where the outer one stands, so its start is not a number.
    assert run_counts(parse(text))["body.in"].known is False
    started = inner.replace("while(%p.b)", "while(%fresh)")
    fresh = "  %nought = s32[] constant(0)\n"
    fresh += f"  %fresh = ({state}) tuple(%nought, %x)\n"
    counts = run_counts(parse(text.replace(inner, fresh + started)))
    assert (counts["body"].count, counts["body.in"].count) == (4, 144)
    (found,) = collectives(parse(text.replace(inner, fresh + started)))
    assert (found.kind, found.group, found.times, found.known) == ("all-reduce", 4, 144, True)
    # Twice three quarters of 128 bytes each time: once to add up, once to spread.
    assert found.sent == 144 * 2 * 128 * 3 // 4
    assert found.source == "model.py:70 forward.<locals>.block"


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 4),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", 4),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("{}", 8),
    ],
)
def test_groups_are_read_in_every_way_they_are_printed(groups, expected):
    body = REDUCE.replace("{{0,1,2,3},{4,5,6,7}}", groups)
    (found,) = collectives(parse(HEADER + ADD + loop(body=body) + entry()))
    assert found.group == expected


def in_entry(line: str, kind: str = "f32[4,8]{1,0:T(8,128)}") -> str:
    return f"  %sent = {kind} {line}, channel_id=7, replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}\n"


@pytest.mark.parametrize(
    ("line", "kind", "name", "sent"),
    [
        ("all-gather(%x), dimensions={0}", "f32[16,8]{1,0}", "all-gather", 512 * 3 / 4),
        ("reduce-scatter(%x), to_apply=%add", "f32[1,8]{1,0}", "reduce-scatter", 128 * 3 / 4),
        ("all-to-all(%x), dimensions={0}", "f32[4,8]{1,0}", "all-to-all", 128 * 3 / 4),
        (
            "collective-permute(%x), source_target_pairs={{0,1}}",
            "f32[4,8]",
            "collective-permute",
            128,
        ),
        (
            "all-gather-start(%x), dimensions={0}",
            "(bf16[4,8]{1,0}, bf16[16,8]{1,0})",
            "all-gather",
            256 * 3 / 4,
        ),
        (
            "collective-permute-start(%x), source_target_pairs={{0,1}}",
            "(f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], u32[])",
            "collective-permute",
            128,
        ),
        (
            "all-reduce(%x, %x), to_apply=%add",
            "(f32[4,8]{1,0}, /*index=1*/bf16[4,8]{1,0})",
            "all-reduce",
            2 * (128 + 64) * 3 / 4,
        ),
    ],
)
def test_each_kind_sends_what_a_ring_sends(line, kind, name, sent):
    text = HEADER + ADD + loop() + entry(more=in_entry(line, kind))
    (found,) = collectives(parse(text))
    assert (found.kind, found.sent, found.times) == (name, sent, 1)


def test_one_channel_counts_once_where_it_runs_least():
    # An asynchronous gather is printed in each fusion that hides it.
    fused = "".join(
        f"%async_{n} (w: f32[4,8]) -> f32[16,8] {{\n  %w = f32[4,8] parameter(0)\n"
        "  ROOT %g = f32[16,8] all-gather(%w), channel_id=3, replica_groups=[2,4]<=[8]\n}\n\n"
        for n in range(3)
    )
    body = "  %inside = f32[16,8] fusion(%x), kind=kCustom, calls=%async_0\n"
    outside = "".join(
        f"  %f{n} = f32[16,8] fusion(%x), kind=kCustom, calls=%async_{n}\n" for n in (1, 2)
    )
    (found,) = collectives(parse(HEADER + fused + loop(body=body) + entry(more=outside)))
    assert (found.instances, found.times, found.sent) == (1, 1, 512 * 3 // 4)


def test_an_all_reduce_that_keeps_its_own_part_is_a_reduce_scatter():
    fused = """%all-reduce-scatter.1 (w: f32[4,8]) -> f32[1,8] {
  %w = f32[4,8] parameter(0)
  %r = f32[4,8] all-reduce(%w), channel_id=5, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %mine = f32[1,8] dynamic-slice(%r), dynamic_slice_sizes={1,8}
}

"""
    more = (
        "  %own = f32[1,8] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1, "
        "metadata={stack_frame_id=1}\n"
    )
    (found,) = collectives(parse(HEADER + ADD + fused + loop() + entry(more=more)))
    assert (found.kind, found.sent) == ("reduce-scatter", 128 * 3 // 4)
    # It is printed without a place in the source; the fusion has one.
    assert found.source == "losses.py:35 _logits"


def test_a_computation_ends_at_a_line_that_is_exactly_a_brace():
    # A kernel prints its metadata over several lines.
    kernel = """  %k = f32[4,8]{1,0} custom-call(%x), custom_call_target="kernel", metadata={
    "kernel": {"grid": [1],
    },
}}, backend_config={"flag": {
}}
"""
    body = kernel + REDUCE
    (found,) = collectives(parse(HEADER + ADD + loop(body=body) + entry()))
    assert found.times == 28


def test_like_collectives_of_one_place_are_one_row():
    body = REDUCE + REDUCE.replace("%sum", "%sum.2").replace("channel_id=1", "channel_id=2")
    (found,) = collectives(parse(HEADER + ADD + loop(body=body) + entry()))
    assert (found.instances, found.sent) == (2, 2 * 28 * 192)


def test_large_copies_within_main_memory_are_listed():
    big = "f32[4096,4096]{1,0:T(8,128)"
    more = f"""  %cache = {big}}} broadcast(%zero)
  %turned = f32[4096,4096]{{0,1:T(8,128)}} copy(%cache), metadata={{stack_frame_id=2}}
  %near = {big}S(1)}} copy(%cache)
  %small = f32[4,8]{{0,1}} copy(%x)
"""
    (found,) = copies(parse(HEADER + loop() + entry(more=more)))
    assert (found.shape, found.bytes, found.times) == ("f32[4096,4096]", 2**26, 1)
    assert found.source == "model.py:70 forward.<locals>.block"


def test_a_copy_in_a_loop_counts_as_often_as_the_loop_runs():
    body = "  %turned = f32[4096,4096]{0,1} copy(%x)\n"
    (found,) = copies(parse(HEADER + loop(body=body, bound=16) + entry()))
    assert found.times == 16


def test_a_copy_that_a_fusion_makes_on_the_way_is_none():
    big = "f32[4096,4096]{1,0}"
    fused = f"""%relayout (w: {big}) -> {big} {{
  %w = {big} parameter(0)
  ROOT %turned = f32[4096,4096]{{0,1}} copy(%w)
}}

%rowsum (v: {big}) -> f32[4096] {{
  %v = {big} parameter(0)
  %inside = f32[4096,4096]{{0,1}} copy(%v)
  ROOT %sums = f32[4096] reduce(%inside), dimensions={{0}}, to_apply=%add
}}

"""
    more = f"""  %cache = {big} broadcast(%zero)
  %sums = f32[4096]{{0}} fusion(%cache), kind=kLoop, calls=%rowsum
"""
    assert copies(parse(HEADER + ADD + fused + loop() + entry(more=more))) == []
    # What the whole fusion gives is a copy after all.
    line = "  %{} = f32[4096,4096]{{0,1}} fusion(%cache), calls=%relayout, "
    line += "metadata={{stack_frame_id=2}}\n"
    more += line.format("one") + line.format("two")
    (found,) = copies(parse(HEADER + ADD + fused + loop() + entry(more=more)))
    assert (found.instances, found.bytes) == (2, 2**26)


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule nothing\n")

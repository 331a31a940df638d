"""Collectives and loops of compiled programs, in texts of known content."""

import pytest

from opd_jax.plan.collectives import Collective, collectives
from opd_jax.plan.hlo import parse
from opd_jax.plan.loops import trip_count

# Layouts, tuples with comments, and places in the source as the TPU compiler prints them.
HEADER = """HloModule jit_step, is_scheduled=true, num_partitions=8

FileNames
1 "/usr/lib/site-packages/opd_jax/losses.py"
2 "/usr/lib/site-packages/opd_jax/model/transformer.py"
3 "/usr/lib/site-packages/opd_jax/runtime/mesh.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=35 end_line=35 column=4 end_column=9}
2 {file_name_id=2 function_name_id=2 line=70 end_line=70 column=4 end_column=9}
3 {file_name_id=3 function_name_id=3 line=8 end_line=8 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

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


def entry(*, start: int = 0, more: str = "") -> str:
    return f"""ENTRY %main (x: f32[4,8]) -> f32[4,8] {{
  %x = f32[4,8]{{1,0:T(8,128)}} parameter(0)
  %zero = s32[] constant({start})
  %begin = s32[]{{:T(128)}} copy(%zero)
  %state = (s32[], f32[4,8]{{1,0}}) tuple(%begin, %x)
{more}  %while = (s32[], f32[4,8]{{1,0}}) while(%state), condition=%cond, body=%body
  ROOT %result = f32[4,8]{{1,0}} get-tuple-element(%while), index=1
}}
"""


def found_in(text: str) -> list[Collective]:
    return collectives(parse(HEADER + text))


def trips(text: str) -> int | None:
    module = parse(HEADER + text)
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
        (0, 8, 0, "LT", None),  # it never ends
    ],
)
def test_a_loop_runs_from_its_start_to_its_bound_in_steps(start, bound, step, direction, expected):
    assert trips(loop(bound=bound, step=step, direction=direction) + entry(start=start)) == expected


def test_a_printed_trip_count_is_used():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"12"}}'
    assert trips(loop() + entry().replace("body=%body", known)) == 12


def test_a_loop_that_may_end_early_counts_with_its_bound():
    early = loop(bound=16).replace(
        "  ROOT %go = pred[] compare(%at, %limit), direction=LT\n",
        """  %more = pred[] compare(%at, %limit), direction=LT
  %any = pred[] custom-call(%p.c), custom_call_target="Any"
  ROOT %go = pred[] and(%more, %any)
""",
    )
    assert trips(early + entry()) == 16


def test_counters_and_comparisons_inside_fusions_are_followed():
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
    text = loop(bound=10, step=5)
    for plain, call in (
        ("compare(%at, %limit), direction=LT", "fusion(%limit, %at), kind=kLoop, calls=%less"),
        ("add(%i, %one)", "fusion(%i, %one), kind=kLoop, calls=%plus"),
    ):
        assert plain in text
        text = text.replace(plain, call)
    assert trips(fused + text + entry()) == 2


def test_a_bound_in_the_loops_own_state_is_found():
    state = "s32[], f32[4,8]{1,0}, s32[]"
    third = "s32[] get-tuple-element(%p.{}), index=2\n"
    text = loop(state=state) + entry()
    for old, new in (
        ("  %limit = s32[]{:T(128)} constant(28)\n", ""),
        ("  ROOT %go =", f"  %limit = {third.format('c')}  ROOT %go ="),
        ("  %one = ", f"  %same = {third.format('b')}  %one = "),
        ("tuple(%next, %x)", "tuple(%next, %x, %same)"),
        ("  %zero = ", "  %many = s32[] constant(9)\n  %zero = "),
        ("tuple(%begin, %x)", "tuple(%begin, %x, %many)"),
    ):
        assert old in text
        text = text.replace(old, new)
    assert trips(text) == 9


def test_a_loop_whose_bound_is_computed_is_unknown_and_says_so():
    text = loop(body=REDUCE) + entry()
    text = text.replace("constant(28)", 'custom-call(), custom_call_target="Ask"')
    assert trips(text) is None
    (found,) = found_in(text)
    assert (found.in_sequence, found.known) == (1, False)


REDUCE = (
    "  %sum = f32[4,8]{1,0:T(8,128)} all-reduce(%x), channel_id=1, "
    "replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, "
    'metadata={op_name="jit(step)/while/body/add" stack_frame_id=3}\n'
)


def test_loops_inside_loops_multiply():
    state = "s32[], f32[4,8]{1,0}"
    inner = f"""  %nought = s32[] constant(0)
  %fresh = ({state}) tuple(%nought, %x)
  %again = ({state}) while(%fresh), condition=%cond.in, body=%body.in
"""
    innermost = loop(name=".in", bound=36, body=REDUCE.replace("%x)", "%x.in)"))
    text = innermost + loop(bound=4, body=inner) + entry()
    (found,) = found_in(text)
    assert (found.kind, found.group, found.in_sequence) == ("all-reduce", 4, 4 * 36)
    # Twice three quarters of 128 bytes each time: once to add up, once to send the sum.
    assert (found.bytes, found.known) == (144 * 2 * 128 * 3 // 4, True)
    # A loop that starts from the counter of the loop around it is not known.
    (found,) = found_in(text.replace("while(%fresh)", "while(%p.b)"))
    assert (found.in_sequence, found.known) == (4, False)


@pytest.mark.parametrize("order", ["%half, %whole", "%whole, %half"])
def test_of_a_condition_the_larger_branch_counts(order):
    def branch(name, shape):
        return f"""%{name} (p.{name}: {shape}) -> {shape} {{
  %p.{name} = {shape} parameter(0)
  ROOT %sum.{name} = {shape} all-reduce(%p.{name}), replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}
}}

"""

    more = f"  %either = f32[] conditional(%x, %x, %x), branch_computations={{{order}}}\n"
    text = branch("half", "f32[2,8]") + branch("whole", "f32[4,8]") + loop() + entry(more=more)
    (found,) = found_in(text)
    assert (found.shape, found.in_sequence) == ("f32[4,8]", 1)


def test_the_source_is_the_caller_of_what_constrains_shardings():
    (found,) = found_in(loop(body=REDUCE, bound=0) + entry())
    assert found.source == "model/transformer.py:70"
    assert (found.in_sequence, found.bytes) == (0, 0)  # the loop never runs


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
    (found,) = found_in(loop(body=body) + entry())
    assert found.group == expected


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        ("all-gather(%x), dimensions={0}", "f32[16,8]{1,0}", 512 * 3 / 4),
        ("reduce-scatter(%x), to_apply=%add", "f32[1,8]{1,0}", 128 * 3 / 4),
        ("all-to-all(%x), dimensions={0}", "f32[4,8]{1,0:T(8,128)}", 128 * 3 / 4),
        ("collective-permute(%x), source_target_pairs={{0,1}}", "f32[4,8]", 128),
        # The result of a start begins with its operands.
        ("all-gather-start(%x)", "(bf16[4,8]{1,0}, bf16[16,8]{1,0})", 256 * 3 / 4),
        ("collective-permute-start(%x)", "(f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], u32[])", 128),
        ("all-reduce(%x, %x)", "(f32[4,8]{1,0}, /*index=1*/bf16[4,8]{1,0})", 2 * 192 * 3 / 4),
    ],
)
def test_each_kind_sends_what_a_ring_sends(line, kind, sent):
    groups = "channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}"
    more = f"  %sent = {kind} {line}, {groups}\n"
    (found,) = found_in(loop() + entry(more=more))
    assert found.kind == line.partition("(")[0].removesuffix("-start")
    assert (found.bytes, found.in_sequence) == (sent, 1)


def test_a_collective_that_is_printed_often_counts_once_where_it_runs_least():
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
    (found,) = found_in(fused + loop(body=body) + entry(more=outside))
    assert (found.in_sequence, found.bytes) == (1, 512 * 3 // 4)


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
    (found,) = found_in(fused + loop() + entry(more=more))
    assert (found.kind, found.bytes) == ("reduce-scatter", 128 * 3 // 4)
    assert found.source == "losses.py:35"  # the fusion's: the reduction has none


def test_metadata_of_a_kernel_does_not_end_a_computation():
    kernel = """  %k = f32[4,8]{1,0} custom-call(%x), custom_call_target="kernel", metadata={
    "kernel": {"grid": [1],
    },
}}, backend_config={"flag": {
}}
"""
    # Like collectives from one place are one row.
    body = kernel + REDUCE + REDUCE.replace("%sum", "%sum.2").replace("id=1", "id=2")
    (found,) = found_in(loop(body=body) + entry())
    assert (found.in_sequence, found.bytes) == (2 * 28, 2 * 28 * 192)


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule nothing\n")

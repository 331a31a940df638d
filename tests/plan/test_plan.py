"""Plans without a compiler: slices, placement, bytes, bounds, verdicts, and the command."""

import json
import math
from dataclasses import replace

import jax
import pytest
from settings import read

from opd_jax import config as cfg
from opd_jax.hf.published import PUBLISHED
from opd_jax.model import is_spec, param_specs
from opd_jax.plan import screen
from opd_jax.plan.__main__ import main
from opd_jax.plan.chips import GIB, V5E, V6E, Slice, find, slices
from opd_jax.plan.models import planned_pair
from opd_jax.plan.placement import Placement, device_bytes
from opd_jax.plan.program import ON_CHIP, Program, Run, passes
from opd_jax.plan.programs import plan_run
from opd_jax.plan.report import describe
from opd_jax.plan.sampling import Player
from opd_jax.plan.verdict import verdict, worst
from opd_jax.plan.workload import fit_to_slice, workload
from opd_jax.runtime.mesh import abstract_mesh

PAPER, QUICKSTART = "alfworld_qwen3", "quickstart"


def load(path: str, *fields: str):
    """A config with one layout for training and decoding, unless a field says otherwise."""
    return cfg.load(path, [f"--config.{field}" for field in ("mesh.decode=1", *fields)])


def plan(path: str, *fields: str, chips: int = 1, given: tuple[str, ...] = ()) -> Run:
    return plan_run(load(path, *fields), Slice("a slice", V5E, chips), given=given)


def programs(path: str, *fields: str, chips: int = 1) -> dict[str, Program]:
    return {program.name: program for program in plan(path, *fields, chips=chips).programs}


# --- Slices


def test_slices_of_a_family_grow_and_end_within_512_chips():
    assert find("v5e:4x8", local_chips=0) == Slice("v5e:4x8", V5E, 32)
    for family, most in {"v5e": 256, "v5p": 512, "v6e": 256}.items():
        sizes = [found.chips for found in slices(family)]
        assert sizes == sorted(sizes)
        assert sizes[-1] == most


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v9:2x2", ["v5e", "v5p", "v6e", "local", "`v9`"]),
        ("v5e:3x3", ["v5e:4x4", "v5e:16x16", "`v5e:3x3`"]),
        ("v5e", ["v5e:4x4", "`v5e`"]),
    ],
)
def test_a_topology_that_does_not_exist_is_answered_with_those_that_do(topology, expected):
    with pytest.raises(ValueError, match="`--topology`") as error:
        find(topology, local_chips=1)
    assert [word for word in expected if word not in str(error.value)] == []


# --- A config on a slice


def test_fsdp_fills_the_slice_and_micro_batches_follow():
    config, changes = fit_to_slice(load(PAPER), chips=16, given=[])
    assert (config.mesh.fsdp, config.train.micro_batches, len(changes)) == (16, 4, 2)
    # A mesh that fills the slice is left alone.
    filled = load(PAPER, "mesh.tensor=2", "mesh.fsdp=4", "mesh.data=2")
    config, changes = fit_to_slice(filled, chips=16, given=["mesh.fsdp"])
    assert (config.mesh.to_dict(), changes) == (dict(data=2, fsdp=4, decode=1, tensor=2), [])


@pytest.mark.parametrize(
    ("fields", "chips", "expected"),
    [
        (["mesh.decode=1", "mesh.fsdp=8"], 16, "1 × 8 × 1 = 8 must multiply to the 16 chips"),
        (["train.micro_batches=8"], 16, r"`train.micro_batches` = 8 does not divide over .* = 16"),
        (["mesh.tensor=3"], 16, "must multiply to the 16 chips"),
        (["mesh.tensor=16"], 16, r"`kv_heads` = 8 must be divisible by .*`tensor` = 16"),
        ([], 256, r"`rollout.batch` = 64 does not divide over"),
    ],
)
def test_what_does_not_divide_is_refused_and_given_fields_are_kept(fields, chips, expected):
    given = tuple(field.partition("=")[0] for field in fields)
    with pytest.raises(ValueError, match=expected):
        plan(PAPER, *fields, chips=chips, given=given)


def test_an_update_fills_its_contexts():
    work = workload(read(PAPER))
    # The first message takes 512 tokens, each of the 29 later ones 128; the rest is sampled.
    assert work.sampled == 16384 - 512 - 29 * 128
    assert (work.sequence, work.response) == (16384, 12288)
    assert work.longest_question == 512 + 4096
    assert work.slots_read == (512 + 16384) / 2
    assert work.new_in_question == 128 + work.sampled // 30
    short = workload(read(PAPER, "rollout.turn_tokens=100"))
    assert (short.sampled, short.response) == (3000, 3072)


def test_a_question_with_a_record_is_as_long_as_what_was_said():
    plain, told = (workload(read(QUICKSTART, f"judge.context={c}")) for c in ("table9", "record"))
    assert told.longest_question == plain.longest_question + 640
    assert told.new_in_question == plain.new_in_question + 640


# --- What it holds


def count(sizes) -> int:
    specs = jax.tree.leaves(param_specs(sizes), is_leaf=is_spec)
    return sum(math.prod(spec.shape) for spec in specs)


def test_published_sizes_have_the_published_numbers_of_parameters():
    # As the hub counts them; the two smallest are stored with a second copy of their embedding.
    stored = {
        "Qwen3-0.6B": 751_632_384 - 151_936 * 1024,
        "Qwen3-1.7B": 2_031_739_904 - 151_936 * 2048,
        "Qwen3-4B": 4_022_468_096,
        "Qwen3-8B": 8_190_735_360,
        "Qwen3-14B": 14_768_307_200,
        "Qwen3-32B": 32_762_123_264,
        "Qwen3-30B-A3B": 30_532_122_624,
    }
    assert {name: count(sizes) for name, sizes in PUBLISHED.items()} == stored


def test_parameters_optimizer_and_teacher_are_counted_on_each_device():
    student, teacher = PUBLISHED["Qwen3-1.7B"], PUBLISHED["Qwen3-32B"]

    def each(sizes, width):
        # Norms of queries and keys have no axis to be sharded over.
        norms = 2 * sizes.num_layers * sizes.head_dim
        return width * ((count(sizes) - norms) // 16 + norms)

    head = 2 * teacher.d_model * teacher.vocab_size // 16
    assert plan(f"{PAPER}:teacher=32b", chips=16).residents == {
        "parameters": each(student, 4),
        # Two moments, and the number of updates twice: of Adam, and of its schedule.
        "optimizer": 2 * each(student, 4) + 2 * 4,
        "frozen weights": 0,
        # The update takes the head, which is untied, and not the body.
        "teacher's body": each(teacher, 2) - head,
        "teacher's head": head,
        # Replicated along `fsdp`, in bfloat16.
        "copy to sample with": 2 * count(student),
    }


def test_adapters_are_trained_beside_frozen_weights():
    run = plan(PAPER, "lora.rank=16", "lora.targets=q,down", "mesh.fsdp=1")
    adapters = 28 * 16 * ((2048 + 16 * 128) + (6144 + 2048))
    own = count(run.student.sizes)
    assert run.residents["parameters"] == 4 * adapters
    assert run.residents["optimizer"] == 2 * 4 * adapters + 2 * 4
    # Frozen weights are in the dtype of the computation.
    assert run.residents["frozen weights"] == 2 * own
    assert run.residents["copy to sample with"] == 2 * (own + adapters)
    found = {program.name: program for program in run.programs}
    assert found["train step"].moved["gradient"] == passes(4 * adapters, 2 * 8)
    # The programs can be traced with these arguments, so they are those of a run.
    traced = run.trace(found["train step"])
    assert traced.out_info[0].params["q"]["a"].shape == (28, 2048, 16)
    copied = run.trace(found["copy to sample with"]).out_info
    assert jax.tree.structure(copied) == jax.tree.structure(found["sampling"].args[0])


def test_an_int8_teacher_takes_half_and_its_scales():
    sizes = PUBLISHED["Qwen3-8B"]
    place = Placement(abstract_mesh(data=1, fsdp=1, tensor=1), "tpu")
    layers = {name: spec.shape for name, spec in param_specs(sizes)["layers"].items()}
    projections = [shape for name, shape in layers.items() if "norm" not in name]
    weights = sum(map(math.prod, projections))
    L, D, N, G, H, F = 36, 4096, 32, 8, 128, 12_288
    scales = L * ((N + 2 * G) * H + D + 2 * F + D)
    params = place.params(sizes, "int8")
    assert device_bytes(params) == weights + 4 * scales + 2 * (count(sizes) - weights)
    # Its cache stays in bfloat16.
    assert Player(place, sizes, params, ()).cache(rows=1, slots=1).keys[0].dtype == "bfloat16"


def test_a_cache_is_counted_on_each_device():
    sizes = PUBLISHED["Qwen3-8B"]
    place = Placement(abstract_mesh(data=2, fsdp=2, tensor=4), "tpu")
    player = Player(place, sizes, place.params(sizes, "bfloat16"), ())
    cache = player.cache(rows=64, slots=1024)
    whole = 2 * sizes.num_layers * 64 * 1024 * sizes.num_kv_heads * sizes.head_dim * 2
    assert device_bytes((cache.keys, cache.values)) == whole // 16
    assert device_bytes(cache.lengths) == 64 * 4 // 4
    with pytest.raises(ValueError, match="`batch` = 6 must be divisible"):
        player.cache(rows=6, slots=1024)


# --- Programs


def test_programs_are_those_that_the_method_runs():
    rollout = ["copy to sample with", "observation", "sampling"]
    evaluated = [
        f"evaluating the {who}: {what}"
        for who in ("student", "teacher")
        for what in ("first message", "sampling")
    ]
    update = ["teacher's pass", "train step"]
    judging = ["judging: 64 tokens of a question", "judging: answer"]
    assert list(programs(QUICKSTART)) == [*rollout, *judging, *update, *evaluated]
    assert list(programs(f"{QUICKSTART}:method=opd")) == [*rollout, *update, *evaluated]
    # The teacher plays, so nothing is copied; the train step does without it.
    found = programs(f"{QUICKSTART}:method=sft")
    assert list(found) == [*rollout[1:], "train step", *evaluated]
    assert found["train step"].args[1] is None
    # It plays with a copy, which is beside it.
    assert all("teacher's body" in program.beside for program in found.values())
    # Of 32 tokens that are new in a question, 24 are read and then 8.
    short = programs(QUICKSTART, "judge.extend_widths=8,24", "judge.decode=generate")
    judging = ["judging: 24 tokens of a question", "judging: 8 tokens of a question", judging[-1]]
    assert [name for name in short if name.startswith("judging")] == judging
    assert [short[name].runs for name in judging] == [40, 40, 20]


def test_models_built_from_nothing_are_planned_too():
    found = programs("household_pair")
    assert "sampling" not in found
    assert found["train step"].args[2].tokens.shape == (4096 // 896, 896)
    with pytest.raises(
        ValueError, match=r"`demonstrations.tokens_per_batch` = 512: expected at least 896"
    ):
        programs("household_pair", "demonstrations.tokens_per_batch=512")


def test_sizes_come_from_a_folder_or_are_the_published_ones():
    student, teacher = planned_pair(read(QUICKSTART), platform="cpu")
    assert "config.json" in student.source
    assert (student.sizes.d_model, teacher.sizes.d_model) == (64, 96)
    assert teacher.label_width == 1  # its tokenizer has the labels' words
    student, _ = planned_pair(read(PAPER), platform="cpu")
    assert "published sizes of Qwen3-1.7B" in student.source
    with pytest.raises(ValueError, match=r"`teacher`.*Qwen3-32B.*models/Nobody-7B"):
        planned_pair(read(PAPER, "teacher=models/Nobody-7B"), platform="cpu")


# --- Bounds and verdicts


def test_what_fits_on_the_chip_may_be_read_once():
    assert passes(2 * ON_CHIP, 5) == 10 * ON_CHIP
    assert passes(ON_CHIP, 5) == ON_CHIP
    assert passes(10, 0) == 0


def test_sampling_moves_weights_and_cache_for_every_token():
    moved = programs(PAPER, chips=8)["sampling"].moved
    assert moved["parameters"] == 64 * 2 * count(PUBLISHED["Qwen3-1.7B"])
    slots = (512 + 16384) / 2  # as in `test_an_update_fills_its_contexts`
    # Eight rows on a device.
    assert moved["cache"] == 64 * round(2 * 28 * 8 * slots * 8 * 128 * 2)


def test_only_the_experts_of_a_token_are_computed():
    run = plan(PAPER, "teacher=models/Qwen3-30B-A3B", "mesh.data=2", chips=16)
    judging = next(program for program in run.programs if "judging: 512" in program.name)
    one, tokens = 3 * 2048 * 768, judging.args[2].size
    slots = judging.args[1].slots
    sizes = PUBLISHED["Qwen3-30B-A3B"]
    active = count(sizes) - 48 * (128 - 8) * one - 2 * 151_936 * 2048
    attention = 48 * 2 * 2 * tokens * slots * 32 * 128
    assert run.flops(judging) * 16 == pytest.approx(2 * tokens * active + attention, rel=0.02)


def result(total: float, peak: float, **more: object) -> dict:
    """What a compiler may have answered, in GiB."""
    found = dict(refused="", temporaries=0, code=0, collectives=[])
    return found | dict(total=int(total * GIB), peak=int(peak * GIB)) | more


@pytest.mark.parametrize(
    ("total", "peak", "beside", "expected"),
    [
        (14.0, 14.0, 0, "fits"),
        (14.7, 14.7, 0, "uncertain"),
        (17.2, 14.6, 0, "uncertain"),
        (17.2, 15.8, 0, "does not fit"),
        # What stays beside it counts.
        (10.0, 10.0, 4, "fits"),
        (10.0, 10.0, 5, "uncertain"),
        (10.0, 10.0, 6, "does not fit"),
    ],
)
def test_a_compiled_program_fits_is_uncertain_or_does_not_fit(total, peak, beside, expected):
    run = replace(plan(QUICKSTART), residents={"teacher": beside * GIB})
    program = replace(run.programs[0], beside=("teacher",))
    assert verdict(run, program, result(total, peak)) == expected
    nobody_knows = replace(run.where, chip=replace(V5E, memory=None))
    assert verdict(replace(run, where=nobody_knows), program, result(total, peak)) == (
        "memory unknown"
    )


def test_without_a_compiler_only_a_misfit_is_certain():
    run = plan(QUICKSTART)
    for size, expected in ((16, "does not fit"), (15, "not compiled")):
        program = replace(run.programs[0], temporaries=size * GIB)
        assert verdict(run, program, None) == expected
    # Only a refusal for lack of memory says something of memory.
    refused = {"refused": "RESOURCE_EXHAUSTED: Ran out of memory on HBM"}
    assert verdict(run, run.programs[0], refused) == "does not fit"
    assert verdict(run, run.programs[0], {"refused": "no answer"}) == "not compiled"


def test_a_run_is_as_good_as_its_worst_program():
    assert worst(["fits", "uncertain", "fits"]) == "uncertain"
    assert worst(["uncertain", "not compiled"]) == "not compiled"
    assert worst(["does not fit", "not compiled"]) == "does not fit"


# --- The report


def test_a_compiled_plan_is_one_screen_and_verbose_has_all_of_it():
    run = plan(PAPER, chips=32)
    rows = [
        dict(
            kind="all-gather",
            shape=f"bf16[{size},2048]",
            group=32,
            source=f"model/projections.py:{size}",
            bytes=size * 10**6,
            in_sequence=size,
            known=size != 3,
        )
        for size in range(1, 9)
    ]
    step = result(9.0, 8.0, temporaries=3 * GIB, collectives=rows)
    results = {program.name: result(4.0, 4.0) for program in run.programs}
    report = describe(run, results | {"train step": step})
    assert report["verdict"] == "fits"
    # Those that send most come first; a count that is not known is none.
    assert [row["bytes"] for row in report["collectives"]] == [n * 10**6 for n in range(8, 0, -1)]
    counts = [row["in_sequence"] for row in report["collectives"]]
    assert counts == [8, 7, 6, 5, 4, None, 2, 1]
    assert {row["program"] for row in report["collectives"]} == {"train step"}

    text = screen.text(report, verbose=False)
    assert text.startswith("verdict  ")
    assert text.count("\n") < 40
    for word in ("fits (compiled, not run)", "% of it is sampling", "6 more: --verbose"):
        assert word in text
    assert "bf16[8,2048]" not in text
    verbose = screen.text(report, verbose=True)
    for word in ("bf16[1,2048]", "student's head", "assumed: every episode takes all its turns"):
        assert word in verbose

    first = replace(run, programs=run.programs[:1])
    refused = {first.programs[0].name: {"refused": "RESOURCE_EXHAUSTED: Ran out of memory on HBM"}}
    text = screen.text(describe(first, refused), verbose=False)
    assert text.startswith("verdict   does not fit")
    assert "copy to sample with: RESOURCE_EXHAUSTED: Ran out" in text


def test_a_plan_says_that_it_does_not_count_turns_of_the_teacher():
    said = "not counted  the teacher's turns in the student's episodes"
    for fields, is_said in (((), False), (("rollout.take_over_after=2",), True)):
        text = screen.text(describe(plan(QUICKSTART, *fields), None), verbose=False)
        assert (said in text) == is_said
    by_name = programs(QUICKSTART, "rollout.take_over_after=2", "objective.teacher_turns=jsd")
    assert by_name["train step"].args[2].actor.shape == (16, 20)
    assert programs(QUICKSTART)["train step"].args[2].actor is None


def test_the_command_plans_a_paper_run_without_a_compiler(command):
    paper = "--config=configs/alfworld_qwen3.py:student=1.7b,teacher=32b"
    alone = "--config.mesh.decode=1"
    done = command("plan", paper, alone, "--topology=v5e:4x4", "--compile=false", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["plan"]
    assert (found["chips"], found["mesh"]) == (16, dict(data=1, fsdp=16, decode=1, tensor=1))
    by_name = {program["name"]: program for program in found["programs"]}
    # The teacher's cache for 64 episodes is larger than a device: 64 layers, eight heads of 128,
    # keys and values, two bytes; four rows on a device.
    cache = 64 * 8 * 128 * 2 * 2 * 16384 * 4
    assert by_name["evaluating the teacher: sampling"]["arguments"] > cache > V5E.memory
    assert by_name["evaluating the teacher: sampling"]["verdict"] == "does not fit"
    assert found["verdict"] == "does not fit"
    # Weights meet each of 64 · 16384 tokens three times in the student and once in the teacher,
    # with two FLOPs each time; attention and recomputation come on top.
    tokens = 64 * 16384 / 16
    weights = [count(PUBLISHED[name]) for name in ("Qwen3-1.7B", "Qwen3-32B")]
    least = 2 * tokens * (3 * weights[0] + weights[1] - 2 * 151_936 * 5120)
    step = by_name["train step"]
    assert least < step["flops"] + by_name["teacher's pass"]["flops"] < 3 * least
    assert step["seconds"] == step["by_flops"] == step["flops"] / 197e12 > step["by_bandwidth"]
    sampling = by_name["sampling"]
    assert sampling["seconds"] == sum(sampling["moved"].values()) / 819e9 > sampling["by_flops"]
    seconds = [p["runs"] * p["seconds"] for p in found["programs"] if p["runs"]]
    assert found["update_seconds"] == pytest.approx(sum(seconds))
    share = sampling["runs"] * sampling["seconds"] / sum(seconds)
    assert found["sampling_share"] == pytest.approx(share)


def test_the_smallest_slice_is_the_first_that_is_no_misfit(in_process):
    flags = (f"--config={PAPER}", "--topology=v6e", "--smallest", "--compile=false", "--json")
    found = json.loads(in_process(main, *flags))
    verdicts = {row["slice"]: row["verdict"] for row in found["tried"]}
    last = found["plan"]["topology"]
    assert list(verdicts) == [s.name for s in slices("v6e")][: len(verdicts)]
    assert verdicts.popitem() == (last, "not compiled")
    assert set(verdicts.values()) == {"does not fit"}
    assert all(program["least"] <= V6E.memory for program in found["plan"]["programs"])


def test_mistakes_end_in_one_line(in_process, capsys):
    flags = (f"--config={PAPER}", "--topology=v5e", "--smallest", "--config.mesh.data=7")
    with pytest.raises(SystemExit) as stop:
        in_process(main, *flags)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: `--smallest`: the run fits no slice of v5e\n"


def test_a_teacher_that_judges_what_it_scores_has_no_pass_of_its_own():
    apart, once = (programs(QUICKSTART, f"judge.context={how}") for how in ("table9", "history"))
    assert apart.keys() - once.keys() >= {"teacher's pass"}
    (kept,) = {p.temporaries for name, p in once.items() if name.startswith("judging")}
    hidden = once["train step"].args[1].hidden
    assert kept == hidden.size * hidden.dtype.itemsize
    assert {p.temporaries for name, p in apart.items() if name.startswith("judging")} == {0}


def test_a_cache_and_the_lengths_of_its_rows_are_sharded_alike():
    for mesh in (("mesh.fsdp=8", "mesh.decode=2"), ("mesh.fsdp=8",)):
        for name in ("sampling", "judging: answer"):
            cache = programs(PAPER, *mesh, chips=8)[name].args[1]
            rows = cache.lengths.sharding.spec
            assert rows[0] == cache.keys[0].sharding.spec[0]
            assert tuple(rows) == ("fsdp",)

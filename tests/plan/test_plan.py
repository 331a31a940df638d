"""Plans without a compiler: slices, placement, bytes, bounds, verdicts, and the command."""

import json
import math
from pathlib import Path

import jax
import pytest

from opd_jax import config as cfg
from opd_jax.hf.published import PUBLISHED
from opd_jax.model import is_spec, param_specs
from opd_jax.plan import tables
from opd_jax.plan.analysis import analyze
from opd_jax.plan.bounds import bound
from opd_jax.plan.chips import V5E, V6E, find, slices
from opd_jax.plan.models import planned_pair
from opd_jax.plan.placement import Placement
from opd_jax.plan.programs import plan_run
from opd_jax.plan.report import describe
from opd_jax.plan.traffic import ON_CHIP, Moved, device_bytes
from opd_jax.plan.verdict import Memory, analytic_verdict, compiled_verdict, worst
from opd_jax.plan.workload import lay_over, workload
from opd_jax.runtime.mesh import abstract_mesh

ROOT = Path(__file__).parents[2]
PAPER = str(ROOT / "configs" / "alfworld_qwen3.py")
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
GIB = 2**30


def programs(path: str, *overrides: str) -> dict:
    config = cfg.load(path, overrides)
    mesh = abstract_mesh(**config.mesh)
    run = plan_run(config, *planned_pair(config), mesh=mesh, layout="BSGH")
    return {program.name: program for program in run.programs}


# --- Slices


def test_a_topology_says_how_many_chips_and_hosts():
    found = find("v5e:4x8", local_chips=0)
    assert (found.chip, found.chips, found.hosts) == (V5E, 32, 8)
    hosts = {name: find(name, local_chips=0).hosts for name in ("v5e:1x1", "v6e:2x4", "v5p:2x2x2")}
    assert hosts == {"v5e:1x1": 1, "v6e:2x4": 1, "v5p:2x2x2": 2}


def test_slices_of_a_family_grow_and_end_within_512_chips():
    for family, most in {"v5e": 256, "v5p": 512, "v6e": 256}.items():
        sizes = [found.chips for found in slices(family)]
        assert sizes == sorted(sizes)
        assert sizes[-1] == most


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v9:2x2", ["v5e", "v5p", "v6e", "local", "`v9`"]),
        ("v5e:3x3", ["v5e:4x4", "v5e:16x16", "`v5e:3x3`"]),
        ("v5p:4x4", ["v5p:2x2x2", "`v5p:4x4`"]),
        ("v5e", ["v5e:4x4", "`v5e`"]),
    ],
)
def test_a_topology_that_does_not_exist_is_answered_with_those_that_do(topology, expected):
    with pytest.raises(ValueError, match="`--topology`") as error:
        find(topology, local_chips=1)
    assert [word for word in expected if word not in str(error.value)] == []


# --- A config laid over a slice


def test_fsdp_fills_the_slice_and_micro_batches_follow():
    config, changes = lay_over(cfg.load(PAPER, []), chips=16, given=[])
    assert (config.mesh.fsdp, config.train.micro_batches) == (16, 4)
    assert len(changes) == 2


def test_a_mesh_that_fills_the_slice_is_left_as_it_is():
    overrides = ["--config.mesh.tensor=2", "--config.mesh.fsdp=4", "--config.mesh.data=2"]
    config, changes = lay_over(cfg.load(PAPER, overrides), chips=16, given=["mesh.fsdp"])
    assert (dict(config.mesh), changes) == (dict(data=2, fsdp=4, tensor=2), [])


def test_what_is_set_by_hand_is_not_changed():
    config = cfg.load(PAPER, ["--config.mesh.fsdp=8"])
    with pytest.raises(ValueError, match="1 × 8 × 1 must multiply to the 16 chips"):
        lay_over(config, chips=16, given=["mesh.fsdp"])
    with pytest.raises(ValueError, match=r"`train.micro_batches` = 8 does not divide over .* = 16"):
        lay_over(cfg.load(PAPER, []), chips=16, given=["train.micro_batches"])


def test_more_chips_than_rows_are_refused():
    with pytest.raises(ValueError, match=r"`rollout.batch` = 64 does not divide over"):
        lay_over(cfg.load(PAPER, []), chips=256, given=[])
    config, _ = lay_over(cfg.load(PAPER, ["--config.mesh.tensor=4"]), chips=256, given=[])
    assert config.mesh.fsdp == 64


def test_heads_that_do_not_divide_are_refused_before_anything_is_traced():
    config = cfg.load(PAPER, ["--config.mesh.tensor=16"])
    with pytest.raises(ValueError, match=r"`kv_heads` = 8 must be divisible by .*`tensor` = 16"):
        analyze(config, find("v5e:4x4", local_chips=0), given=[])


def test_an_update_fills_its_contexts():
    work = workload(cfg.load(PAPER, []))
    # The first message takes 512 tokens, each of the 29 later ones 128; the rest is sampled.
    assert work.sampled == 16384 - 512 - 29 * 128
    assert (work.sequence, work.response) == (16384, 12288)
    assert work.longest_question == 512 + 4096
    # In steps of 64 tokens: 56 of the 248 into 4,096 slots, then 64 into each larger cache.
    assert work.slots_read == 4096 * (56 + 64 * (2 + 3 + 4)) / 248
    short = workload(cfg.load(PAPER, ["--config.rollout.turn_tokens=100"]))
    assert (short.sampled, short.response) == (3000, 3072)


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
    where = find("v5e:4x4", local_chips=0)
    plan = analyze(cfg.load(PAPER + ":teacher=32b", []), where, given=[], flops=False)
    student, teacher = PUBLISHED["Qwen3-1.7B"], PUBLISHED["Qwen3-32B"]

    def each(sizes, width):
        # Norms of queries and keys have no axis to be split over.
        norms = 2 * sizes.num_layers * sizes.head_dim
        return width * ((count(sizes) - norms) // 16 + norms)

    found = plan.run.residents
    assert found["parameters"] == each(student, 4)
    # Two moments, the number of updates twice: of Adam, and of its schedule.
    assert found["optimizer"] == 2 * each(student, 4) + 2 * 4
    assert found["teacher"] == each(teacher, 2)
    # Whole along `fsdp`, in bfloat16.
    assert found["copy to sample with"] == 2 * count(student)


def test_adapters_leave_the_student_frozen_and_train_a_part():
    flags = ["--config.lora.rank=16", "--config.lora.targets=q,down", "--config.mesh.fsdp=1"]
    config = cfg.load(PAPER, flags)
    student, teacher = planned_pair(config)
    run = plan_run(
        config, student, teacher, mesh=abstract_mesh(data=1, fsdp=1, tensor=1), layout="BSGH"
    )
    adapters = 28 * 16 * ((2048 + 16 * 128) + (6144 + 2048))
    own = count(student.sizes)
    assert run.residents["parameters"] == 4 * adapters
    assert run.residents["optimizer"] == 2 * 4 * adapters + 2 * 4
    # Frozen weights need no more than what is computed in.
    assert run.residents["frozen weights"] == 2 * own
    assert run.residents["copy to sample with"] == 2 * (own + adapters)
    (step,) = [program for program in run.programs if program.name == "train step"]
    (added,) = [part for part in step.moved if part.what == "gradient, added to"]
    assert added.bytes == 4 * adapters
    # The programs are those of a run: they can be traced with these arguments.
    assert run.trace(step).out_info[0].params["q"]["a"].shape == (28, 2048, 16)
    (sampling,) = [program for program in run.programs if program.name == "sampling"]
    copied = run.trace(run.programs[0]).out_info
    assert jax.tree.structure(copied) == jax.tree.structure(sampling.args[0])


def test_an_int8_teacher_takes_half_and_its_scales():
    sizes = PUBLISHED["Qwen3-8B"]
    place = Placement(abstract_mesh(data=1, fsdp=1, tensor=1), "BSGH")
    layers = {name: spec.shape for name, spec in param_specs(sizes)["layers"].items()}
    projections = [shape for name, shape in layers.items() if "norm" not in name]
    weights = sum(map(math.prod, projections))
    L, D, N, G, H, F = 36, 4096, 32, 8, 128, 12_288
    scales = L * ((N + 2 * G) * H + D + 2 * F + D)
    expected = weights + 4 * scales + 2 * (count(sizes) - weights)
    assert device_bytes(place.params(sizes, "int8")) == expected
    # Its cache and its head stay in bfloat16.
    cache = place.cache(sizes, place.params(sizes, "int8"), rows=1, slots=1)
    assert cache.keys[0].dtype == "bfloat16"


def test_a_large_int8_teacher_and_a_student_in_training_fit_one_device_of_80_gb():
    # As the README says.
    sizes = "mesh.fsdp=1 rollout.batch=8 judge.batch=8 eval.batch=4 train.loss_chunk=4096"

    def most(dtype: str) -> int:
        """Bytes that some program needs, whatever the compiler does."""
        flags = [f"--config.{size}" for size in f"{sizes} teacher_dtype={dtype}".split()]
        config = cfg.load(f"{PAPER}:teacher=32b", flags)
        mesh = abstract_mesh(data=1, fsdp=1, tensor=1)
        run = plan_run(config, *planned_pair(config), mesh=mesh, layout="BSGH")
        return max(device_bytes(p.args) + run.beside(p) + p.temporaries for p in run.programs)

    assert most("int8") < 74e9
    assert most("bfloat16") > 80e9


def test_of_experts_those_that_a_token_takes_are_computed():
    config = cfg.load(PAPER, ["--config.teacher=models/Qwen3-30B-A3B", "--config.mesh.data=2"])
    plan = analyze(config, find("v5e:4x4", local_chips=0), given=[])
    (first,) = [cost for cost in plan.costs if cost.program.name == "judging"]
    sizes = PUBLISHED["Qwen3-30B-A3B"]
    one = 3 * 2048 * 768
    active = count(sizes) - 48 * (128 - 8) * one - 2 * 151_936 * 2048
    tokens = 64 * plan.run.work.question
    products = 2 * tokens * active
    attention = 48 * 2 * 2 * tokens * plan.run.work.question * 32 * 128
    assert first.flops * 16 == pytest.approx(products + attention, rel=0.02)


def test_a_cache_is_counted_on_each_device():
    sizes = PUBLISHED["Qwen3-8B"]
    place = Placement(abstract_mesh(data=2, fsdp=2, tensor=4), "BSGH")
    params = place.params(sizes, "bfloat16")
    cache = place.cache(sizes, params, rows=64, slots=1024)
    whole = 2 * sizes.num_layers * 64 * 1024 * sizes.num_kv_heads * sizes.head_dim * 2
    assert device_bytes((cache.keys, cache.values)) == whole // 16
    assert device_bytes(cache.lengths) == 64 * 4 // 4
    with pytest.raises(ValueError, match="`batch` = 6 must be divisible"):
        place.cache(sizes, params, rows=6, slots=1024)


def test_programs_are_those_that_the_method_runs():
    rollout = ["copy to sample with", "observation", "sampling"]
    evaluated = [
        f"evaluating the {who}: {what}"
        for who in ("student", "teacher")
        for what in ("first message", "sampling")
    ]
    assert list(programs(QUICKSTART)) == [*rollout, "judging", "train step", *evaluated]
    assert list(programs(QUICKSTART + ":method=opd")) == [*rollout, "train step", *evaluated]
    # The teacher plays; there is nothing to copy.
    assert list(programs(QUICKSTART + ":method=sft")) == [*rollout[1:], "train step", *evaluated]
    # Turns may be far longer than the mean.
    assert "judging: longest question" in programs(PAPER)
    history = programs(
        QUICKSTART, "--config.judge.context=history", "--config.judge.decode=generate"
    )
    assert [name for name in history if name.startswith("judging")] == [
        "judging: conversation",
        "judging",
        "judging: answer",
    ]


def test_only_programs_that_use_the_teacher_hold_it():
    found = programs(QUICKSTART + ":method=sft")
    assert found["train step"].args[1] is None
    assert "teacher" in found["train step"].beside
    assert "teacher" not in found["sampling"].beside
    assert "teacher" not in programs(QUICKSTART)["train step"].beside


def test_models_built_from_nothing_are_planned_too():
    path = str(ROOT / "configs" / "household_pair.py")
    found = programs(path)
    assert "sampling" not in found
    rows, tokens = found["train step"].args[2].tokens.shape
    assert (rows, tokens) == (4096 // 896, 896)
    with pytest.raises(ValueError, match=r"`data.tokens_per_batch` = 512: expected at least 896"):
        programs(path, "--config.data.tokens_per_batch=512")


def test_a_model_that_is_nowhere_is_answered_with_those_that_are_known():
    config = cfg.load(PAPER, ["--config.teacher=models/Nobody-7B"])
    with pytest.raises(ValueError, match=r"`teacher`.*models/Nobody-7B.*Qwen3-32B"):
        planned_pair(config)


def test_sizes_come_from_a_folder_where_there_is_one():
    student, teacher = planned_pair(cfg.load(QUICKSTART, []))
    assert "config.json" in student.source
    assert (student.sizes.d_model, teacher.sizes.d_model) == (64, 96)
    assert teacher.label_width == 1  # its tokenizer knows the judge's words
    student, _ = planned_pair(cfg.load(PAPER, []))
    assert "published sizes of Qwen3-1.7B" in student.source


# --- Bounds and verdicts


def test_a_bound_is_the_larger_of_two_times():
    found = bound(V5E, flops=197e12, moved=819e9 / 4)
    assert (found.seconds, found.term, found.memory) == (1.0, "compute", 0.25)
    found = bound(V5E, flops=1e12, moved=819e9)
    assert (found.seconds, found.term) == (1.0, "memory")


def test_what_fits_beside_the_cores_may_be_read_once():
    assert Moved("head", 2 * ON_CHIP, 5).total == 10 * ON_CHIP
    assert Moved("head", ON_CHIP, 5).total == ON_CHIP
    assert Moved("nothing", 10, 0).total == 0


def test_sampling_moves_weights_and_cache_for_every_token():
    found = programs(PAPER)["sampling"]
    moved = {part.what: part for part in found.moved}
    assert moved["parameters"].bytes == 2 * count(PUBLISHED["Qwen3-1.7B"])
    slots = 4096 * 632 / 248  # as in `test_an_update_fills_its_contexts`
    assert moved["cache"].bytes == round(2 * 28 * 8 * slots * 8 * 128 * 2)  # eight rows a device
    assert {part.times for part in found.moved} == {64}


def memory(total: float, peak: float) -> Memory:
    arguments, donated = 2 * GIB, GIB
    temporaries = int(total * GIB) - arguments - 1000
    return Memory(arguments, donated, donated, temporaries, 1000, int(peak * GIB))


@pytest.mark.parametrize(
    ("total", "peak", "beside", "expected"),
    [
        (14.0, 14.0, 0, "fits"),
        (14.7, 14.7, 0, "uncertain"),
        (17.2, 14.6, 0, "uncertain"),
        (17.2, 15.8, 0, "does not fit"),
        # Peaks above what everything together would be.
        (3.0, 15.0, 0, "uncertain"),
        # What stands beside it counts.
        (10.0, 10.0, 4, "fits"),
        (10.0, 10.0, 5, "uncertain"),
        (10.0, 10.0, 6, "does not fit"),
    ],
)
def test_a_compiled_program_fits_is_uncertain_or_does_not_fit(total, peak, beside, expected):
    found = compiled_verdict(memory(total, peak), beside=beside * GIB, limit=V5E.memory)
    assert found == expected


def test_without_a_compiler_only_a_misfit_is_certain():
    assert analytic_verdict(16 * GIB, limit=V5E.memory) == "does not fit"
    assert analytic_verdict(15 * GIB, limit=V5E.memory) == "not compiled"
    assert compiled_verdict(memory(3, 3), beside=0, limit=None) == "memory unknown"


def test_a_run_is_as_good_as_its_worst_program():
    assert worst(["fits", "uncertain", "fits"]) == "uncertain"
    assert worst(["uncertain", "not compiled"]) == "not compiled"
    assert worst(["does not fit", "not compiled"]) == "does not fit"


# --- What is said of it


def compiled(**changes: object) -> dict:
    """What a compiler may have answered; its programs have two micro-batches."""
    collective = dict(
        kind="all-gather",
        shape="bf16[512,32768]",
        group=4,
        times=2,
        known=True,
        source="losses.py:35 _logits",
        instances=1,
        sent=2 * 2**25,
    )
    copy = dict(
        shape="bf16[64,8,16384,128]",
        bytes=2**31,
        times=64,
        known=True,
        source="model.py:9 f",
        instances=56,
    )
    return {
        "refused": None,
        "seconds": 12.0,
        "memory": dict(
            arguments=GIB, outputs=0, aliased=0, temporaries=2 * GIB, code=0, peak=3 * GIB
        ),
        "collectives": [collective | changes],
        "copies": [copy],
    }


def described(answer: dict) -> dict:
    config = cfg.load(QUICKSTART, ["--config.train.micro_batches=2"])
    where = find("v5e:1x1", local_chips=0)
    analysis = analyze(config, where, given=[], flops=False)
    return describe(analysis, {"train step": answer})


def test_what_the_compiler_said_is_told():
    text = tables.text(described(compiled()), can_compile=True)
    for word in (
        "| bf16[512,32768]",
        "losses.py:35 _logits",
        "copy of bf16[64,8,16384,128] (2.00 GiB), 64 × 56, at model.py:9 f",
        "each device sends 0.0671 GB a run",
        "Compiled, not run; times are bounds, not predictions.",
    ):
        assert word in text
    assert "warning" not in text


def test_a_refusal_is_told_in_the_compilers_words():
    refused = {"refused": "RESOURCE_EXHAUSTED: Ran out of memory on HBM"}
    report = described(refused)
    assert report["verdict"] == "does not fit"
    assert "train step: RESOURCE_EXHAUSTED: Ran out" in tables.text(report, can_compile=True)
    # Anything else says nothing of memory.
    assert described({"refused": "no answer"})["verdict"] == "not compiled"


def test_weights_sent_for_every_chunk_of_the_loss_are_warned_of():
    (warning,) = described(compiled(times=32, sent=32 * 2**25))["warnings"]
    assert "all-gather bf16[512,32768] at losses.py:35 _logits" in warning
    assert "32 times" in warning
    assert described(compiled(times=32, sent=32 * 2**10))["warnings"] == []
    assert described(compiled(times=32, source="model.py:3 f"))["warnings"] == []


def test_a_loop_that_cannot_be_counted_is_warned_of():
    report = described(compiled(known=False))
    assert "unknown trip count" in report["warnings"][0]
    assert "unknown trip count" in tables.text(report, can_compile=True)


def test_what_a_plan_leaves_out_is_said():
    where = find("v5e:1x1", local_chips=0)
    config = cfg.load(QUICKSTART, ["--config.rollout.history_turns=4"])
    report = describe(analyze(config, where, given=[], flops=False), None)
    assert any("`rollout.history_turns`" in line for line in report["assumed"])
    assert any("`judge.agreement_every`" in line for line in report["assumed"])


# --- The command


def test_the_command_plans_a_paper_run_without_a_compiler(command):
    paper = "--config=configs/alfworld_qwen3.py:student=1.7b,teacher=32b"
    done = command("plan", paper, "--topology=v5e:4x4", "--compile=false", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)["plan"]
    assert (plan["chips"], plan["mesh"]) == (16, dict(data=1, fsdp=16, tensor=1))
    found = {program["name"]: program for program in plan["programs"]}
    # The teacher's cache for 64 episodes is larger than a device: 64 layers, eight heads of 128,
    # keys and values, two bytes; four rows of a device.
    cache = 64 * 8 * 128 * 2 * 2 * 16384 * 4
    assert found["evaluating the teacher: sampling"]["arguments"] > cache > V5E.memory
    assert found["evaluating the teacher: sampling"]["verdict"] == plan["verdict"] == "does not fit"
    # Weights meet each of 64 · 16384 tokens three times in the student, once in the teacher, and
    # two for each operation; attention and recomputation come on top.
    tokens = 64 * 16384 / 16
    weights = [count(PUBLISHED[name]) for name in ("Qwen3-1.7B", "Qwen3-32B")]
    least = 2 * tokens * (3 * weights[0] + weights[1] - 2 * 151_936 * 5120)
    assert least < found["train step"]["flops"] < 3 * least
    assert found["train step"]["bound"]["term"] == "compute"
    seconds = sum(p["runs"] * p["bound"]["seconds"] for p in plan["programs"] if p["bound"])
    assert plan["update_seconds"] == pytest.approx(seconds)


def test_the_command_prints_tables_and_says_that_nothing_ran(command):
    flags = ("--config=configs/quickstart.py:runlocal", "--topology=v5e:2x2", "--compile=false")
    done = command("plan", *flags, "--config.judge.batch=8")
    assert done.returncode == 0, done.stderr
    for word in ("fsdp 4", "| train step", "An update takes at least", "verdict: not compiled"):
        assert word in done.stdout
    assert "times are bounds, not predictions" in done.stdout


def test_the_smallest_slice_is_the_first_that_is_no_misfit(command):
    flags = ("--config=configs/alfworld_qwen3.py", "--topology=v6e", "--smallest")
    done = command("plan", *flags, "--compile=false", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    verdicts = {row["slice"]: row["verdict"] for row in found["tried"]}
    last = found["plan"]["topology"]
    assert list(verdicts) == [s.name for s in slices("v6e")][: len(verdicts)]
    assert verdicts.popitem() == (last, "not compiled")
    assert set(verdicts.values()) == {"does not fit"}
    limit = V6E.memory
    assert all(program["least"] <= limit for program in found["plan"]["programs"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--topology=v5e:5x5"], "v5e:4x4"),
        ([], "`--topology`"),
        (["--topology=v5e:4x4", "--config.mesh.tensor=3"], "must multiply to the 16 chips"),
        (["--topology=v5e:4x4", "--config.mesh.tensor=16"], "`kv_heads` = 8"),
        (["--topology=v5e", "--smallest", "--config.mesh.data=7"], "fits no slice of v5e"),
        (["--topology=v5e:4x4", "--workdir=w"], "`--workdir`"),
    ],
)
def test_mistakes_end_in_one_line(command, flags, expected):
    done = command("plan", "--config=configs/alfworld_qwen3.py", "--compile=false", *flags)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1

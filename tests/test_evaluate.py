"""The commands that measure a policy and export a trained student."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from opd_jax import evaluate, export, model
from opd_jax.agent.conversation import Conversation
from opd_jax.config import build as experiment
from opd_jax.config import load, read_stored, to_json
from opd_jax.envs.search.searchqa_data import SETS
from opd_jax.experience import environments
from opd_jax.learner.train_state import abstract_state
from opd_jax.report.tables import judge_table, results_table
from opd_jax.runtime.checkpoint import Checkpoints
from opd_jax.runtime.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIGS = Path(__file__).parents[1] / "configs"


def one_device() -> jax.sharding.Mesh:
    return make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])


# --- Players


def quickstart(*overrides: str) -> FrozenConfigDict:
    return load(f"{CONFIGS / 'quickstart.py'}:runlocal", overrides)


@pytest.mark.parametrize("size", ["small", "large"])
def test_the_expert_succeeds_and_chance_does_not(size: str) -> None:
    config = quickstart("--config.eval.tasks=40", f"--config.env.size={size}")
    config = FrozenConfigDict({**config.to_dict(), "env": {**config.env, "max_turns": 40}})
    expert = evaluate.evaluate_player(config, "expert")
    chance = evaluate.evaluate_player(config, "random")
    assert expert.keys() == chance.keys() == {"valid_seen", "valid_unseen"}
    for split in expert:
        assert expert[split]["n"] == chance[split]["n"] == 40
        assert expert[split]["success"] >= 0.95
        assert chance[split]["success"] <= 0.6
        assert expert[split]["turns"] < chance[split]["turns"]
        assert expert[split]["failed"] == 0


def test_a_player_plays_the_first_tasks_of_a_split_and_always_alike() -> None:
    config = quickstart("--config.eval.tasks=6")
    played = evaluate.play_player(config, "random", "valid_seen")
    assert [c.task.id for c in played] == [f"household/small/valid_seen/{i}" for i in range(6)]
    assert played == evaluate.play_player(config, "random", "valid_seen")
    fewer = evaluate.play_player(quickstart("--config.eval.tasks=3"), "random", "valid_seen")
    assert fewer == played[:3]


def test_a_panel_is_no_larger_than_its_split() -> None:
    env = environments.make_env(quickstart().env)
    size = env.size("valid_seen")
    assert evaluate.panel_size(quickstart("--config.eval.tasks=7"), "valid_seen") == 7
    many = quickstart(f"--config.eval.tasks={size + 5}")
    assert evaluate.panel_size(many, "valid_seen") == size


# --- A model


@pytest.fixture(scope="module")
def student() -> experiment.LoadedModel:
    return experiment.load_model("embedded:student", dtype="float32", mesh=one_device())


@pytest.fixture(scope="module")
def play(student: experiment.LoadedModel, small: tuple) -> Callable[..., list[Conversation]]:
    config = quickstart(*small)
    agent = experiment.make_agent(student, config.rollout, temperature=0.0)

    def run(tasks: int, batch: int = 2, seed: int = 0, temperature: float = 0.0):
        chosen = agent
        if temperature:
            chosen = experiment.make_agent(student, config.rollout, temperature=temperature)
        return evaluate.play_model(
            student.params,
            jax.random.key(seed),
            agent=chosen,
            env=config.env,
            split="valid_seen",
            tasks=tasks,
            batch=batch,
        )

    return run


def test_a_model_plays_the_first_tasks_in_order(play: Callable) -> None:
    # The last batch is not full.
    assert [c.task.id for c in play(5)] == [f"household/small/valid_seen/{i}" for i in range(5)]


def test_at_temperature_zero_neither_batch_nor_seed_matters(play: Callable) -> None:
    played = [c.tokens for c in play(4)]
    assert [c.tokens for c in play(4, batch=4)] == played
    assert [c.tokens for c in play(4, seed=1)] == played


def test_a_sampled_evaluation_is_a_function_of_its_seed(play: Callable) -> None:
    played = [c.tokens for c in play(4, temperature=1.0)]
    assert [c.tokens for c in play(4, temperature=1.0)] == played
    # Neither more tasks behind them nor others beside them change anything.
    assert [c.tokens for c in play(5, temperature=1.0)][:4] == played
    assert [c.tokens for c in play(4, batch=4, temperature=1.0)] == played
    assert [c.tokens for c in play(4, temperature=1.0, seed=1)] != played


# --- What need not be played again


FIGURES = {"n": 4, "update": 80, "temperature": 0.4, "seed": 0}
JUDGE = {"n": 9, "context": "table9", "decode": "constrained", "admissible_shown": 12}


def digests() -> dict[str, str]:
    env = environments.make_env(quickstart().env)
    return {split: env.digest(split) for split in quickstart().eval.splits}


def of_both_splits(figures: dict | None) -> dict[str, dict | None]:
    return {s: figures and {"digest": digest, **figures} for s, digest in digests().items()}


@pytest.mark.parametrize(
    ("figures", "override", "same"),
    [
        (FIGURES, "", True),
        (FIGURES, "--config.eval.batch=2", True),
        (FIGURES, "--config.eval.tasks=5", False),
        # Played, if not to an end: played again they might break again, without end.
        (FIGURES | {"n": 3, "broken": 1}, "", True),
        (FIGURES | {"n": 3, "broken": 0}, "", False),
        (FIGURES, "--config.eval.seed=1", False),
        (FIGURES, "--config.eval.temperature=1.0", False),
        (FIGURES, "--config.eval.judge=true", False),
        (FIGURES | {"judge": JUDGE}, "--config.eval.judge=true", True),
        (FIGURES | {"judge": JUDGE | {"context": "history"}}, "--config.eval.judge=true", False),
        (FIGURES | {"judge": JUDGE | {"decode": "generate"}}, "--config.eval.judge=true", False),
        (FIGURES | {"judge": JUDGE | {"context": "history"}}, "", True),
        (FIGURES | {"update": 40}, "", False),
        ({"n": 4}, "--config.eval.temperature=1.0", True),  # a player has no temperature
        (FIGURES | {"digest": "of other tasks"}, "", False),
        ({"n": 4, "digest": "of other tasks"}, "", False),
        (None, "", False),
    ],
)
def test_figures_hold_for_the_settings_they_were_made_with(
    figures: dict | None, override: str, same: bool
) -> None:
    config = quickstart("--config.eval.tasks=4", *filter(None, [override]))
    both = of_both_splits(figures)
    assert evaluate.is_evaluated(both, config, update=80) == same
    assert not evaluate.is_evaluated({"valid_seen": both["valid_seen"]}, config, update=80)
    assert not evaluate.is_evaluated(None, config, update=80)


def test_figures_without_a_digest_are_made_again() -> None:
    config = quickstart("--config.eval.tasks=4")
    assert evaluate.is_evaluated(of_both_splits(FIGURES), config, update=80)
    for split in digests():
        older = of_both_splits(FIGURES) | {split: FIGURES}
        assert not evaluate.is_evaluated(older, config, update=80)


# --- The command


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture) -> Iterator[Callable[..., str]]:
    """Runs a command's `main` here; returns what it printed."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(main: Callable, *words: object) -> str:
        main([str(word) for word in words])
        return capsys.readouterr().out

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("who", ["random", "before"])
def test_an_evaluation_may_end_after_a_split(who: str, small: tuple) -> None:
    config, done = quickstart(*small, "--config.eval.tasks=1", "--config.eval.batch=1"), []

    def after_split() -> None:
        done.append(who)
        raise SystemExit(0)

    student = experiment.load_student(config, one_device())
    play = {
        "random": partial(evaluate.evaluate_player, config, who),
        "before": partial(
            evaluate.evaluate_model, config, student, student.params, update=0, judging=None
        ),
    }
    with pytest.raises(SystemExit):
        play[who](after_split=after_split)
    assert done == [who]
    assert len(config.eval.splits) == 2


def children() -> set[str]:
    """The processes that this one has."""
    return {
        pid
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }


def test_environments_of_an_evaluation_that_fails_do_not_outlive_it(small: tuple) -> None:
    config = quickstart(*small, "--config.env.workers=true", "--config.rollout.context_tokens=8")
    student = experiment.load_student(config, one_device())
    before = children()
    # Held by the caught error, nothing that it left behind is collected.
    with pytest.raises(ValueError, match="`context_tokens`") as caught:
        evaluate.evaluate_model(config, student, student.params, update=0, judging=None)
    assert children() == before
    assert caught.tb


@pytest.mark.parametrize("policy", ["expert", "random"])
def test_a_player_is_evaluated_into_the_summary(
    policy: str, in_process: Callable, tmp_path: Path, small: tuple
) -> None:
    others = {"eval": {"before": {"valid_seen": {"success": 0.5}}}, "note": 1}
    (tmp_path / "summary.json").write_text(json.dumps(others))
    words = (f"--config={CONFIGS / 'quickstart.py'}:runlocal", *small, f"--workdir={tmp_path}")
    printed = in_process(evaluate.main, *words, f"--policy={policy}")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["note"] == 1
    assert summary["eval"].keys() == {"before", policy}
    assert summary["eval"]["before"] == others["eval"]["before"]
    config = quickstart(*small)
    assert summary["eval"][policy] == evaluate.evaluate_player(config, policy)
    assert {s: r["digest"] for s, r in summary["eval"][policy].items()} == digests()
    which = [f"{split}: 1000 tasks, digest {digest}" for split, digest in digests().items()]
    table = results_table({policy: summary["eval"][policy]})
    assert printed.splitlines() == [*which, *table.splitlines()]


@pytest.mark.parametrize("policy", ["expert", "random"])
def test_players_play_the_papers_benchmarks(
    policy: str, benchmark: tuple[str, ...], in_process: Callable, tmp_path: Path
) -> None:
    printed = in_process(evaluate.main, *benchmark, f"--workdir={tmp_path}", f"--policy={policy}")
    config = load(benchmark[0].removeprefix("--config="), list(benchmark[1:]))
    splits = json.loads((tmp_path / "summary.json").read_text())["eval"][policy]
    assert splits.keys() == set(config.eval.splits)
    env = environments.make_env(config.env)
    for split, figures in splits.items():
        assert (figures["n"], figures["broken"]) == (2, 0)
        assert figures["digest"] == env.digest(split)
        if policy == "expert":
            assert figures["failed"] == 0
        assert f"| {policy}" in printed
    assert evaluate.is_evaluated(splits, config, update=0)


def test_searchqa_has_a_macro_average(in_process: Callable, tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    data = tmp_path / "data"
    for name, file in SETS.items():
        path = data / file
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"question": f"Which word is it in {name}?", "golden_answers": ["word"]}
        path.write_text("".join(json.dumps(row | {"id": n}) + "\n" for n in range(2)))
    corpus = data / "corpus.jsonl"
    corpus.write_text(json.dumps({"id": "1", "contents": '"Words"\nIt is a word.'}) + "\n")
    flags = (
        f"--config={CONFIGS / 'searchqa_qwen3.py'}",
        f"--config.env.data={data}",
        f"--config.env.retriever={corpus}",
        "--policy=random",
    )
    printed = in_process(evaluate.main, *flags, f"--workdir={tmp_path / 'all'}")
    found = json.loads((tmp_path / "all/summary.json").read_text())["eval"]["random"]
    assert found.keys() == {*SETS, "macro_average"}
    sets = [found[name] for name in SETS]
    average = found["macro_average"]
    assert average["n"] == sum(figures["n"] for figures in sets) == 14
    assert average["success"] == pytest.approx(np.mean([f["success"] for f in sets]))
    assert average["measures"]["f1"] == pytest.approx(np.mean([f["measures"]["f1"] for f in sets]))
    last = [cell.strip() for cell in printed.splitlines()[-1].strip("|").split("|")]
    assert last[:3] == ["random", "macro_average", f"{average['success']:.1%}"]

    # Of some of the sets there is none: it would be another figure under the same name.
    some = in_process(
        evaluate.main, *flags, f"--workdir={tmp_path / 'some'}", "--config.eval.splits=nq,popqa"
    )
    assert "macro_average" not in some


def test_the_student_of_the_newest_checkpoint_is_evaluated_as_at_the_end_of_training(
    trained: Any, command: Callable, tmp_path: Path
) -> None:
    workdir = Path(shutil.copytree(trained.workdir, tmp_path / "copy"))
    expected = json.loads((workdir / "summary.json").read_text())
    (workdir / "summary.json").unlink()
    done = command("evaluate", *trained.flags, f"--workdir={workdir}", "--policy=model")
    assert done.returncode == 0, done.stderr
    found = json.loads((workdir / "summary.json").read_text())
    assert found["eval"] == {"after": expected["eval"]["after"]}


def test_without_a_checkpoint_the_untrained_student_is_evaluated(
    command: Callable, tmp_path: Path, built: Any
) -> None:
    done = command("evaluate", *built.flags, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "summary.json").read_text())["eval"]
    assert found.keys() == {"before"}
    assert found["before"]["valid_unseen"]["n"] == 4


def test_the_judge_is_measured_on_the_turns_that_a_model_played(
    in_process: Callable, tmp_path: Path, small: tuple
) -> None:
    words = (f"--config={CONFIGS / 'quickstart.py'}:runlocal", *small, "--config.eval.judge=true")
    printed = in_process(evaluate.main, *words, f"--workdir={tmp_path}")
    found = json.loads((tmp_path / "summary.json").read_text())["eval"]["before"]
    config = quickstart(*small)
    pair = experiment.load_pair(config, one_device())
    agent = experiment.make_agent(pair[0], config.rollout, temperature=config.eval.temperature)
    for split, figures in found.items():
        played = evaluate.play_model(
            pair[0].params,
            jax.random.key(config.eval.seed),
            agent=agent,
            env=config.env,
            split=split,
            tasks=config.eval.tasks,
            batch=config.eval.batch,
        )
        # Every turn that did not fail has a label in this environment.
        labelled = sum(not turn.failure for c in played for turn in c.turns)
        assert figures["judge"]["n"] == labelled > 0
        assert figures["judge"] == evaluate.measure_judge(config, pair[1], played)
    assert judge_table({"before": found}) in printed
    assert "balanced accuracy" in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--policy=teacher"], ["`--policy`", "model", "expert", "random", "teacher"]),
        (["--config.eval.splits=train,dev"], ["`eval.splits`", "valid_unseen", "'dev'"]),
        (["--config.eval.task=3"], ["`eval.task`", "`eval.tasks`"]),
        (["--config.student=no/where", "--config.mesh.data=8"], ["`no/where`"]),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = f"--config={CONFIGS / 'quickstart.py'}:runlocal"
    with pytest.raises(SystemExit) as stop:
        evaluate.main([config, f"--workdir={tmp_path}", *words])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert all(word in message for word in expected), message
    assert list(tmp_path.iterdir()) == []


def test_figures_of_another_environment_do_not_come_to_stand_beside_a_runs_own(
    trained: Any, command: Callable, tmp_path: Path
) -> None:
    workdir = Path(shutil.copytree(trained.workdir, tmp_path / "copy"))
    before = (workdir / "summary.json").read_bytes()
    flags = (*trained.flags, f"--workdir={workdir}", "--policy=expert")
    done = command("evaluate", *flags, "--config.env.size=large")
    assert done.returncode == 2
    assert "env.size: 'small' -> 'large'" in done.stderr
    assert (workdir / "summary.json").read_bytes() == before
    done = command("evaluate", *flags, "--config.train.updates=99")
    assert done.returncode == 0, done.stderr


# --- Export


def newest_params(workdir: Path) -> tuple[model.ModelConfig, model.Params]:
    config = read_stored(workdir / "config.json")
    loaded, _ = experiment.load_pair(config, one_device())
    checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
    abstract = abstract_state(loaded.params, experiment.make_optimizer(config))
    _, state, _ = checkpoints.restore_latest(abstract)
    checkpoints.close()
    return loaded.config, state.params


def greedy(
    sizes: model.ModelConfig, params: model.Params, prompt: list[int], new: int
) -> list[int]:
    """Greedy continuation by whole forward passes over a padded row."""
    tokens = np.zeros((1, len(prompt) + new), np.int32)
    tokens[0, : len(prompt)] = prompt

    @jax.jit
    def following(row: jax.Array, last: jax.Array) -> jax.Array:
        hidden = model.forward(params, row, config=sizes, query_chunk=row.shape[1], remat="none")
        return (hidden[0, last] @ model.head(params)).argmax()

    for place in range(len(prompt), len(prompt) + new):
        tokens[0, place] = following(tokens, place - 1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("run", ["trained", "built"])
def test_transformers_opens_an_export_and_decodes_the_same_tokens(
    run: str, request: pytest.FixtureRequest, command: Callable, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    workdir, out = request.getfixturevalue(run).workdir, tmp_path / "exported"
    done = command("export", f"--workdir={workdir}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"update 4 of {workdir} written to {out}\n"

    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    question = [{"role": "user", "content": "You are in a kitchen. Your task is to: heat."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    sizes, params = newest_params(workdir)
    with torch.no_grad():
        tokens = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            min_new_tokens=24,
            do_sample=False,
        )
    # `min_new_tokens` bans the end of a turn until then, so it is compared up to our first one.
    expected = greedy(sizes, params, prompt, new=24)
    stops = experiment.ChatFormat.from_tokenizer(tokenizer).stop_ids
    length = next((i for i, token in enumerate(expected) if token in stops), 24)
    assert length > 0
    assert tokens[0, len(prompt) :].tolist()[:length] == expected[:length]

    # And so do our own configs.
    ours = experiment.load_model(str(out), dtype="float32", mesh=one_device())
    assert ours.config == sizes
    for mine, exported in zip(jax.tree.leaves(params), jax.tree.leaves(ours.params), strict=True):
        np.testing.assert_array_equal(mine, exported)


def test_an_export_asks_for_parameters_alone(
    student: experiment.LoadedModel, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(to_json(quickstart("--config.mesh.data=64")))
    params = jax.tree.map(lambda x: x * 1.01, student.params)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(7, {"params": params}, {})
    checkpoints.close()
    assert export.export(tmp_path, tmp_path / "model") == 7
    got = experiment.load_model(str(tmp_path / "model"), dtype="float32", mesh=one_device())
    assert got.config == student.config
    jax.tree.map(np.testing.assert_array_equal, got.params, params)


def test_an_export_needs_a_run_with_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture, small: tuple
) -> None:
    def error(workdir: Path) -> str:
        with pytest.raises(SystemExit) as stop:
            export.main([f"--workdir={workdir}", f"--out={tmp_path / 'out'}"])
        message = capsys.readouterr().err
        assert stop.value.code == 2
        assert message.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return message

    assert "`--workdir`" in error(tmp_path / "nowhere")
    assert "config.json" in error(tmp_path)
    eight = ("--config.mesh.data=8", "--config.rollout.batch=8", "--config.eval.batch=8")
    (tmp_path / "config.json").write_text(to_json(quickstart(*eight)))
    assert "no checkpoint" in error(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert str(tmp_path / "config.json") in error(tmp_path)


def test_an_export_overwrites_nothing(trained: Any, command: Callable, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    done = command("export", f"--workdir={trained.workdir}", f"--out={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

"""Config files, their arguments and overrides, and the stored copy."""

import json
import textwrap
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from opd_jax.config import differences, load, parse_arg, read_stored, to_json

CONFIG = """
    from ml_collections import ConfigDict, config_dict
    from opd_jax.config import parse_arg

    def get_config(arg=None):
        arg = parse_arg(arg, runlocal=False, ablate="none")
        config = ConfigDict()
        config.seed = 0
        config.name = "run"
        config.clip = None
        config.limit = config_dict.placeholder(float)
        config.train = ConfigDict({
            "learning_rate": 1e-3,
            "updates": 2 if arg.runlocal else 100,
            "remat": True,
            "betas": (0.9, 0.95),
            "splits": ["a", "b"],
        })
        config.train.warmup = config.train.get_ref("updates") // 2
        config.ablate = arg.ablate
        return config
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "example.py"
    file.write_text(textwrap.dedent(CONFIG))
    return str(file)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- parse_arg


def test_argument_values_have_the_types_of_their_defaults():
    defaults = {"runlocal": False, "n": 3, "rate": 0.5, "who": "x"}
    for empty in (None, "", " , "):
        assert parse_arg(empty, **defaults).to_dict() == defaults
    parsed = parse_arg("runlocal, n=4,rate=1,who=1.7b", **defaults)
    assert parsed.to_dict() == {"runlocal": True, "n": 4, "rate": 1.0, "who": "1.7b"}
    assert isinstance(parsed.rate, float)
    assert parse_arg("runlocal=false", runlocal=True).runlocal is False


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("runlocl", ["`runlocl`", "`runlocal`", "`n`"]),
        ("n", ["`n`", "needs a value", "int"]),
        ("n=many", ["`n`", "int", "`many`"]),
        ("n=1.5", ["`n`", "int", "`1.5`"]),
        ("runlocal=maybe", ["`runlocal`", "bool", "`maybe`"]),
        ("n=1,n=2", ["`n`", "twice"]),
    ],
)
def test_bad_arguments_name_themselves(arg, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse_arg(arg, runlocal=False, n=3)
    assert [word for word in words if word not in one_line(error)] == []


# --- load


def test_structure_comes_from_the_argument_and_values_from_flags_in_their_default_type(path):
    flags = {
        "seed": "7",
        "name": "a=b",
        "clip": "0.5",
        "limit": "3",
        "train.learning_rate": "1",
        "train.remat": "false",
        "train.betas": "(0.5,1)",
        "train.splits": "x",
    }
    words = [f"--config.{name}={text}" for name, text in flags.items()]
    config = load(f"{path}:runlocal,ablate=confidence", words)
    assert (config.ablate, config.train.updates, config.seed) == ("confidence", 2, 7)
    values = [config.train.learning_rate, config.train.remat, *config.train.betas, config.limit]
    assert repr(values) == "[1.0, False, 0.5, 1.0, 3.0]"
    assert (config.train.splits, config.name, config.clip) == (("x",), "a=b", 0.5)
    # A flag and its value may be two words. The last one wins, and what depends on it follows.
    more = ["--config.train.updates=10", "--config.train.updates", "40", "--config.limit=none"]
    config = load(path, [*more, "--config.train.learning_rate", "-1e-4"])
    assert (config.limit, config.train.updates, config.train.warmup) == (None, 40, 20)
    assert config.train.learning_rate == -1e-4
    for node in (config, config.train):
        with pytest.raises(AttributeError):
            node.updates = 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--config.train.lerning_rate=1"], ["`train.lerning_rate`", "`train.learning_rate`"]),
        (["--config.learning_rate=1"], ["`learning_rate`", "`train.learning_rate`"]),
        (["--config.qqqq=1"], ["`qqqq`", "`seed`", "`train`"]),
        (["--config.seed.x=1"], ["`seed.x`"]),
        (["--config.train=1"], ["`train`", "group", "`train.updates`"]),
        (["--config.seed=1.5"], ["`seed`", "int", "`1.5`"]),
        (["--config.train.learning_rate=fast"], ["`train.learning_rate`", "float", "`fast`"]),
        (["--config.train.learning_rate=nan"], ["`train.learning_rate`", "float", "`nan`"]),
        (["--config.train.remat=2"], ["`train.remat`", "bool", "`2`"]),
        (["--config.train.betas=0.9,x"], ["`train.betas`", "float", "`x`"]),
        (["--config.limit=x"], ["`limit`", "float", "`x`"]),
        (["--config.seed"], ["`--config.seed`", "needs a value"]),
        (["--config.seed", "--config.name=x"], ["`--config.seed`", "needs a value"]),
        (["--seed=1"], ["`--seed`", "--config."]),
        (["seed=1"], ["`seed=1`", "--name=value"]),
    ],
)
def test_bad_overrides_name_the_field(path, overrides, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load(path, overrides)
    assert [word for word in words if word not in one_line(error)] == []


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("exampel.py", None, ["exampel.py", "does not exist", "/example.py`; configs in"]),
        ("no/where.py", None, ["no/where.py", "does not exist", "none"]),
        ("no/quickstrat.py", None, ["closest: `quickstart`; configs in"]),
        ("example", None, ["example", "`quickstart:runlocal`"]),
        ("none.py", "x = 1", ["none.py", "get_config"]),
        ("wrong.py", "def get_config(arg): return {}", ["wrong.py", "ConfigDict", "dict"]),
    ],
)
def test_bad_config_files_are_named(path, name, text, words):
    file = Path(path).parent / name
    if text:
        file.write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load(str(file), [])
    assert [word for word in words if word not in one_line(error)] == []


@pytest.mark.parametrize("name", ["quickstart", "quickstart:runlocal"])
def test_a_bare_name_is_that_of_a_shipped_config(name, tmp_path, monkeypatch):
    file = Path(__file__).parents[2] / "configs" / "quickstart.py"
    expected = load(str(file) + name.removeprefix("quickstart"), [])
    monkeypatch.chdir(tmp_path)
    assert load(name, []) == expected
    for mistake, closest in (("quickstrat", "quickstart"), ("papper", None)):
        with pytest.raises(ValueError, match=f"`{mistake}` does not exist") as error:
            load(mistake, [])
        # What configs share is no config.
        assert "`paper`" not in one_line(error)
        assert (f"closest: `{closest}`" in one_line(error)) == bool(closest)


def test_a_config_in_any_folder_builds_on_a_shipped_one_and_on_what_lies_beside_it(tmp_path):
    (tmp_path / "beside.py").write_text("RATE = 0.5")
    file = tmp_path / "mine.py"
    file.write_text(
        "import beside\n"
        "from opd_jax.configs import methods, quickstart\n"
        "def get_config(arg=None):\n"
        "    config = quickstart.get_config(arg)\n"
        "    config.optimizer.learning_rate = beside.RATE\n"
        "    config.compare.variants = methods.METHODS\n"
        "    return config\n"
    )
    mine, base = load(f"{file}:runlocal", []), load("quickstart:runlocal", [])
    changed = differences(base, mine, binds=lambda field: True)
    assert changed == ["optimizer.learning_rate: 0.001 -> 0.5"]


def test_an_error_inside_the_config_keeps_its_own_message(path):
    with pytest.raises(ValueError, match="unknown config argument `nope`"):
        load(f"{path}:nope", [])


# --- the stored copy


def test_the_stored_config_is_json_and_reads_back(path, tmp_path):
    config = load(path, ["--config.limit=2.5"])
    text = to_json(config)
    assert json.loads(text)["train"]["betas"] == [0.9, 0.95]
    (tmp_path / "config.json").write_text(text)
    again = read_stored(tmp_path / "config.json")
    assert differences(config, again, binds=lambda field: True) == []
    assert to_json(again) == text


@pytest.mark.parametrize("value", [float("inf"), float("nan"), lambda: 0])
def test_a_value_json_cannot_hold_is_named(value):
    with pytest.raises(ValueError, match=r"`a\.b`"):
        to_json(ConfigDict({"a": {"b": value}}))


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_stored_config_is_an_error(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json` must hold a JSON object"):
        read_stored(tmp_path / "config.json")


def test_differences_list_every_field_that_binds_once():
    saved = ConfigDict({"seed": 0, "train": {"lr": 0.1, "n": 1}, "log": {"every": 1}, "old": 1})
    now = ConfigDict({"seed": 0, "train": {"lr": 0.2, "n": 1}, "log": {"every": 5}, "new": "x"})
    assert differences(saved, now, binds=lambda field: not field.startswith("log.")) == [
        "new: absent -> 'x'",
        "old: 1 -> absent",
        "train.lr: 0.1 -> 0.2",
    ]
    assert differences(saved, now, binds={"log.every"}.__contains__) == ["log.every: 1 -> 5"]


@pytest.mark.parametrize(
    "given",
    ["data.source=expert", "data.source=teacher", "objective.normalize=active_tokens", "seed=3"],
)
def test_a_comparison_does_not_undo_what_is_given(given: str) -> None:
    field = given.partition("=")[0]
    with pytest.raises(ValueError, match=f"`--config.{field}`: a comparison sets it itself"):
        load("quickstart:compare", [f"--config.{given}"])
    load("quickstart:compare", ["--config.objective.beta=0.3"])  # which no method sets
    load("quickstart:compare", ["--config.compare.methods=opd", "--config.data.source=on_policy"])

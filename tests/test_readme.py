"""What the README and the pages in docs/ say is what is there."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opd_jax import config as cfg
from opd_jax.config.settings import read_settings
from opd_jax.report import keys

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
README = TEXT[ROOT / "README.md"]
EVERYTHING = "\n".join(TEXT.values())
LOSSES, OWN_CONFIG = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_loss_example_prints_what_it_says() -> None:
    output = README.partition(LOSSES)[2].split("```\n")[2]
    done = subprocess.run(
        [sys.executable, "-c", LOSSES], capture_output=True, text=True, check=True
    )
    assert done.stdout == output


def test_the_loss_example_imports_jax_and_the_losses_only() -> None:
    imported = set(re.findall(r"^(?:import|from) (\S+)", LOSSES, re.MULTILINE))
    assert imported == {"jax", "jax.numpy", "opd_jax.losses"}


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"configs/\w+\.py(?::[\w=,.]+)?", EVERYTHING)))
)
def test_every_config_named_exists(name: str) -> None:
    if name not in (
        "configs/paper.py",
        "configs/methods.py",
        "configs/controls.py",
        "configs/stages.py",
    ):  # what experiments share
        read_settings(cfg.load(str(ROOT / name), []))


def test_a_config_of_ones_own_works_from_any_folder(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN_CONFIG)
    config = cfg.load(str(path), [])
    read_settings(config)
    assert config.env.max_turns == 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_file_named_exists(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT[page])
    assert all((page.parent / link).exists() for link in links), links
    files = re.findall(r"(?:opd_jax|configs|launch|tests|docs)/[\w/]*\w\.\w+", TEXT[page])
    files = [f for f in files if f != "launch/env"]
    assert all((ROOT / name).exists() for name in files), files


def test_every_message_to_look_up_is_in_the_code() -> None:
    section = README.partition("## When something fails")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `` (.+?) `` \|", section, re.MULTILINE)
    said = "\n".join(text for path in (ROOT / "opd_jax").rglob("*.py") for text in strings(path))
    assert len(messages) == 12  # and one each of JAX and XLA
    assert [m for m in messages if m not in said] == []


def test_the_table_of_keys_is_the_one_in_the_code() -> None:
    table = README[README.index("| key |") :].partition("\n\n")[0]
    assert table == keys.markdown()


def strings(path: Path) -> list[str]:
    """Every string literal of a file, with … in the place of what is put in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    formatted = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
    ]
    texts = [text for text in constants if isinstance(text, str)] + formatted
    return [re.sub("%[sd]", "…", text) for text in texts]

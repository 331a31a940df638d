"""The rule for what can be chosen or brought along: a known name, or `module:name`."""

import math
from pathlib import Path

import pytest

from opd_jax.runtime.by import check_arguments, find

KNOWN = {"root": "math:sqrt", "gone": "no_such_package:thing"}


def test_a_known_name_and_a_module_with_a_name_are_found() -> None:
    assert find("root", KNOWN, section="x") is math.sqrt
    assert find("math:floor", KNOWN, section="x") is math.floor


@pytest.mark.parametrize(
    ("by", "text"),
    [
        ("rot", "`x.by`: expected one of root, gone, or module:name; got 'rot'"),
        ("no_such_package:thing", "`x.by` = .*: there is no module `no_such_package`; install it"),
        ("math.no:thing", "there is no module `math.no`"),
        ("math:no", "`x.by` = 'math:no': module `math` has no `no`"),
    ],
)
def test_what_does_not_exist_is_named(by: str, text: str) -> None:
    with pytest.raises((ValueError, ModuleNotFoundError), match=text):
        find(by, KNOWN, section="x")


def test_what_a_module_lacks_itself_keeps_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    for by in ("needs_more:thing", "gone"):
        with pytest.raises(ModuleNotFoundError, match="no_such_package"):
            find(by, KNOWN, section="x")


def test_the_rest_of_a_section_is_compared_with_the_signature() -> None:
    def target(size: int, *, color: str = "red") -> None: ...

    def anything(size: int, **more: int) -> None: ...

    check_arguments("t", target, {"size": 1}, section="x")
    check_arguments("t", target, {"size": 1, "color": "blue"}, section="x")
    check_arguments("t", anything, {"size": 1, "whatever": 1}, section="x")
    with pytest.raises(ValueError, match=r"`x.size` is missing; it takes size, \*\*more"):
        check_arguments("t", anything, {"whatever": 1}, section="x")
    wrong = "`x.by` = 't' .*`x.colour` is none of its fields, `x.size` is missing; .* size, color"
    with pytest.raises(ValueError, match=wrong):
        check_arguments("t", target, {"colour": "blue"}, section="x")


def test_another_field_of_the_section_can_name_what_is_brought_along() -> None:
    with pytest.raises(ValueError, match=r"`x\.make`: expected module:name; got 'sqrt'"):
        find("sqrt", {}, section="x", field="make")
    with pytest.raises(ValueError, match=r"`x\.make` = 'math:no': module"):
        find("math:no", {}, section="x", field="make")
    with pytest.raises(ValueError, match=r"`x\.make` = 'm:f' does not fit .*`x.a` is none"):
        check_arguments("m:f", lambda: None, {"a": 1}, section="x", field="make")

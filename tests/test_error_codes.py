"""Error codes are documented, well formed, and separate from those of HTTP."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runtime.core.errors import CheckFailed, DeviceError, FeatureError, GroundingError, QueryError
from tests.error_codes import ROOT, error_codes

TABLE = re.compile(r"^\| `(\w+)` \| .+ \|$", re.MULTILINE)


def test_error_codes_and_documentation_match() -> None:
    documented = TABLE.findall((ROOT / "docs" / "error-codes.md").read_text())
    in_source = error_codes()
    assert documented == sorted(documented), "the table is sorted"
    assert len(documented) == len(set(documented))
    assert {code: locations for code, locations in in_source.items() if code not in documented} == {}
    assert set(documented) - set(in_source) == set()


def test_codes_are_identifiers_in_snake_case() -> None:
    assert not [code for code in error_codes() if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)+", code)]


def test_error_codes_reads_every_form(tmp_path: Path) -> None:
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "a.py").write_text(
        'B = "of_constant"\n'
        "class E(Exception):\n"
        '    code = "of_class"\n'
        'def f(x):\n    code = "of_variable"\n    raise E("", code=code)\n'
        'raise E("", code=B)\nraise E("", code="left" if x else "right")\nraise Refusal(4, code="http")\n'
    )
    assert set(error_codes(tmp_path)) == {"of_constant", "of_class", "of_variable", "left", "right"}
    (tmp_path / "runtime" / "a.py").write_text('raise E("", code=f"{x}")')
    with pytest.raises(AssertionError):
        error_codes(tmp_path)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueryError, 422, "invalid_query"),
        (FeatureError, 422, "invalid"),
        (GroundingError, 422, "invalid"),
        (DeviceError, 503, "unavailable"),
    ],
)
def test_http_codes_depend_only_on_the_error_class(error: type[GroundingError], status: int, code: str) -> None:
    from runtime.service.http_errors import to_http_error

    for problem in (error("x"), error("x", code="anything_else")):
        refusal = to_http_error(problem)
        assert (refusal.status, refusal.code) == (status, code)


def test_failed_check_has_a_code() -> None:
    assert (CheckFailed("x").code, CheckFailed("x", code="parity_failed").code) == ("check_failed", "parity_failed")

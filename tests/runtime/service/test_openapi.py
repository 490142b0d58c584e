"""Fuzz the HTTP API from its OpenAPI document: no generated request gets a 5xx response."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.runtime.service.conftest import Running

schemathesis = pytest.importorskip("schemathesis", reason="Schemathesis generates these requests")
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402 - after it is known to be there

EXAMPLES = 40
OPERATIONS = (
    ("POST", "/v1/ground"),
    ("GET", "/v1/videos"),
    ("POST", "/v1/videos"),
    ("GET", "/v1/videos/{video}"),
    ("DELETE", "/v1/videos/{video}"),
    ("GET", "/v1/videos/{video}/media"),
    ("GET", "/v1/videos/{video}/clip"),
    ("GET", "/v1/examples"),
    ("GET", "/v1/model"),
    ("GET", "/v1/words"),
    ("GET", "/healthz"),
    ("GET", "/metrics"),
)


@pytest.fixture(scope="module")
def document(service: Running) -> Any:
    return schemathesis.openapi.from_url(f"{service.url}openapi.json")


def test_all_openapi_operations_are_fuzzed(document: Any) -> None:
    actual = {(actual.ok().method.upper(), actual.ok().path) for actual in document.get_all_operations()}
    assert actual == set(OPERATIONS)


# Any text is a name, so a path cannot be malformed.
MODES = [(*operation, schemathesis.GenerationMode.POSITIVE) for operation in OPERATIONS] + [
    (*operation, schemathesis.GenerationMode.NEGATIVE) for operation in OPERATIONS[:3]
]


@pytest.mark.parametrize(("method", "path", "mode"), MODES)
def test_generated_requests_do_not_break_the_service(document: Any, method: str, path: str, mode: Any) -> None:
    operation = document[path][method]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        # Checks server errors, undocumented statuses and types, schemas of responses, and accepted invalid requests.
        # Valid requests may be rejected, because the schema does not contain the vocabulary or the content of files.
        case.call_and_validate(timeout=20, excluded_checks=[positive_data_acceptance])

    ask()

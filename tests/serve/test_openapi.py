"""schemathesis over the OpenAPI document: whatever it thinks of, no 5xx."""

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

schemathesis = pytest.importorskip("schemathesis")


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_of_the_document_or_beside_it_gives_5xx(url, mode):
    from schemathesis.checks import not_a_server_error
    from schemathesis.generation import GenerationMode

    schema = schemathesis.openapi.from_dict(httpx.get(f"{url}/openapi.json").json())
    asked = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=12,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            database=None,
            derandomize=True,
        )
        @given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
        def check(case):
            nonlocal asked
            if isinstance(case.body, dict) and case.operation.path.endswith("completions"):
                case.body["max_tokens"] = 3 if mode == "positive" else case.body.get("max_tokens", 3)
                case.body["model"] = "tiny"
            response = case.call(base_url=url, timeout=30)
            asked += 1
            assert response.status_code < 500, (case.as_curl_command(), response.text)
            case.validate_response(response, checks=[not_a_server_error])

        try:
            check()
        except Unsatisfiable:  # nothing can be wrong about a GET without parameters
            assert operation.method.upper() == "GET"
    assert asked >= 40
    assert httpx.get(f"{url}/ready").status_code == 200

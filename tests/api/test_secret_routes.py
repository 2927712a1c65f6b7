"""`/secrets` is refused by name, to the SDK and over plain HTTP; no value is told again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from api_service import ApiService, listening
from e2b import Secret
from e2b.exceptions import SecretException
from falcon import testing

VALUE = "hunter2-of-the-team"
CALLS: tuple[Callable[[], object], ...] = (
    lambda: Secret.create("name", VALUE),
    lambda: Secret.update("name", VALUE),
    lambda: Secret.get_info("name"),
    lambda: Secret.destroy("name"),
    lambda: Secret.list().next_items(),
)


@pytest.mark.parametrize("call", CALLS)
def test_the_sdk_is_told_what_is_missing(
    service: ApiService, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]
) -> None:
    with listening(service.app) as address:
        monkeypatch.setenv("E2B_API_URL", f"http://{address}")
        monkeypatch.setenv("E2B_API_KEY", service.key)
        with pytest.raises(SecretException, match="501: this server does not have secrets") as told:
            call()
    assert VALUE not in str(told.value)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[("GET", "/secrets"), ("POST", "/secrets"), ("GET", "/secrets/a")],
        *[("POST", "/secrets/a"), ("DELETE", "/secrets/a")],
    ],
)
def test_each_route_answers_501_once_and_for_all(
    service: ApiService, method: str, path: str
) -> None:
    answer = testing.TestClient(service.app).simulate_request(
        method, path, headers={"X-API-KEY": service.key}, body=f'{{"value": "{VALUE}"'
    )
    assert answer.status_code == 501
    assert answer.json["message"].startswith("this server does not have secrets: ")
    assert answer.headers["should-retry"] == "false"

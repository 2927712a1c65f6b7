"""Requests to the control plane in process, with a key."""

from __future__ import annotations

import json

from api_service import ApiService
from falcon import testing


class Client:
    """One team's client."""

    def __init__(self, service: ApiService, key: str | None = None) -> None:
        self._client = testing.TestClient(service.app)
        self.headers = {"X-API-KEY": key or service.key}

    def __call__(self, method: str, path: str, body: object = None, **options: object):
        if body is not None:
            options["body"] = body if isinstance(body, bytes) else json.dumps(body)
        headers = {**self.headers, **options.pop("headers", {})}
        return self._client.simulate_request(method, path, headers=headers, **options)

    def create(self, **body: object) -> dict:
        """The answer to a create of `base`."""
        answer = self("POST", "/v2/sandboxes", {"templateID": "base", **body})
        assert answer.status_code == 201, answer.text
        return answer.json


def assert_error(answer: testing.Result, status: int, *words: str) -> None:
    """E2B's error body with these words in it."""
    assert answer.status_code == status, answer.text
    assert answer.json["code"] == status
    for word in words:
        assert word in answer.json["message"]

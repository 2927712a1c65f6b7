"""`network` of a create and `PUT …/network`: what is taken, what is refused by name, what is told.

The rules' effect on packets is `test_sandbox_network.py`'s.
"""

from __future__ import annotations

import ipaddress

import pytest
from api_service import ApiService
from control_client import Client, assert_error
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcell_api.egress import MAX_RULES, OPEN, Egress, checked_egress
from vmcell_protos.errors import CallerError

FAST = settings(max_examples=150, deadline=None)
ADDRESS = st.integers(0, 2**32 - 1).map(lambda number: str(ipaddress.IPv4Address(number)))
CIDR = st.tuples(ADDRESS, st.integers(0, 32)).map(lambda pair: f"{pair[0]}/{pair[1]}")


@pytest.fixture
def client(service: ApiService) -> Client:
    return Client(service)


def test_rules_reach_the_node_and_are_told_again(service: ApiService, client: Client) -> None:
    made = client.create(
        network={"allowOut": ["1.1.1.1", "8.8.8.0/24"], "denyOut": ["0.0.0.0/0", "::/0"]}
    )
    assert made["trafficAccessToken"] is None
    rules = Egress(allow_out=("1.1.1.1", "8.8.8.0/24"), deny_out=("0.0.0.0/0", "::/0"))
    assert service.node.orders[0].egress == rules
    detail = client("GET", f"/sandboxes/{made['sandboxID']}").json
    assert detail["network"] == {
        "allowOut": ["1.1.1.1", "8.8.8.0/24"],
        "denyOut": ["0.0.0.0/0", "::/0"],
        "allowPublicTraffic": True,
    }
    assert detail["allowInternetAccess"] is True
    assert detail["lifecycle"] == {"autoResume": False, "onTimeout": "kill"}


def test_private_traffic_gets_a_token_that_stays(service: ApiService, client: Client) -> None:
    made = client.create(network={"allowPublicTraffic": False})
    token = made["trafficAccessToken"]
    assert len(token) == 64
    assert token != made["envdAccessToken"]
    sandbox_id = made["sandboxID"]
    again = client("POST", f"/v2/sandboxes/{sandbox_id}/connect", {})
    assert again.json["trafficAccessToken"] == token
    team = service.store.ensure_team("team-one")
    record = service.store.sandbox(sandbox_id, team_id=team.team_id)
    assert record is not None
    assert record.traffic_token == token
    detail = client("GET", f"/sandboxes/{sandbox_id}").json
    assert detail["network"]["allowPublicTraffic"] is False
    assert token not in str(detail), "only who creates or connects gets it"


def test_private_traffic_of_version_1_needs_secure(client: Client) -> None:
    body = {"templateID": "base", "network": {"allowPublicTraffic": False}}
    assert_error(client("POST", "/sandboxes", body), 400, "secure")
    answer = client("POST", "/sandboxes", {**body, "secure": True})
    assert answer.json["trafficAccessToken"]


def test_an_update_replaces_all(service: ApiService, client: Client) -> None:
    sandbox_id = client.create(
        allow_internet_access=False, network={"allowOut": ["1.1.1.1"], "denyOut": ["9.9.9.9"]}
    )["sandboxID"]
    path = f"/sandboxes/{sandbox_id}/network"
    assert client("PUT", path, {"denyOut": ["8.8.8.8"]}).status_code == 204
    assert service.node.running[sandbox_id].egress == Egress(deny_out=("8.8.8.8",))
    assert client("PUT", path, {"allowInternetAccess": False}).status_code == 204
    assert client("GET", f"/sandboxes/{sandbox_id}").json["allowInternetAccess"] is False
    assert client("PUT", path, {}).status_code == 204
    assert service.node.running[sandbox_id].egress == OPEN
    unknown = "i" + "0" * 19
    assert_error(client("PUT", f"/sandboxes/{unknown}/network", {}), 404)
    stranger = Client(service, service.new_key("team-two"))
    assert_error(stranger("PUT", path, {"denyOut": ["0.0.0.0/0"]}), 404)
    assert service.node.running[sandbox_id].egress == OPEN


WRONG = [
    ({"allowOut": ["example.com"]}, ("allowOut", "example.com", "domain")),
    ({"allowOut": ["*.example.com"]}, ("allowOut", "*.example.com")),
    ({"denyOut": ["example.com"]}, ("denyOut", "example.com")),
    ({"allowOut": ["10.0.0.0/8"]}, ("allowOut", "10.0.0.0/8", "private")),
    ({"allowOut": ["169.254.169.254"]}, ("allowOut", "169.254.169.254")),
    ({"allowOut": ["2001:db8::/32"]}, ("allowOut", "IPv6")),
    ({"allowOut": ["1.1.1.1/33"]}, ("allowOut", "1.1.1.1/33")),
    ({"denyOut": [""]}, ("denyOut",)),
    ({"denyOut": [7]}, ("denyOut", "7")),
    ({"denyOut": "0.0.0.0/0"}, ("denyOut", "list")),
    ({"denyOut": ["1.1.1.1"] * (MAX_RULES + 1)}, ("denyOut", str(MAX_RULES))),
    ({"dnsServers": ["9.9.9.9"]}, ("dnsServers",)),
    ({"egressProxy": {"address": "1.2.3.4:1080"}}, ("egressProxy",)),
    ({"rules": {"example.com": [{}]}}, ("rules",)),
    ({"rules": [{"name": "x"}]}, ("rules",)),
    ({"maskRequestHost": "x"}, ("maskRequestHost",)),
    ({"httpsPorts": [8443]}, ("httpsPorts",)),
]


@pytest.mark.parametrize(("network", "words"), WRONG)
def test_what_cannot_be_enforced_is_refused_by_name(
    service: ApiService, client: Client, network: dict[str, object], words: tuple[str, ...]
) -> None:
    body = {"templateID": "base", "network": network}
    assert_error(client("POST", "/v2/sandboxes", body), 400, *words)
    assert not service.node.orders
    sandbox_id = client.create()["sandboxID"]
    assert_error(client("PUT", f"/sandboxes/{sandbox_id}/network", network), 400, *words)
    assert service.node.running[sandbox_id].egress == OPEN


@pytest.mark.parametrize(
    "body",
    [
        {"network": []},
        {"network": {"allowPublicTraffic": "no"}},
        {"allow_internet_access": True, "allowInternetAccess": False},
    ],
)
def test_other_bad_networks(client: Client, body: dict[str, object]) -> None:
    assert_error(client("POST", "/v2/sandboxes", {"templateID": "base", **body}), 400)


def test_public_traffic_cannot_be_changed_later(client: Client) -> None:
    sandbox_id = client.create()["sandboxID"]
    answer = client("PUT", f"/sandboxes/{sandbox_id}/network", {"allowPublicTraffic": False})
    assert_error(answer, 400, "allowPublicTraffic")


@FAST
@given(st.booleans(), st.lists(CIDR, max_size=5), st.lists(CIDR, max_size=5), ADDRESS)
def test_an_allowed_address_beats_a_denied_one(
    internet: bool, allow: list[str], deny: list[str], address: str
) -> None:
    rules = Egress(allow_internet=internet, allow_out=tuple(allow), deny_out=tuple(deny))
    target = ipaddress.IPv4Address(address)

    def among(entries: list[str]) -> bool:
        return any(target in ipaddress.IPv4Network(entry, strict=False) for entry in entries)

    assert rules.permits(address) == (among(allow) or (internet and not among(deny)))
    if rules.is_open:
        assert rules.permits(address)
    if rules.is_closed:
        assert not rules.permits(address)


@FAST
@given(st.lists(st.text(max_size=30) | CIDR, max_size=4))
def test_any_entries_are_taken_or_refused(entries: list[str]) -> None:
    try:
        rules = checked_egress(allow_internet=True, allow_out=entries, deny_out=entries)
    except CallerError as error:
        refusal = error
    else:
        assert rules.allowed() == rules.denied()
        return
    assert refusal.code == "invalid_argument"
    assert len(str(refusal)) < 400

"""What the control plane reads of a client: JSON bodies, queries, the host names of the data plane.

Faces anybody. What comes out is a record within its bounds, or CallerError; where a data-plane
request goes is decided without an exception, and never to an internal path of envd.
"""

from __future__ import annotations

import re

from json_input import expand
from supply import Supply

from vmcell_api import data_route, network_rules, page_cursor, sandbox_bodies, template_bodies
from vmcell_api.json_body import parse_json
from vmcell_api.node import image_json, oci_image
from vmcell_protos.errors import CallerError

ALLOWED: tuple[type[Exception], ...] = (CallerError,)
REACHES = (
    "vmcell_api.data_route:check_traffic_token",
    "vmcell_api.data_route:signing_token",
    "vmcell_api.sandbox_bodies:parse_create",
    "vmcell_api.page_cursor:decode_cursor",
    "vmcell_api.sandbox_bodies:_unix_ms",
    "vmcell_api.template_bodies:_step",
    "vmcell_api.egress:_ipv4",
    "vmcell_api.node.image_json:write_config",
)
CREATE, TEMPLATE, QUERY, ROUTE, IMAGE = range(5)
MAX_TIMEOUT_S = 86400
DOMAIN = "sandbox.test"


def one(data: bytes) -> None:
    supply = Supply(data)
    mode = supply.byte() % 5
    rest = supply.rest()
    if mode == CREATE:
        body = parse_json(expand(rest))
        _create(body)
    elif mode == TEMPLATE:
        _template(parse_json(expand(rest)))
    elif mode == QUERY:
        _query(rest.decode("latin-1"))
    elif mode == ROUTE:
        _route(rest)
    else:
        _image(rest)


def _create(body: dict[str, object]) -> None:
    made = sandbox_bodies.parse_create(body, version=2, max_timeout_s=MAX_TIMEOUT_S)
    assert 1 <= made.timeout_s <= MAX_TIMEOUT_S
    assert all(str(network) for network in made.network.egress.allowed())
    network_rules.parse_network_update({"allowOut": list(made.network.egress.allow_out)})
    sandbox_bodies.parse_required_timeout(body, MAX_TIMEOUT_S)


def _template(body: dict[str, object]) -> None:
    parsers = (
        template_bodies.parse_template_request,
        template_bodies.parse_build_start,
        template_bodies.parse_tag_target,
        template_bodies.parse_tag_removal,
    )
    refusals = 0
    for parse in parsers:
        try:
            parse(body)
        except CallerError:
            refusals += 1
    if refusals == len(parsers):
        raise CallerError("none of the bodies")


def _query(text: str) -> None:
    query = sandbox_bodies.parse_list_query(text)
    assert 1 <= query.limit <= sandbox_bodies.MAX_PAGE
    assert query.after is None or page_cursor.encode_cursor(*query.after)
    template_bodies.parse_log_query(text)


def _route(data: bytes) -> None:
    rows = [*data.decode("latin-1").split("\n"), *[""] * 6]
    request = data_route.Request(
        method=rows[0],
        host=rows[1],
        uri=rows[2],
        id_header=rows[3],
        port_header=rows[4],
        traffic_token=rows[5],
    )
    found = data_route.find_target(request, DOMAIN)
    if isinstance(found, data_route.Target):
        assert re.fullmatch(r"[a-z0-9]{20}", found.sandbox_id)
        assert 1 <= found.port <= 65535
        path = request.uri.partition("?")[0].lower()
        assert found.port != data_route.ENVD_PORT or not path.startswith("/init")
        data_route.check_traffic_token(request, found, "secret")
    elif isinstance(found, data_route.Signed):
        data_route.signing_token(found, {"a": "t"})
    else:
        assert data_route.refusal_from_header(found.as_header()) == found
        raise CallerError(found.message)


def _image(data: bytes) -> None:
    manifest, _, config = expand(data).partition(b"\0")
    state = image_json.read_state(manifest, config, "image")
    written = image_json.write_config(state)
    assert oci_image.config_table(written, "image")[0] == state.diff_ids()
    oci_image.parse_config(config, "image")


def seeds() -> dict[str, bytes]:
    create = (
        b'{"templateID":"base","timeout":60,"metadata":{"a":"b"},"envVars":{"A":"b"},"secure":true,'
        b'"network":{"allowOut":["1.1.1.1","8.8.0.0/16"],"denyOut":["0.0.0.0/0"],'
        b'"allowPublicTraffic":false},"autoPause":true,"lifecycle":{"onTimeout":"pause"}}'
    )
    template = (
        b'{"name":"mine:v1","tags":["a","b"],"cpuCount":2,"memoryMB":512,"fromImage":"python:3.13",'
        b'"startCmd":"sleep 1","steps":[{"type":"RUN","args":["true"]},'
        b'{"type":"ENV","args":["A","b"]}],"target":"mine"}'
    )
    digest = b"sha256:" + b"ab" * 32
    manifest = b'{"layers":[{"digest":"%b","size":5,"mediaType":"m"}]}' % digest
    config = b'{"rootfs":{"diff_ids":["%b"]},"config":{"Env":["A=b"],"User":"u"}}' % digest
    box = "i" + "0" * 19
    token = page_cursor.encode_cursor(1700000000000, "a" * 20)
    return {
        "create": b"\0" + create,
        "template": b"\x01" + template,
        "query": f"\x02state=running,paused&metadata=a%3Db&limit=5&nextToken={token}".encode(),
        "started-after": b"\x02startedAfter=2026-01-01T00:00:00Z&order=asc&logsOffset=3&limit=7",
        "host": f"\x03GET\n49983-{box}.{DOMAIN}:443\n/files?path=a\n\n\nt".encode(),
        "headers": f"\x03POST\nx\n/process.Process/Start\n{box}\n8080".encode(),
        "signed": b"\x03GET\nx\n/files?path=/a&signature=v1_b&username=u&signature_expiration=9",
        "image": b"\x04" + manifest + b"\0" + config,
    }

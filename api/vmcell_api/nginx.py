"""nginx in front of the sandboxes and the API: its configuration as text.

Two servers listen on the same addresses. The one of sandboxes puts every request to the route
application first (`auth_request`); what it answers is the upstream, or the refusal. The other, for
the host name `api.<domain>`, passes to the API, so that clients need to know the domain alone.

What keeps tenants apart here: the upstream's address comes from the route application only, which
is told the few headers it needs and no others; a guest's `X-Accel-…` headers, with which an
upstream steers nginx, mean nothing; nothing is cached or kept in files. The platform's own
credentials end here: `X-API-Key`, bearer tokens of the form of our keys, and traffic tokens; Basic
authorisation and `X-Access-Token` are envd's and pass. Only severe errors are logged, because
nginx's lesser ones quote the request line, which may carry a signature.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Template

# From this version on `http2` is a directive; before, a word of `listen` (nginx's CHANGES, 1.25.1).
HTTP2_DIRECTIVE = (1, 25, 1)


@dataclass(frozen=True, kw_only=True)
class Tls:
    """`listen` is "address:port"; the files are PEM, read by nginx's master as root."""

    listen: str
    certificate: str
    key: str


@dataclass(frozen=True, kw_only=True)
class NginxPlan:
    """`folder` holds the pid file and temporary files; `user` "": nginx does not change it.

    `domain` is a host name without a port; "": the API has no host name and is not served here.
    `volumes` is the address of the server of volume files; "": the API has none.
    `version` is that of the nginx which will read the text.
    """

    listen: str
    route_socket: str
    folder: str
    user: str = ""
    domain: str = ""
    api: str = "127.0.0.1:3000"
    volumes: str = ""
    tls: Tls | None = None
    version: tuple[int, ...] = (1, 22, 1)


_MAIN = Template(
    """\
# Written by vmcell; change /etc/vmcell/api.toml instead.
daemon off;
$user_line
pid $folder/nginx.pid;
worker_processes auto;
error_log stderr crit;
events { worker_connections 8192; }
http {
  access_log off;
  server_tokens off;
  client_body_temp_path $folder/body;
  proxy_temp_path $folder/proxy;
  fastcgi_temp_path $folder/fastcgi;
  uwsgi_temp_path $folder/uwsgi;
  scgi_temp_path $folder/scgi;
  large_client_header_buffers 8 32k;
  map $$http_upgrade $$guest_connection { default upgrade; "" close; }
  map $$http_authorization $$guest_authorization {
    default $$http_authorization;
    "~*^bearer\\s+(sk_)?e2b_" "";
  }
  # A request that the API never saw may be sent again; of the others only reads.
  map "$$upstream_connect_time $$request_method" $$api_retry {
    default "false";
    "~^- " "true";
    "~ (GET|HEAD|OPTIONS)$$" "true";
  }
  map $$api_retry $$api_pause { "true" 1; default ""; }
  upstream vmcell_route {
    server unix:$route_socket;
    keepalive 16;
  }
  # Clients keep idle connections for 300 s; the server must not be the first to close.
  keepalive_timeout 620s;
  keepalive_requests 1000000;
  keepalive_time 1d;
  client_max_body_size 0;
  client_body_timeout 1d;
  send_timeout 1d;
  merge_slashes off;
  proxy_http_version 1.1;
  proxy_buffering off;
  proxy_request_buffering off;
  proxy_max_temp_file_size 0;
  proxy_next_upstream off;
  proxy_connect_timeout 5s;
  proxy_ignore_headers X-Accel-Redirect X-Accel-Expires X-Accel-Limit-Rate X-Accel-Buffering
    X-Accel-Charset Expires Cache-Control Set-Cookie Vary;
  # The answer to a failed request may itself fail, when the router is down.
  recursive_error_pages on;
$tls
  server {
    listen $listen default_server;
$tls_listen_default
    server_name _;

    location / {
      auth_request /.vmcell/route;
      auth_request_set $$guest $$upstream_http_x_vmcell_upstream;
      auth_request_set $$refusal $$upstream_http_x_vmcell_refusal;
      # The guest's own errors pass; these are nginx's.
      error_page 401 403 = @refused;
      error_page 502 504 = @unreachable;
      error_page 500 = @broken;
      proxy_pass http://$$guest;
      proxy_read_timeout 1d;
      proxy_send_timeout 1d;
      proxy_socket_keepalive on;
      proxy_set_header Host $$http_host;
      proxy_set_header Upgrade $$http_upgrade;
      proxy_set_header Connection $$guest_connection;
      proxy_set_header Authorization $$guest_authorization;
      proxy_set_header X-API-Key "";
      proxy_set_header E2B-Traffic-Access-Token "";
    }
    location = /.vmcell/route {
      internal;
      proxy_pass http://vmcell_route/route;
$question
    }
    location @refused {
      error_page 502 504 = @broken;
      rewrite ^ /refused? break;
      proxy_pass http://vmcell_route;
$question
      proxy_set_header X-Vmcell-Refusal $$refusal;
    }
    location @unreachable {
      error_page 502 504 = @broken;
      rewrite ^ /unreachable? break;
      proxy_pass http://vmcell_route;
$question
    }
    location @broken {
      default_type application/json;
      add_header Retry-After 1 always;
      add_header Access-Control-Allow-Origin * always;
      return 503 '{"code": 503, "message": "the sandbox router does not answer; try again"}';
    }
  }
$api_server
}
"""
)

_TLS = Template(
    """\
  ssl_certificate $certificate;
  ssl_certificate_key $key;
  ssl_protocols TLSv1.2 TLSv1.3;
  ssl_session_cache shared:vmcell:1m;
  ssl_session_tickets off;
  http2_max_concurrent_streams 256;
  http2_body_preread_size 256k;
"""
)

# SDKs look for the files of volumes at the API's own name.
_VOLUMES = Template("    location /volumecontent/ { proxy_pass http://$address; }")

_API_SERVER = Template(
    """\
  upstream vmcell_api {
    server $api;
    keepalive 16;
  }
  server {
    listen $listen;
$tls_listen
    server_name api.$domain;

    error_page 502 504 = @api_down;
    proxy_read_timeout 600s;
    proxy_send_timeout 600s;
    proxy_set_header Host $$http_host;
    proxy_set_header Connection "";
    location / { proxy_pass http://vmcell_api; }
$volumes
    location @api_down {
      default_type application/json;
      add_header Should-Retry $$api_retry always;
      add_header Retry-After $$api_pause always;
      add_header Access-Control-Allow-Origin * always;
      return 503 '{"code": 503, "message": "the API does not answer; try again in a moment"}';
    }
  }
"""
)

# No other header of the client reaches the route application.
_QUESTION = """\
      proxy_method GET;
      proxy_pass_request_body off;
      proxy_pass_request_headers off;
      proxy_set_header Connection "";
      proxy_set_header Content-Length "";
      proxy_set_header Host route;
      proxy_set_header X-Original-Host $http_host;
      proxy_set_header X-Original-Uri $request_uri;
      proxy_set_header X-Original-Method $request_method;
      proxy_set_header X-Original-Client $remote_addr;
      proxy_set_header E2b-Sandbox-Id $http_e2b_sandbox_id;
      proxy_set_header E2b-Sandbox-Port $http_e2b_sandbox_port;
      proxy_set_header E2b-Traffic-Access-Token $http_e2b_traffic_access_token;
      proxy_set_header Accept $http_accept;
      proxy_set_header Sec-Fetch-Mode $http_sec_fetch_mode;
      proxy_set_header Access-Control-Request-Method $http_access_control_request_method;
      proxy_set_header Access-Control-Request-Headers $http_access_control_request_headers;"""


def render(plan: NginxPlan) -> str:
    """The configuration file."""
    api_server = ""
    if plan.domain:
        api_server = _API_SERVER.substitute(
            api=plan.api,
            listen=plan.listen,
            tls_listen=_tls_listen(plan, ""),
            domain=plan.domain,
            volumes=_VOLUMES.substitute(address=plan.volumes) if plan.volumes else "",
        )
    return _MAIN.substitute(
        user_line=f"user {plan.user};" if plan.user else "",
        folder=plan.folder,
        route_socket=plan.route_socket,
        listen=plan.listen,
        question=_QUESTION,
        tls=_tls(plan),
        tls_listen_default=_tls_listen(plan, " default_server"),
        api_server=api_server,
    )


def _tls(plan: NginxPlan) -> str:
    if plan.tls is None:
        return ""
    text = _TLS.substitute(certificate=plan.tls.certificate, key=plan.tls.key)
    return text + ("  http2 on;\n" if plan.version >= HTTP2_DIRECTIVE else "")


def _tls_listen(plan: NginxPlan, suffix: str) -> str:
    if plan.tls is None:
        return ""
    http2 = "" if plan.version >= HTTP2_DIRECTIVE else " http2"
    return f"    listen {plan.tls.listen} ssl{http2}{suffix};"

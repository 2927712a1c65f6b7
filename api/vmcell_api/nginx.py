"""nginx in front of the sandboxes: its configuration as text.

Every request is put to the route application first (`auth_request`); what it answers is the
upstream. Nothing is buffered, because streams of commands and files pass. The platform's own
credentials end here: `X-API-Key`, bearer tokens of the form of our keys, and traffic tokens; Basic
authorisation and `X-Access-Token` are envd's and pass. Only severe errors are logged, because
nginx's lesser ones quote the request line, which may carry a signature.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Template


@dataclass(frozen=True, kw_only=True)
class NginxPlan:
    """`folder` holds the pid file and temporary files; `user` "": nginx does not change it."""

    listen: str
    route_socket: str
    folder: str
    user: str = ""


_TEMPLATE = Template(
    """\
# Written by vmcell at every start; change /etc/vmcell/api.toml instead.
daemon off;
$user_line
pid $folder/nginx.pid;
worker_processes 2;
error_log stderr crit;
events { worker_connections 4096; }
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
  upstream vmcell_route {
    server unix:$route_socket;
    keepalive 16;
  }
  server {
    listen $listen;
    server_name _;
    # Clients keep idle connections for 300 s; the server must not be the first to close.
    keepalive_timeout 620s;
    client_max_body_size 0;
    client_body_timeout 1d;
    send_timeout 1d;
    merge_slashes off;

    location / {
      auth_request /.vmcell/route;
      auth_request_set $$guest $$upstream_http_x_vmcell_upstream;
      # The guest's own errors pass; these are nginx's.
      error_page 401 403 = @refused;
      error_page 502 504 = @unreachable;
      error_page 500 = @broken;
      proxy_pass http://$$guest;
      proxy_http_version 1.1;
      proxy_buffering off;
      proxy_request_buffering off;
      proxy_max_temp_file_size 0;
      proxy_next_upstream off;
      proxy_connect_timeout 5s;
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
      rewrite ^ /refused break;
      proxy_pass http://vmcell_route;
$question
    }
    location @unreachable {
      rewrite ^ /unreachable break;
      proxy_pass http://vmcell_route;
$question
    }
    location @broken {
      default_type application/json;
      return 503 '{"code": 503, "message": "the sandbox router does not answer; try again"}';
    }
  }
}
"""
)

_QUESTION = """\
      proxy_method GET;
      proxy_pass_request_body off;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Content-Length "";
      proxy_set_header Content-Type "";
      proxy_set_header Authorization "";
      proxy_set_header X-API-Key "";
      proxy_set_header Host route;
      proxy_set_header X-Original-Host $http_host;
      proxy_set_header X-Original-Uri $request_uri;
      proxy_set_header X-Original-Method $request_method;
      proxy_set_header X-Original-Client $remote_addr;"""


def render(plan: NginxPlan) -> str:
    """The configuration file."""
    return _TEMPLATE.substitute(
        user_line=f"user {plan.user};" if plan.user else "",
        folder=plan.folder,
        route_socket=plan.route_socket,
        listen=plan.listen,
        question=_QUESTION,
    )

"""The service's settings: /etc/vmcell/api.toml, or the file VMCELL_API_CONFIG names.

Every key has a default, so the file may be missing. VMCELL_DATABASE_URL overrides `database_url`.
The shim reads a file of its own (config.toml) and never this one.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from dataclasses import dataclass, fields, replace

from vmcell_protos.errors import HostError

DEFAULT_PATH = "/etc/vmcell/api.toml"
_KINDS = {int: "a whole number", str: "a text", bool: "true or false", tuple: "a list of texts"}
_LABEL = "[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_DOMAIN = re.compile(rf"{_LABEL}(\.{_LABEL})*(:[0-9]{{1,5}})?")
_BIND = re.compile(r"([0-9A-Za-z.-]*|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}")
_PATH = re.compile(r"/[\w.+@%=:,/-]+")


@dataclass(frozen=True, kw_only=True)
class ApiConfig:
    """`*_bind` are "address:port" of TCP sockets, `*_socket` absolute paths of unix sockets.

    `domain`: host names of the data plane are `<port>-<id>.<domain>`, that of the API
    `api.<domain>`; it may end in `:port` where clients use another than 443; "": any domain does.
    `tls_certificate`, `tls_key`: PEM files for nginx, for `<domain>`'s wildcard; "": no TLS.
    `slot_network`: IPv4 network that is cut into /31 pairs, one per sandbox slot.
    `api_uid`: the user the API runs as; it needs no entry in /etc/passwd.
    `max_timeout_s` is what a create or timeout may ask for; `allow_no_end`: or, by -1, for no end.
    `disk_mib` is told to clients; it is the shim's `writable_mib`.
    `requests_per_s`, `max_timeout_s`: for every team that has no limit of its own.
    `audit_days`, `audit_rows`: how long, and how many, entries of the audit are kept.
    `metrics_dir` is where the API's workers count, for Prometheus.
    `metrics_interval_s`: how often noded asks each sandbox what it uses; 0: never.
    `api_url`: how clients reach the API, for the links it hands out; "": as they just did.
    `upload_dir` holds what clients upload for templates, `build_dir` the logs of builds;
    `build_cache_limit` is a number of steps, `build_places` of builds at once.
    `volumes_dir`: where volumes are; on a file system of its own it bounds what they take together.
    `snapshot_dir`: where shims write snapshots; the same as in the shim's configuration.
    `undo_minutes`: how long what was before a rollback is kept.
    `template_snapshots`: how many templates are restored instead of booted; 0: none.
    `pool`: "template=number" of sandboxes that are restored ahead and wait for a create.
    `volume_bind` and `volume_uid` are the address and the user of the server of their files.
    `start_timeout_s`: how long a sandbox may take from its task's creation to envd's answer.
    """

    api_bind: str = "127.0.0.1:3000"
    data_bind: str = "127.0.0.1:3080"
    domain: str = ""
    tls_bind: str = "127.0.0.1:443"
    tls_certificate: str = ""
    tls_key: str = ""
    database_url: str = "sqlite:////var/lib/vmcell/api/api.sqlite"
    api_uid: int = 99001
    node_socket: str = "/run/vmcell/noded.sock"
    route_socket: str = "/run/vmcell/route.sock"
    nginx_dir: str = "/run/vmcell/nginx"
    nginx_user: str = "www-data"
    containerd_socket: str = "/run/containerd/containerd.sock"
    containerd_namespace: str = "vmcell"
    snapshotter: str = "overlayfs"
    runtime: str = "io.containerd.vmcell.v2"
    state_dir: str = "/run/vmcell"
    slot_count: int = 32
    slot_network: str = "10.88.0.0/16"
    nameservers: tuple[str, ...] = ("8.8.8.8", "1.1.1.1")
    default_user: str = "user"
    start_timeout_s: int = 120
    max_timeout_s: int = 86400
    allow_no_end: bool = True
    metrics_interval_s: int = 5
    disk_mib: int = 10240
    api_url: str = ""
    upload_dir: str = "/var/lib/vmcell/api/uploads"
    max_upload_mib: int = 1024
    build_dir: str = "/var/lib/vmcell/builds"
    build_places: int = 2
    build_timeout_s: int = 3600
    build_cache_limit: int = 256
    volumes_dir: str = "/var/lib/vmcell/volumes"
    snapshot_dir: str = "/var/lib/vmcell/snapshots"
    snapshots_per_team: int = 100
    undo_minutes: int = 60
    template_snapshots: int = 16
    pool: tuple[str, ...] = ()
    volume_bind: str = "127.0.0.1:3001"
    volume_uid: int = 99002
    volumes_per_team: int = 100
    workers: int = 2
    threads: int = 16
    requests_per_s: int = 100
    audit_days: int = 90
    audit_rows: int = 100_000
    log_format: str = "text"
    metrics_dir: str = "/run/vmcell/metrics"

    @property
    def pool_sizes(self) -> dict[str, int]:
        """`pool` by template; raises HostError."""
        sizes = {}
        for row in self.pool:
            template, sign, number = row.rpartition("=")
            if not sign or not template or not (number.isascii() and number.isdigit()):
                raise HostError(f'pool has {row!r}; it takes "template=number", as in "base=2"')
            sizes[template] = int(number)
        if sum(sizes.values()) > self.slot_count:
            raise HostError(
                f"pool asks for {sum(sizes.values())} sandboxes; slot_count is {self.slot_count}"
            )
        return sizes

    def __post_init__(self) -> None:
        _check_ingress(self)
        for name in ("api_bind", "data_bind", "tls_bind", "volume_bind"):
            _, colon, port = getattr(self, name).rpartition(":")
            if not colon or not port.isdigit() or not 0 < int(port) < 65536:
                raise HostError(f"{name} is {getattr(self, name)!r}; it takes ADDRESS:PORT")
        if self.log_format not in ("text", "json"):
            raise HostError(f"log_format is {self.log_format!r}; it takes text or json")
        for name in (
            *("slot_count", "start_timeout_s", "max_timeout_s", "workers", "threads"),
            *("requests_per_s", "audit_days", "audit_rows"),
            *("snapshots_per_team", "undo_minutes"),
            *("max_upload_mib", "build_places", "build_timeout_s", "build_cache_limit"),
        ):
            if getattr(self, name) < 1:
                raise HostError(f"{name} is {getattr(self, name)}; it takes a number above 0")
        if self.pool_sizes and not self.template_snapshots:
            raise HostError("pool needs template_snapshots above 0: it holds restored sandboxes")
        if self.template_snapshots < 0:
            raise HostError(f"template_snapshots is {self.template_snapshots}; 0 turns them off")
        if self.metrics_interval_s < 0:
            raise HostError(f"metrics_interval_s is {self.metrics_interval_s}; 0 turns them off")
        try:
            network = ipaddress.IPv4Network(self.slot_network)
            for address in self.nameservers:
                ipaddress.IPv4Address(address)
        except ValueError as error:
            raise HostError(f"slot_network or nameservers: {error}; give IPv4 addresses") from error
        if network.num_addresses // 2 - 1 < self.slot_count:
            raise HostError(
                f"slot_network {network} is too small for {self.slot_count} pairs of addresses; "
                "give a larger network or a smaller slot_count"
            )


def _check_ingress(config: ApiConfig) -> None:
    """These words go into nginx's configuration as they stand, so each has to be a plain one."""
    if config.domain and not _DOMAIN.fullmatch(config.domain):
        raise HostError(f"domain is {config.domain!r}; give a name like sbx.example, or name:port")
    for name in ("data_bind", "tls_bind", "api_bind"):
        if not _BIND.fullmatch(value := getattr(config, name)):
            raise HostError(f"{name} is {value!r}; it takes ADDRESS:PORT")
    for name in ("tls_certificate", "tls_key", "nginx_dir", "route_socket"):
        value = getattr(config, name)
        if value and not _PATH.fullmatch(value):
            raise HostError(f"{name} is {value!r}; give an absolute path without blanks or quotes")
    if bool(config.tls_certificate) != bool(config.tls_key):
        raise HostError("tls_certificate and tls_key belong together; give both or neither")
    if config.tls_certificate and not config.domain:
        raise HostError("TLS needs a domain; set domain to the one the certificate is for")


def load_config() -> ApiConfig:
    """The settings of this host; raises HostError for an unreadable file or an unknown key."""
    path = os.environ.get("VMCELL_API_CONFIG")
    try:
        with open(path or DEFAULT_PATH, encoding="utf-8") as file:
            config = parse_config(file.read(), path or DEFAULT_PATH)
    except FileNotFoundError as error:
        if path:
            raise HostError(f"VMCELL_API_CONFIG names {path}, which does not exist") from error
        config = ApiConfig()
    except (OSError, UnicodeDecodeError) as error:
        raise HostError(f"cannot read {path or DEFAULT_PATH}: {error}") from error
    url = os.environ.get("VMCELL_DATABASE_URL")
    return replace(config, database_url=url) if url else config


def parse_config(text: str, path: str) -> ApiConfig:
    """The settings in `text`; `path` is for the error. Raises HostError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise HostError(f"{path} is not TOML: {error}; correct it there") from error
    kinds = {row.name: type(row.default) for row in fields(ApiConfig)}
    values: dict[str, object] = {}
    for name, value in table.items():
        if name not in kinds:
            raise HostError(f"{path}: key {name!r} is not known; known are {', '.join(kinds)}")
        if kinds[name] is tuple and isinstance(value, list):
            value = tuple(str(item) for item in value)
        if type(value) is not kinds[name]:
            raise HostError(f"{path}: {name} is {value!r}; it takes {_KINDS[kinds[name]]}")
        values[name] = value
    try:
        return ApiConfig(**values)  # type: ignore[arg-type]  # types checked against the defaults
    except HostError as error:
        raise HostError(f"{path}: {error}") from error

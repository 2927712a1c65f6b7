"""What an API key may do: scopes, and which scope each route needs.

A scope is `<resource>:read`, `<resource>:write` or `<resource>:*`; `*` stands for all resources,
`admin` for everything, the operators' routes included. `write` does not include `read`. GET and
HEAD read, all other methods write; the table says of which resource, and what it does not know is
for `admin` alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from vmcell_protos.errors import CallerError

RESOURCES = ("sandboxes", "templates", "volumes", "secrets", "team")
ADMIN, ALL_RESOURCES = "admin", "*"
SCOPES = (
    ALL_RESOURCES,
    ADMIN,
    *(f"{resource}:{verb}" for resource in RESOURCES for verb in ("read", "write", "*")),
)

# The first row whose path is the route's, or a folder of it, decides.
ROUTES = (
    ("/sandboxes", "sandboxes"),
    ("/v2/sandboxes", "sandboxes"),
    ("/snapshots", "sandboxes"),
    ("/templates", "templates"),
    ("/v2/templates", "templates"),
    ("/v3/templates", "templates"),
    ("/default-templates", "templates"),
    ("/volumes", "volumes"),
    ("/secrets", "secrets"),
    ("/teams", "team"),
    ("/vmcell/sandboxes", "sandboxes"),
    ("/vmcell/templates", "templates"),
    ("/vmcell/volumes", "volumes"),
    ("/vmcell", ADMIN),
    ("/metrics", ADMIN),
)
# By method, the beginning and the end of the route: a GET that answers where to upload.
WRITES = (("GET", "/templates/", "/files/"),)


def parse_scopes(words: Iterable[str]) -> tuple[str, ...]:
    """The scopes in `words`, sorted, each once; raises CallerError for what is none."""
    found = sorted({word.strip() for word in words if word.strip()})
    for word in found:
        if word not in SCOPES:
            raise CallerError(
                f"scopes has {word[:60]!r}, which is none; known are {', '.join(SCOPES)}"
            )
    if not found:
        raise CallerError(f"scopes is empty; known are {', '.join(SCOPES)}")
    return tuple(found)


def needed_scope(method: str, route: str) -> str:
    """The scope that `method` on the route (a URI template of the application) needs."""
    resource = resource_of(route)
    if resource == ADMIN:
        return ADMIN
    writes = method not in ("GET", "HEAD") or any(
        method == row[0] and route.startswith(row[1]) and row[2] in route for row in WRITES
    )
    return f"{resource}:{'write' if writes else 'read'}"


def resource_of(route: str) -> str:
    """Whose the route is by the table; `admin` for what it does not know."""
    for path, resource in ROUTES:
        if route == path or route.startswith(f"{path}/"):
            return resource
    return ADMIN


def allows(granted: Collection[str], needed: str) -> bool:
    """Whether a key with these scopes may do what needs that one."""
    if ADMIN in granted or needed in granted:
        return True
    if needed == ADMIN:
        return False
    return ALL_RESOURCES in granted or f"{needed.partition(':')[0]}:*" in granted

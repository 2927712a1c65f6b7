"""What the operator does with teams and keys, for the commands and the routes alike."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vmcell_api.identifiers import hash_api_key, new_api_key
from vmcell_api.node_client import NodeVerbs
from vmcell_api.scopes import parse_scopes
from vmcell_api.store.api_keys import ApiKey, ApiKeys
from vmcell_api.store.records import Store, Team, now_ms
from vmcell_api.store.snapshot_rows import SnapshotRows
from vmcell_api.store.teams import Teams
from vmcell_protos.errors import CallerError

# "e2b_" and 32 of the key's 160 bits: enough to know it by, no help in guessing it.
PREFIX_LENGTH = 12
MAX_KEY_LIFE_S = 10 * 366 * 24 * 3600
MAX_GRACE_S = 90 * 24 * 3600
_DURATION = re.compile(r"([0-9]{1,9})(s|m|h|d)?")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, None: 1}


def create_key(
    store: Store, team: Team, *, scopes: Iterable[str], name: str = "", life_s: int | None = None
) -> tuple[str, ApiKey]:
    """A new key of the team, shown this once, with its record; raises CallerError."""
    if life_s is not None and not 0 < life_s <= MAX_KEY_LIFE_S:
        raise CallerError(f"a key lives 1 to {MAX_KEY_LIFE_S} seconds, not {life_s}")
    key = new_api_key()
    record = ApiKeys(store.engine).add(
        team.team_id,
        hash_api_key(key),
        scopes=parse_scopes(scopes),
        name=name,
        prefix=key[:PREFIX_LENGTH],
        expires_at_unix_ms=None if life_s is None else now_ms() + life_s * 1000,
    )
    return key, record


def rotate_key(store: Store, key_id: str, *, grace_s: int) -> tuple[str, ApiKey]:
    """A new key in place of one that ends `grace_s` from now; raises CallerError."""
    if not 0 <= grace_s <= MAX_GRACE_S:
        raise CallerError(f"the old key may stay valid for 0 to {MAX_GRACE_S} seconds")
    key = new_api_key()
    record = ApiKeys(store.engine).replace(
        key_id, hash_api_key(key), prefix=key[:PREFIX_LENGTH], grace_ms=grace_s * 1000
    )
    return key, record


def remove_team(store: Store, node: NodeVerbs, team: Team, *, kill: bool) -> None:
    """Deletes a team with its keys, and with its sandboxes and snapshots when `kill` says so.

    CallerError failed_precondition when it has some otherwise, or owns something else. Paused
    sandboxes are sandboxes.
    """
    live = {running.sandbox_id for running in node.list()} & store.sandboxes(
        team_id=team.team_id
    ).keys()
    snapshots = SnapshotRows(store).of_team(team.team_id)
    if (live or snapshots) and not kill:
        what = f"{len(live)} running sandboxes" if live else f"{len(snapshots)} snapshots"
        raise CallerError(
            f"team {team.name} has {what}; {'kill' if live else 'delete'} them first",
            code="failed_precondition",
        )
    keys = ApiKeys(store.engine)
    for key in keys.list(team.team_id):
        keys.revoke(key.key_id)  # so that no more sandboxes come
    for sandbox_id in live:
        try:
            node.kill(sandbox_id)
        except CallerError as error:
            if error.code != "not_found":
                raise
    store.forget_sandboxes(store.sandboxes(team_id=team.team_id).keys())
    for row in snapshots:
        try:
            node.remove_snapshot(row.snapshot_id)
        except CallerError as error:
            if error.code != "not_found":
                raise
    SnapshotRows(store).forget([row.snapshot_id for row in snapshots])
    Teams(store.engine).remove(team.team_id)


def parse_duration_s(text: str) -> int:
    """Seconds of "90", "90s", "15m", "12h" or "30d"; raises CallerError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise CallerError(f"{text[:40]!r} is no duration; give one like 45s, 15m, 12h or 30d")
    return int(match[1]) * _UNIT_S[match[2]]

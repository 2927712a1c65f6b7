"""API keys from the command line: `python -m vmcell_api.keys create --team NAME`.

The key is printed once, as the last word of the output; the store keeps its hash.
`python -m vmcell_api.keys migrate` only brings the store up to date.
"""

from __future__ import annotations

import re
import sys

from vmcell_api.config import ApiConfig, load_config
from vmcell_api.identifiers import hash_api_key, new_api_key
from vmcell_api.store.database import migrate, open_engine
from vmcell_api.store.records import Store
from vmcell_protos.errors import CallerError, VmcellError

USAGE = "usage: python -m vmcell_api.keys create --team NAME | migrate"
_TEAM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def create_key(config: ApiConfig, team_name: str) -> str:
    """A new key of that team, which is made if it is missing; raises CallerError, HostError."""
    if not _TEAM.fullmatch(team_name):
        raise CallerError(
            f"{team_name!r} is no team name; use up to 64 letters, digits, dots and dashes"
        )
    migrate(config.database_url, owner_uid=config.api_uid)
    store = Store(open_engine(config.database_url))
    try:
        key = new_api_key()
        store.add_key(store.ensure_team(team_name).team_id, hash_api_key(key))
    finally:
        store.close()
    return key


def main(arguments: list[str]) -> int:
    """The command; answers its exit status."""
    try:
        match arguments:
            case ["create", "--team", name]:
                sys.stdout.write(create_key(load_config(), name) + "\n")
            case ["migrate"]:
                config = load_config()
                migrate(config.database_url, owner_uid=config.api_uid)
            case _:
                sys.stderr.write(USAGE + "\n")
                return 2
    except VmcellError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The store as the operator's commands use it: opened, up to date, what they do audited."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager

from vmcell_api.config import ApiConfig, load_config
from vmcell_api.store.audit import Audit, AuditEntry
from vmcell_api.store.database import migrate, open_engine
from vmcell_api.store.records import Store, now_ms
from vmcell_protos.errors import VmcellError


class OperatorDesk:
    """An open store with its configuration; made by `open_desk`, which closes it."""

    def __init__(self, store: Store, config: ApiConfig) -> None:
        self.store = store
        self.config = config
        self.audit = Audit(store.engine, keep_days=config.audit_days, keep_rows=config.audit_rows)

    @contextmanager
    def audited(self, action: str, *, target: str = "", team_id: str = "") -> Iterator[AuditTrail]:
        """Writes an entry when the block ends, with the error's code when it ends by one."""
        trail = AuditTrail(target=target, team_id=team_id)
        result = "ok"
        try:
            yield trail
        except VmcellError as error:
            result = error.code
            raise
        finally:
            self.audit.add(
                AuditEntry(
                    at_unix_ms=now_ms(),
                    team_id=trail.team_id,
                    actor=f"operator {operator_name()}",
                    action=action,
                    target=trail.target,
                    result=result,
                )
            )


class AuditTrail:
    """What the entry will tell; known only once the work is done."""

    def __init__(self, *, target: str, team_id: str) -> None:
        self.target = target
        self.team_id = team_id


@contextmanager
def open_desk() -> Iterator[OperatorDesk]:
    """The store that api.toml or VMCELL_DATABASE_URL names; raises HostError."""
    config = load_config()
    migrate(config.database_url, owner_uid=config.api_uid)
    store = Store(open_engine(config.database_url))
    try:
        yield OperatorDesk(store, config)
    finally:
        store.close()


def operator_name() -> str:
    """Who runs the command: the one behind sudo, else the process's user."""
    behind_sudo = os.environ.get("SUDO_USER")
    if behind_sudo:
        return behind_sudo[:40]
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())

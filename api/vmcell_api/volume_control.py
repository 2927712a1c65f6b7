"""The verbs on volumes, without HTTP: joins what the store knows with what the node has.

The row comes first and the directory second, and the other way round at the end, so no directory
is ever without an owner. A create that was cut off is finished by the next one of that name.
"""

from __future__ import annotations

from vmcell_api.node_channel import is_undone
from vmcell_api.node_client import NodeVerbs
from vmcell_api.store.records import Store, Team
from vmcell_api.store.volume_records import VolumeRecord, VolumeStore
from vmcell_api.volumes.names import VOLUME_ID, VolumeMount, check_volume_name, new_volume_id
from vmcell_api.volumes.token import VolumeTokens
from vmcell_protos.errors import CallerError, HostError, VmcellError

# (name, path) as a create of a sandbox asks for it; the path is checked.
WantedMounts = tuple[tuple[str, str], ...]


class VolumeControl:
    """The verbs for one team at a time; thread-safe. `limit` is a team's number of volumes."""

    def __init__(self, store: Store, node: NodeVerbs, tokens: VolumeTokens, *, limit: int) -> None:
        self._store = VolumeStore(store)
        self._node = node
        self._tokens = tokens
        self._limit = limit

    def create(self, team: Team, name: str) -> VolumeRecord:
        """Makes a volume; CallerError for a bad name, one the team has, or one too many."""
        record = self._store.add(
            new_volume_id(),
            team_id=team.team_id,
            name=check_volume_name(name),
            limit=self._limit,
        )
        try:
            self._node.make_volume(record.volume_id)
        except VmcellError as error:
            if is_undone(error):
                self._store.forget_unmade(record.volume_id)  # known not to be there
            raise
        if not self._store.mark_made(record.volume_id):  # another create of it failed, or a delete
            self._node.remove_volume(record.volume_id)
            raise HostError(f"making volume {name!r} collided with another request; try again")
        return record

    def token(self, record: VolumeRecord) -> str:
        """What lets a client touch the volume's files."""
        return self._tokens.mint(record.volume_id)

    def get(self, team: Team, volume_id: str) -> VolumeRecord:
        """A volume of the team; another team's is as unknown as none at all."""
        found = None
        if VOLUME_ID.fullmatch(volume_id):
            found = self._store.volume(volume_id, team_id=team.team_id)
        if found is None:
            raise CallerError(f"volume {volume_id[:60]!r} was not found", code="not_found")
        return found

    def list(self, team: Team) -> list[VolumeRecord]:
        """The team's volumes, oldest first."""
        return self._store.volumes(team_id=team.team_id)

    def delete(self, team: Team, volume_id: str) -> None:
        """Removes a volume with its files; CallerError not_found, or aborted while it is in use."""
        record = self.get(team, volume_id)
        self._node.remove_volume(record.volume_id)
        self._store.forget(record.volume_id)

    def mounts(self, team: Team, wanted: WantedMounts) -> tuple[VolumeMount, ...]:
        """The volumes that a create names; CallerError not_found with the names there are not."""
        if not wanted:
            return ()
        names = {name for name, _ in wanted}
        found = self._store.by_name(names, team_id=team.team_id)
        missing = sorted(names - found.keys())
        if missing:
            raise CallerError(
                f"volume {', '.join(missing)[:300]} was not found; make it first: POST /volumes",
                code="not_found",
            )
        return tuple(
            VolumeMount(volume_id=found[name].volume_id, name=name, path=path)
            for name, path in wanted
        )

"""Results on disk: a run that ended early goes on with the clients that are missing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from vmcell_protos.errors import CallerError, HostError
from vmcell_tools.matrix.clients import Client
from vmcell_tools.matrix.running import Column, Result


class KeptResults:
    """A JSON file with one object for each client, written anew after each; None keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        """Reads what is there; CallerError for a file that holds something else, and at once, not
        after the calls, for one that has no place."""
        self._path = path
        self._columns: list[Column] = []
        if path is not None and not path.parent.is_dir():
            raise CallerError(
                f"{path.parent} is no directory; make it, or keep the results elsewhere"
            )
        if path is not None and path.exists():
            try:
                self._columns = [_column(row) for row in json.loads(path.read_text())]
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise CallerError(
                    f"{path} holds no results of vmcell matrix ({error!r}); delete it"
                ) from error

    def find(self, client: Client) -> Column | None:
        """What is kept of exactly this client."""
        return next((column for column in self._columns if column.client == client), None)

    def add(self, column: Column) -> None:
        """Keeps it, in one step; HostError when it cannot be written."""
        self._columns.append(column)
        if self._path is None:
            return
        text = json.dumps([_row(column) for column in self._columns], indent=1)
        fresh = self._path.with_name(f".{self._path.name}.new")
        try:
            fresh.write_text(f"{text}\n")
            fresh.replace(self._path)
        except OSError as error:
            raise HostError(f"cannot write {self._path}: {error.strerror}") from error


def _row(column: Column) -> dict[str, object]:
    return asdict(column)


def _column(row: dict) -> Column:
    client = Client(**row["client"] | {"also": tuple(row["client"]["also"])})
    results = [Result(**result) for result in row["results"]]
    return Column(client=client, results=results, again=row["again"], day=row["day"])

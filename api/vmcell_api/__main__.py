"""The API under gunicorn: `python -m vmcell_api [--bind ADDRESS:PORT]`."""

from __future__ import annotations

import sys
from dataclasses import replace

import falcon

from vmcell_api import logs, metrics
from vmcell_api.app import create_app
from vmcell_api.config import ApiConfig, load_config
from vmcell_api.node_client import NodeClient
from vmcell_api.request_rate import RequestRates
from vmcell_api.store.database import check_version, migrate, open_engine
from vmcell_api.store.records import Store
from vmcell_api.volumes.folders import VolumeFolders
from vmcell_api.volumes.token import VolumeTokens, load_tokens
from vmcell_api.web_server import WebServer, serve
from vmcell_protos.errors import VmcellError

CREATE_SLACK_S = 30.0


def make_app(config: ApiConfig, rates: RequestRates, volume_tokens: VolumeTokens) -> falcon.App:
    """The application of one worker; store and node live as long as the process."""
    node = NodeClient(config.node_socket, create_timeout_s=config.start_timeout_s + CREATE_SLACK_S)
    store = Store(open_engine(config.database_url))
    return create_app(
        store,
        node,
        config,
        volume_tokens=volume_tokens,
        rates=rates,
        metrics_dir=config.metrics_dir,
    )


def serve_api(config: ApiConfig) -> int:
    """Serves until a signal ends the process; answers its exit status."""
    logs.set_up("api", config.log_format)
    try:
        metrics.prepare(config.metrics_dir, config.api_uid)
        migrate(config.database_url, owner_uid=config.api_uid)
        engine = open_engine(config.database_url)
        check_version(engine)
        engine.dispose()
        # The key is root's; the workers get it before they become somebody else.
        folders = VolumeFolders(config.volumes_dir)
        folders.prepare()
        volume_tokens = load_tokens(folders.key_path)
    except VmcellError as error:
        sys.stderr.write(f"vmcell_api: {error}\n")
        return 1
    server = WebServer(
        name="vmcell-api",
        bind=config.api_bind,
        workers=config.workers,
        threads=config.threads,
        uid=config.api_uid,
    )
    rates = RequestRates()
    serve(server, lambda: make_app(config, rates, volume_tokens))
    return 0


def main(arguments: list[str]) -> int:
    """The command; answers its exit status."""
    try:
        config = load_config()
        match arguments:
            case []:
                pass
            case ["--bind", bind]:
                config = replace(config, api_bind=bind)
            case _:
                sys.stderr.write("usage: python -m vmcell_api [--bind ADDRESS:PORT]\n")
                return 2
    except VmcellError as error:
        sys.stderr.write(f"vmcell_api: {error}\n")
        return 1
    return serve_api(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

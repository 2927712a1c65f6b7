"""What a template is built from: a Dockerfile, or a folder of E2B's with a template in it.

Reading Dockerfiles, hashing and uploading files is the E2B SDK's; a folder may hold `template.py`
(with a variable `template`, as `e2b template init` writes it), or `e2b.Dockerfile` with `e2b.toml`,
or a plain Dockerfile.
"""

from __future__ import annotations

import runpy
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmcell_protos.errors import CallerError, HostError
from vmcell_tools.api_client import no_answer

DOCKERFILES = ("e2b.Dockerfile", "Dockerfile")
# What says "as soon as the start command runs" to the SDK, which wants some command.
READY_AT_ONCE = "true"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A template of the SDK's; `settings` are what e2b.toml says, {} without one."""

    template: Any
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the caller says about a build; "" and 0 leave it to e2b.toml and the server."""

    name: str = ""
    tags: tuple[str, ...] = ()
    start_command: str = ""
    ready_command: str = ""
    cpu_count: int = 0
    memory_mib: int = 0
    use_cache: bool = True


@dataclass(frozen=True, kw_only=True)
class Built:
    """A finished build."""

    template_id: str
    build_id: str
    name: str
    tags: tuple[str, ...]


def load(path: Path, wanted: Wanted) -> Source:
    """The template at `path`; raises CallerError when there is none or it cannot be read."""
    sdk = _sdk()
    if not path.exists():
        raise CallerError(f"{path} does not exist; name a Dockerfile or a template's folder")
    folder = path if path.is_dir() else path.parent
    settings = _settings(folder / "e2b.toml")
    program = path if path.suffix == ".py" else folder / "template.py"
    if program.is_file() and (path.is_dir() or path == program):
        return Source(template=_from_program(program), settings=settings)
    file = path if path.is_file() else _dockerfile(folder, settings)
    try:
        template = sdk.Template(file_context_path=folder).from_dockerfile(str(file))
    except Exception as error:
        raise CallerError(f"{file} cannot be read as a Dockerfile: {error}") from error
    start = wanted.start_command or str(settings.get("start_cmd") or "")
    ready = wanted.ready_command or str(settings.get("ready_cmd") or "")
    if start:
        template = template.set_start_cmd(start, ready or READY_AT_ONCE)
    elif ready:
        template = template.set_ready_cmd(ready)
    return Source(template=template, settings=settings)


def build(
    source: Source, wanted: Wanted, *, url: str, key: str, on_line: Callable[[str, str], None]
) -> Built:
    """Builds through the API, `on_line` gets level and text of each line of the log.

    Raises CallerError with the reason when the build fails, HostError without an answer.
    """
    sdk, settings = _sdk(), source.settings
    import httpx  # comes with the SDK

    name = wanted.name or str(settings.get("template_name") or settings.get("template_id") or "")
    if not name:
        raise CallerError("the template has no name; give one with --name")
    try:
        info = sdk.Template.build(
            source.template,
            name,
            tags=list(wanted.tags) or None,
            cpu_count=wanted.cpu_count or settings.get("cpu_count"),
            memory_mb=wanted.memory_mib or settings.get("memory_mb"),
            skip_cache=not wanted.use_cache,
            on_build_logs=lambda entry: on_line(entry.level, entry.message),
            api_url=url,
            api_key=key,
        )
    except _refusals(sdk) as error:
        raise CallerError(f"template {name} was not built: {error}") from error
    except httpx.HTTPError as error:
        raise no_answer(url, error) from error
    except (ValueError, OSError) as error:
        raise CallerError(f"template {name} cannot be built: {error}") from error
    return Built(
        template_id=info.template_id,
        build_id=info.build_id,
        name=name,
        tags=tuple(info.tags or ()),
    )


def _sdk() -> Any:
    try:
        import e2b
        import e2b.exceptions
    except ImportError as error:
        raise HostError("the E2B SDK is not installed; run: pip install e2b") from error
    return e2b


def _refusals(sdk: Any) -> tuple[type[Exception], ...]:
    """The SDK's own exceptions; they have no common parent, and versions add to them."""
    kinds = vars(sdk.exceptions).values()
    return tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception))


def _from_program(program: Path) -> Any:
    """The variable `template` of the caller's own program, run with its folder importable."""
    sys.path.insert(0, str(program.parent))
    try:
        found = runpy.run_path(str(program)).get("template")
    except Exception as error:
        raise CallerError(f"{program} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(program.parent))
    if found is None:
        raise CallerError(f"{program} has no variable `template`")
    return found


def _dockerfile(folder: Path, settings: dict[str, Any]) -> Path:
    names = [str(settings["dockerfile"])] if settings.get("dockerfile") else list(DOCKERFILES)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CallerError(f"{folder} has none of template.py, {', '.join(names)}")


def _settings(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CallerError(f"{path} cannot be read: {error}") from error

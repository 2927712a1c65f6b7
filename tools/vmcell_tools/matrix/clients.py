"""Packages and versions of the matrix, pinned, and how each finds a service.

`urls`: by the variables E2B_API_URL and E2B_SANDBOX_URL. `domain`: these are not known to it, it
dials `https://api.<domain>` and `https://<port>-<id>.<domain>`. `proxy`: cubesandbox's variables,
plain HTTP with a Host of that form.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmcell_protos.errors import CallerError


@dataclass(frozen=True, kw_only=True)
class Client:
    """One version of one package; `group` is the table it stands in, `driver` a file of drivers/.

    `also` are further packages of the environment, pinned for what they changed since.
    """

    group: str
    package: str
    version: str
    language: str
    driver: str
    finds_by: str
    also: tuple[str, ...] = ()

    @property
    def column(self) -> str:
        return f"{self.package} {self.version}"

    @property
    def requirements(self) -> tuple[str, ...]:
        """As the language's installer wants them."""
        mark = "==" if self.language == "python" else "@"
        return (f"{self.package}{mark}{self.version}", *self.also)


def _versions(
    group: str,
    package: str,
    language: str,
    driver: str,
    versions: dict[str, str],
    also: tuple[str, ...] = (),
) -> tuple[Client, ...]:
    """One client for each version; the dict says how it finds a service."""
    return tuple(
        Client(
            group=group,
            package=package,
            version=version,
            language=language,
            driver=driver,
            finds_by=finds_by,
            also=also,
        )
        for version, finds_by in versions.items()
    )


CLIENTS = (
    *_versions(
        "e2b",
        "e2b",
        "python",
        "python_e2b.py",
        {
            "2.63.0": "urls",
            "2.50.0": "urls",
            "2.0.2": "domain",
            "1.11.1": "domain",
            "1.5.6": "domain",
            "1.0.5": "domain",
        },
    ),
    *_versions("e2b", "e2b", "node", "node_e2b.mjs", {"2.51.0": "urls", "1.13.2": "domain"}),
    *_versions(
        "code interpreter",
        "e2b-code-interpreter",
        "python",
        "python_code_interpreter.py",
        {"2.11.5": "urls"},
    ),
    # It takes any e2b 2.x, and looks into it where 2.63 has nothing any more.
    *_versions(
        "code interpreter",
        "e2b-code-interpreter",
        "python",
        "python_code_interpreter.py",
        {"2.0.0": "domain"},
        also=("e2b==2.0.2",),
    ),
    *_versions(
        "code interpreter",
        "e2b-code-interpreter",
        "python",
        "python_code_interpreter.py",
        {"1.0.5": "domain"},
    ),
    *_versions(
        "code interpreter",
        "@e2b/code-interpreter",
        "node",
        "node_code_interpreter.mjs",
        {"2.8.0": "urls"},
    ),
    *_versions("desktop", "e2b-desktop", "python", "python_desktop.py", {"2.7.2": "urls"}),
    *_versions("cubesandbox", "cubesandbox", "python", "python_cubesandbox.py", {"0.7.3": "proxy"}),
    *_versions("CLI", "@e2b/cli", "node", "cli_e2b.py", {"2.19.0": "urls"}),
)


def chosen(words: tuple[str, ...]) -> tuple[Client, ...]:
    """The clients whose column holds one of `words`, all without any; CallerError for none."""
    found = tuple(
        client for client in CLIENTS if not words or any(word in client.column for word in words)
    )
    if not found:
        names = ", ".join(client.column for client in CLIENTS)
        raise CallerError(f"no client's name holds {' or '.join(words)}; there are {names}")
    return found

"""Which languages there are, under which names, and what is said of those there are not. No I/O."""

from __future__ import annotations

PYTHON, JAVASCRIPT, TYPESCRIPT, BASH = "python", "javascript", "typescript", "bash"
SHORT_NAMES = {"py": PYTHON, "js": JAVASCRIPT, "ts": TYPESCRIPT, "sh": BASH}
OFFERED = (PYTHON, JAVASCRIPT, TYPESCRIPT, BASH)
# E2B's own image has these; ours stays a third of its size without them.
LEFT_OUT = {"r": "R", "java": "Java"}


class NoKernel(Exception):
    """A language that this image cannot run; the text is for the client."""


def language_named(name: str | None) -> str:
    """The long name for what a client calls a language, Python when it names none.

    Raises NoKernel for a language that is not in this image.
    """
    plain = (name or PYTHON).strip().lower()
    language = SHORT_NAMES.get(plain, plain)
    if language in OFFERED:
        return language
    offered = ", ".join(OFFERED)
    if language in LEFT_OUT:
        raise NoKernel(
            f"No kernel for language {name!r}: {LEFT_OUT[language]} is not installed in this "
            f"image; it has {offered}"
        )
    raise NoKernel(f"No kernel for language {(name or '')[:60]!r}: this image has {offered}")

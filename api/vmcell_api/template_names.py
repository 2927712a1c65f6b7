"""Names of templates: `name`, `name:tag`, `team/name:tag`.

Source: E2B's rules: lower case, letters, digits, dashes and underscores; a tag may have dots too;
without a tag it is "default".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmcell_protos.errors import CallerError

DEFAULT_TAG = "default"
MAX_NAME_LENGTH = 128
MAX_TAGS = 32
_PART = re.compile(r"[a-z0-9_-]{1,128}")
_TAG = re.compile(r"[a-z0-9_.-]{1,128}")


@dataclass(frozen=True, kw_only=True)
class TemplateName:
    """A name cut into its parts; `namespace` and `tag` are "" when they were not given."""

    name: str
    namespace: str = ""
    tag: str = ""

    def __str__(self) -> str:
        named = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{named}:{self.tag}" if self.tag else named


def parse_name(text: str) -> TemplateName:
    """The parts of a name, in lower case; raises CallerError when it is none."""
    lowered = text.lower()
    rest, colon, tag = lowered.partition(":")
    namespace, slash, name = rest.rpartition("/")
    parts = [name, namespace] if slash else [name]
    if not all(_PART.fullmatch(part) for part in parts) or (colon and not _TAG.fullmatch(tag)):
        raise CallerError(
            f"{text[:80]!r} is no template name; use a-z, 0-9, '-' and '_', as in name, name:tag "
            "or team/name:tag"
        )
    return TemplateName(name=name, namespace=namespace, tag=tag)


def parse_tags(tags: object) -> list[str]:
    """A list of tags without repetitions; raises CallerError for one that is none."""
    if tags is None:
        return []
    if not isinstance(tags, list) or len(tags) > MAX_TAGS:
        raise CallerError(f"tags takes a list of at most {MAX_TAGS} tags")
    found: dict[str, None] = {}
    for tag in tags:
        if not isinstance(tag, str) or not _TAG.fullmatch(tag.lower()):
            raise CallerError(f"{str(tag)[:40]!r} is no tag; use a-z, 0-9, '-', '_' and '.'")
        found[tag.lower()] = None
    return list(found)


def namespace_of(team_name: str) -> str:
    """A team's name as the namespace of its templates."""
    return re.sub(r"[^a-z0-9_-]+", "-", team_name.lower())[:128] or "team"

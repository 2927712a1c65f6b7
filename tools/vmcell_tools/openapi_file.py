"""docs/openapi.json, written from `vmcell_api.openapi` by `python -m vmcell_tools.openapi_file`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vmcell_api.openapi.document import build_document

PATH = Path(__file__).resolve().parents[2] / "docs" / "openapi.json"


def render() -> str:
    """The file's content."""
    return json.dumps(build_document(), indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Writes the file."""
    PATH.write_text(render())
    return 0


if __name__ == "__main__":
    sys.exit(main())

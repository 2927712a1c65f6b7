"""The generated modules are what the generator writes today."""

from __future__ import annotations

from vmcell_tools.message_codegen import proto_folder, render_modules


def test_generated_modules_are_up_to_date() -> None:
    folder = proto_folder()
    stale = [
        stem
        for stem, source in render_modules(folder).items()
        if (folder / f"{stem}.py").read_text() != source
    ]
    assert not stale, f"run python -m vmcell_tools.message_codegen; stale: {stale}"

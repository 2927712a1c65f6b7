"""`vmcell kernel` and `vmcell image`: the words and options of what is built."""

from __future__ import annotations

import click

from vmcell_tools.cli_output import json_option, print_json, print_table


@click.group()
def kernel() -> None:
    """The guest kernel."""


@kernel.command("build")
@click.option("--keep-tree", is_flag=True, help="Keep 2 GB of source and objects for rebuilds.")
@json_option
def kernel_build(keep_tree: bool, as_json: bool) -> None:
    """Build the guest kernel, unless the cache has it; prints its path."""
    from vmcell_tools.build_cache import BuildCache
    from vmcell_tools.kernel_build import build_kernel
    from vmcell_tools.progress import Progress

    with Progress("vmcell kernel") as progress:
        path = build_kernel(BuildCache.default(), progress, keep_tree=keep_tree)
    _print_path(path, as_json=as_json)


@click.group()
def image() -> None:
    """The guest's base image, and OCI images made from Debian packages."""


@image.command("base")
@json_option
def image_base(as_json: bool) -> None:
    """Build the guest's base image, unless the cache has it; prints its path."""
    from vmcell_tools.base_image import build_base_image
    from vmcell_tools.build_cache import BuildCache
    from vmcell_tools.progress import Progress

    with Progress("vmcell image") as progress:
        path = build_base_image(BuildCache.default(), progress)
    _print_path(path, as_json=as_json)


@image.command("build")
@click.argument("name")
@json_option
def image_build(name: str, as_json: bool) -> None:
    """Build the OCI image NAME (see `list`), unless the cache has it; prints its path."""
    from vmcell_tools.build_cache import BuildCache
    from vmcell_tools.oci_image import build_oci_image
    from vmcell_tools.progress import Progress

    with Progress("vmcell image") as progress:
        built = build_oci_image(name, BuildCache.default(), progress)
    _print_path(built.archive, as_json=as_json)


@image.command("import")
@click.argument("name")
@click.option(
    *("-n", "--namespace", "namespaces"),
    multiple=True,
    default=("vmcell", "default"),
    show_default=True,
    help="containerd's namespaces to import into.",
)
@json_option
def image_import(name: str, namespaces: tuple[str, ...], as_json: bool) -> None:
    """Import the built OCI image NAME into containerd, where it is not there yet."""
    from vmcell_tools.build_cache import BuildCache
    from vmcell_tools.image_import import import_image
    from vmcell_tools.progress import Progress

    with Progress("vmcell image") as progress:
        reference = import_image(name, namespaces, BuildCache.default(), progress)
    if as_json:
        print_json({"reference": reference, "namespaces": namespaces})
    else:
        click.echo(reference)


@image.command("list")
@json_option
def image_list(as_json: bool) -> None:
    """The OCI images that can be built, and where they are."""
    from vmcell_tools.build_cache import BuildCache
    from vmcell_tools.image_import import list_images
    from vmcell_tools.progress import Progress

    rows = list_images(BuildCache.default(), Progress("vmcell image", quiet=True))
    if as_json:
        print_json([row._asdict() for row in rows])
        return
    cells = [
        (
            row.name,
            row.reference,
            row.archive or f"not built: vmcell image build {row.name}",
            ", ".join(row.imported) if row.imported is not None else "containerd does not answer",
        )
        for row in rows
    ]
    print_table(("name", "reference", "archive", "imported into"), cells)


def _print_path(path: object, *, as_json: bool) -> None:
    if as_json:
        print_json({"path": str(path)})
    else:
        click.echo(str(path))

"""`python -m vmcell_tools` is `vmcell`."""

from vmcell_tools.cli import main

main(prog_name="vmcell")

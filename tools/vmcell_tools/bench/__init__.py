"""Figures of this host, each with its definition, its failures and what was measured beside it:
`vmcell bench`.

Reading order:
samples     what was measured of one thing, and what failed
machine     which machine measured, in which lane
report      a run as a table and as JSON
payload     hand-made guests of a few instructions
zygote      a zygote of the benchmark's own
restore     a saved machine → its first instruction
start       starts of containers timed, by part, beside runc
"""

"""A machine between two instructions, as records and bytes. No I/O here.

A saved machine is input like any other: whoever can write it can be anybody, so everything that is
read is checked for kind and range, and what KVM and the devices make of it they check again.

Reading order:
fields  typed reads from a JSON tree
state   the state of a whole machine, and its JSON
"""

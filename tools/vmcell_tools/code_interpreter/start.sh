#!/bin/sh
# The code interpreter of a sandbox, for as long as the sandbox lives: whatever ends it, it comes
# again. Runs as root like E2B's own; -I keeps files in the user's directory out of its imports.
exec >>/var/log/vmcell-interpreter.log 2>&1 </dev/null
cd /home/user || exit 1
while :; do
    python3 -I -m vmcell_interpreter
    echo "the code interpreter ended with status $?"
    sleep 1
done

"""`python -m maskops bench cpu`: every kernel of the processor against its peers, and against what the machine can do.

`rows` is the table, `attention` and `losses` say who takes part, `limits` measures the machine, `measure` checks the
contenders, `rounds` times them, `helper` runs those that need an allocator of their own, `report` and `chart` show what
was found, `command` puts them together.
"""

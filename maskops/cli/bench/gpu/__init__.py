"""`python -m maskops bench gpu`: every kernel of a device against the best that is installed beside it.

The contests are those of `contests`; `rivals` (of attention), `losses` and `decode` say who takes part, `measure`
checks and times the contenders, `schedule` lists what is run, `report` keeps and shows it, `command` puts them
together.
"""

"""`python -m maskops bench gpu`: every kernel of a device against the best that is installed beside it.

`contest` says what a contest is, `attention`, `rivals`, `losses` and `decode` hold them, `measure` checks and times the
contenders, `schedule` lists what is run, `report` keeps and shows it, `command` puts them together.
"""

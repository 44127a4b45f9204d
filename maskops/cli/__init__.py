"""The command line: `python -m maskops bench | info | report | verify`."""

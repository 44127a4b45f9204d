"""The command line: `python -m maskops bench | info | verify`."""

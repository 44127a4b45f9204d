"""`python -m maskops`."""

import sys

from maskops.cli.main import main

sys.exit(main())

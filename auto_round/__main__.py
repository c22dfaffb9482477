"""`python -m auto_round`."""

import sys

from auto_round.cli import main

sys.exit(main())

"""``python -m adajudge.cli``."""

import sys

from adajudge.cli import main

sys.exit(main())

"""``python -m tp_twoaxis`` is ``tp-twoaxis``."""

import sys

from tp_twoaxis.cli import main

sys.exit(main())

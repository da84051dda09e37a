"""`python -m thaw.cli`, the same as `thaw`."""

import sys

from thaw.cli import main

sys.exit(main())

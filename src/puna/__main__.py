"""`python -m puna`, and `torchrun -m puna`."""

import sys

from puna.cli.main import main

sys.exit(main())

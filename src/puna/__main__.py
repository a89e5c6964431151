"""`python -m puna`, and `torchrun -m puna`."""

import sys

from puna.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

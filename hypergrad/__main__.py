"""`python -m hypergrad`, the command line."""

import sys

from hypergrad.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m onnxcomp` is the command line."""

import sys

from onnxcomp.cli import main

if __name__ == "__main__":
    sys.exit(main())

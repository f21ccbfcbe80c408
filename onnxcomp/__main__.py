"""`python -m onnxcomp` is the command line."""

from onnxcomp.cli import main

if __name__ == "__main__":
    main()

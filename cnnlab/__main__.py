"""`python -m cnnlab`: the command line."""

import os
import sys

from cnnlab.cli import main, under_torchrun

if __name__ == "__main__":
    status = main()
    if under_torchrun():
        # gloo's threads may still hold tensors; releasing those while Python exits aborts the
        # process (pytorch pull request 179291).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)

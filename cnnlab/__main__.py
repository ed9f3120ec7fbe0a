"""`python -m cnnlab`: the command line."""

import os
import sys

from cnnlab.cli import main

if __name__ == "__main__":
    status = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # gloo's threads may still hold tensors, and releasing them while Python exits aborts the process
        # (pytorch pull request 179291).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)

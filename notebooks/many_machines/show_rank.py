"""Print what torchrun has told this rank. It says so through environment variables."""

import os

NAMES = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
line = " ".join(f"{name}={os.environ[name]}" for name in NAMES)
print(line + "\n", end="")  # in one piece, because the ranks of a host share the output

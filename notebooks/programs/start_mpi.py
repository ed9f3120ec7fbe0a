"""Start an MPI program of this folder."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Open MPI rejects the user root (as in containers) and more ranks than cores, unless these are set.
# Other implementations of MPI ignore them.
SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
INSTALL = 'pip install "cnnlab[tour]" installs them (on Windows, also install Microsoft MPI)'


def run_mpi(program, ranks):
    """What the program prints in that many ranks, or a sentence that says what is missing."""
    if importlib.util.find_spec("mpi4py") is None:
        return f"MPI: not shown live, because the package mpi4py is missing. {INSTALL}."
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    mpiexec = shutil.which("mpiexec", path=path)
    if mpiexec is None:
        return f"MPI: not shown live, because the program mpiexec is missing. {INSTALL}."
    command = [mpiexec, "-n", str(ranks), sys.executable, str(Path(__file__).with_name(program))]
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 120}
    try:
        done = subprocess.run(command, env={**os.environ, **SETTINGS}, **options)
    except subprocess.TimeoutExpired:
        return "MPI: not shown live, because the program timed out."
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        reason = [*errors, "mpiexec failed"][0].strip()
        return f"MPI: not shown live. {reason}"
    return done.stdout

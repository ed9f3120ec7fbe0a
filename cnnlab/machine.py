"""What this machine can do: its cores, matrix units and GPUs, what it lacks and why, and its measured limits."""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What `describe()` found. `missing` gives, for each capability that is absent, what it would take."""

    name: str  # the processor, as it calls itself
    system: str
    cores: int  # that this process may use
    memory_gib: float
    units: tuple[str, ...]  # vector and matrix units of the CPU
    gpus: tuple[str, ...]
    compiler: str | None  # path of the C++ compiler that torch.compile would use
    hardware: dict[str, bool]  # precision: computed by the CPU itself (else emulated, and slow)
    missing: dict[str, str]
    versions: dict[str, str]

    def to_dict(self):
        return asdict(self)


@cache
def describe():
    """This machine, asked once. Takes about a second, and starts nothing on a GPU."""
    import psutil
    import torch

    flags = _cpu_flags()
    units = tuple(name for name, flag in _UNITS.items() if flag in flags)
    library = (
        torch.backends.mkldnn.is_available()
    )  # oneDNN: without it, as on macOS, torch does not use these units in convolutions
    hardware = {
        "fp32": True,
        "bf16": library and bool({"amx_bf16", "avx512_bf16", "bf16"} & flags),
        "fp16": library and bool({"amx_fp16", "avx512_fp16", "asimdhp"} & flags),
    }
    gpus = (
        tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        if torch.cuda.is_available()
        else ()
    )
    compiler = _compiler()
    return Machine(
        name=_cpu_name(),
        system=f"{platform.system()} {platform.machine()}",
        cores=cores(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        units=units,
        gpus=gpus,
        compiler=compiler,
        hardware=hardware,
        missing=_missing(hardware, gpus, compiler),
        versions=versions(),
    )


def cores():
    """CPU cores that this process may use: affinity and container limits are heeded, as joblib reads them."""
    from joblib import cpu_count

    return cpu_count()


def cpu_affinity():
    """The cores that this process is kept on, by number; None where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def versions():
    """Versions of what decides the speed."""
    import torch

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
    }  # by itself torch names its build, too
    for package in ("cnnlab", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def missing_for(recipe):
    """One sentence for each thing that `recipe` needs and this machine lacks; empty when it can run here."""
    machine = describe()
    needs = {
        "NVIDIA GPU": recipe.device == "cuda",
        "C++ compiler": recipe.compiler != "eager" and recipe.device == "cpu",
    }
    lacking = [
        f"{name} missing: {machine.missing[name]}"
        for name, needed in needs.items()
        if needed and name in machine.missing
    ]
    if recipe.strategy == "async" and os.name != "posix":
        lacking.append("strategy='async' needs POSIX file locks: Linux or macOS.")
    return lacking


_UNITS = {
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "AVX-512 BF16": "avx512_bf16",
    "AVX-512 FP16": "avx512_fp16",
    "AMX BF16": "amx_bf16",
    "AMX FP16": "amx_fp16",
    "AMX INT8": "amx_int8",
    "NEON": "asimd",
    "SVE": "sve",
    "BF16": "bf16",
}


def _cpu_flags():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return set(
            next(line for line in lines if line.startswith(("flags", "Features")))
            .split(":")[1]
            .split()
        )
    except (OSError, StopIteration):
        if platform.machine() == "arm64":  # Apple: every M-series chip has these two
            return {"asimd", "asimdhp"} | (
                {"bf16"} if _sysctl("hw.optional.arm.FEAT_BF16") == "1" else set()
            )
        return set((_sysctl("machdep.cpu.leaf7_features") or "").lower().split())


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return (
            next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
        )
    except (OSError, StopIteration):
        return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _sysctl(name):
    if sys.platform != "darwin":
        return None
    return (
        subprocess.run(["sysctl", "-n", name], capture_output=True, text=True).stdout.strip()
        or None
    )


def _compiler():
    names = os.environ.get("CXX", "").split()[:1] or ["g++", "clang++", "cl"]
    return next((path for path in map(shutil.which, names) if path), None)


def _missing(hardware, gpus, compiler):
    import torch

    built = (
        f"or this torch ({torch.__version__}), built without CUDA, cannot see it"
        if not torch.version.cuda
        else "or its driver is not installed, or too old for this torch"
    )
    reasons = {
        "NVIDIA GPU": None
        if gpus
        else f"torch sees none: either the machine has none, {built}. GPU lessons show recorded runs where there are some; "
        "Colab or a machine with an NVIDIA GPU and a CUDA build of torch runs them live.",
        "second GPU": None
        if len(gpus) > 1
        else "runs on several GPUs need a machine with at least two.",
        "C++ compiler": None
        if compiler
        else "torch.compile writes C++ for the CPU and needs g++ or clang++: "
        "apt install g++, xcode-select --install, or conda install cxx-compiler.",
        "bf16 units": None
        if hardware["bf16"]
        else "this CPU emulates bf16, so it is likely to be slow; "
        "AMX, AVX-512 BF16 or a recent ARM chip computes it in hardware.",
        "fp16 units": None
        if hardware["fp16"]
        else "this CPU emulates fp16, so it is likely to be slow; take bf16 where that has hardware.",
    }
    return {name: reason for name, reason in reasons.items() if reason}

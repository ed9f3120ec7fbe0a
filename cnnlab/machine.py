"""What this machine has and lacks: its cores, vector and matrix instructions, GPUs, compiler."""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from cnnlab.recipe import Precision, Recipe

PRECISIONS = get_args(Precision)

# Instruction set: its flag in /proc/cpuinfo (x86 and ARM).
INSTRUCTION_SETS = {
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
BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}
FP16_FLAGS = {"amx_fp16", "avx512_fp16", "asimdhp"}


@cache
def describe() -> "Machine":
    """This machine. Takes about a second, and creates no CUDA context."""
    import psutil
    import torch

    flags = _cpu_flags()
    # Without oneDNN, as on macOS, torch's convolutions do not use these instructions.
    onednn = torch.backends.mkldnn.is_available()
    bf16 = onednn and bool(flags & BF16_FLAGS)
    fp16 = onednn and bool(flags & FP16_FLAGS)
    hardware = {"fp32": True, "bf16": bf16, "fp16": fp16}
    gpu_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = tuple(torch.cuda.get_device_name(number) for number in range(gpu_count))
    compiler = _find_compiler()
    return Machine(
        name=_cpu_name(),
        system=f"{platform.system()} {platform.machine()}",
        cores=cores(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        units=tuple(name for name, flag in INSTRUCTION_SETS.items() if flag in flags),
        gpus=gpus,
        compiler=compiler,
        hardware=hardware,
        missing=_missing(hardware, gpus, compiler),
        versions=versions(),
    )


def cores() -> int:
    """Number of CPU cores that this process may use, within its affinity and container limits."""
    from joblib import cpu_count

    return cpu_count()


def cpu_affinity() -> list[int] | None:
    """The cores that this process may run on; None if the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def versions() -> dict[str, str]:
    """Versions of the software that determines the speed."""
    import torch

    try:
        own = version("cnnlab")
    except PackageNotFoundError:
        own = "not installed"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,  # names the build, such as +cu128, unlike its metadata
        "cnnlab": own,
        "numpy": version("numpy"),
    }


def missing_for(recipe: Recipe) -> list[str]:
    """One sentence for each thing that `recipe` needs and this machine lacks."""
    needed = []
    if recipe.device == "cuda":
        needed.append("NVIDIA GPU")
    if recipe.compiler != "eager" and recipe.device == "cpu":
        needed.append("C++ compiler")
    missing = describe().missing
    sentences = [f"{name} missing: {missing[name]}" for name in needed if name in missing]
    if recipe.strategy == "async" and os.name != "posix":
        sentences.append("strategy='async' needs POSIX file locks. Use Linux or macOS.")
    return sentences


def _cpu_flags() -> set[str]:
    flags = set(_read_cpuinfo("flags", "Features").split())
    if flags:
        return flags
    if platform.machine() == "arm64":  # macOS: all M-series chips have these two
        flags = {"asimd", "asimdhp"}
        if _sysctl("hw.optional.arm.FEAT_BF16") == "1":
            flags.add("bf16")
        return flags
    return set(_sysctl("machdep.cpu.leaf7_features").lower().split())


def _cpu_name() -> str:
    name = _read_cpuinfo("model name") or _sysctl("machdep.cpu.brand_string")
    return name or platform.processor() or platform.machine()


def _read_cpuinfo(*keys: str) -> str:
    """Value of the first line in /proc/cpuinfo that starts with one of `keys`; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        if line.startswith(keys):
            return line.partition(":")[2].strip()
    return ""


def _sysctl(name: str) -> str:
    """A value of macOS's sysctl; "" elsewhere."""
    if sys.platform != "darwin":
        return ""
    return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True).stdout.strip()


def _find_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would use."""
    names = os.environ.get("CXX", "").split()[:1] or ["g++", "clang++", "cl"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _missing(hardware: dict[str, bool], gpus: tuple[str, ...], compiler: str | None) -> dict:
    """{missing capability: what it would take}."""
    import torch

    missing = {}
    if not gpus:
        cause = "its driver is not installed or too old for this torch"
        if not torch.version.cuda:
            cause = f"this torch ({torch.__version__}) was built without CUDA"
        missing["NVIDIA GPU"] = (
            f"torch finds none. Either the machine has none, or {cause}. GPU lessons show recorded "
            "runs. To run them live, use Colab, or an NVIDIA GPU and a CUDA build of torch."
        )
    if len(gpus) < 2:
        missing["second GPU"] = "runs on several GPUs need a machine with at least two."
    if not compiler:
        missing["C++ compiler"] = (
            "torch.compile generates C++ for the CPU and needs g++ or clang++. Use "
            "apt install g++, xcode-select --install, or conda install cxx-compiler."
        )
    for precision in ("bf16", "fp16"):
        if not hardware[precision]:
            missing[f"{precision} units"] = (
                f"this CPU emulates {precision}, so it is likely to be slow. Some chips with AMX, "
                "AVX-512, or ARM instructions compute it in hardware."
            )
    return missing


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What `describe()` found."""

    name: str  # of the processor
    system: str  # operating system and architecture
    cores: int  # that this process may use
    memory_gib: float
    units: tuple[str, ...]  # vector and matrix instruction sets of the CPU
    gpus: tuple[str, ...]
    compiler: str | None  # path of the C++ compiler that torch.compile would use
    hardware: dict[str, bool]  # precision: supported by the CPU (otherwise emulated and slow)
    missing: dict[str, str]  # missing capability: what it would take
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-safe values."""
        return asdict(self)

"""What this machine has and lacks: its cores, vector and matrix instructions, GPUs, compiler."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

from cnnlab.recipe import SHARDED, Precision, Recipe

PRECISIONS = get_args(Precision)

# Instruction set: its name in `torch.cpu.get_capabilities` (x86 and ARM).
INSTRUCTION_SETS = {
    "AVX2": "avx2",
    "AVX-512": "avx512_f",
    "AVX-512 BF16": "avx512_bf16",
    "AVX-512 FP16": "avx512_fp16",
    "AMX BF16": "amx_bf16",
    "AMX FP16": "amx_fp16",
    "AMX INT8": "amx_int8",
    "NEON": "neon",
    "SVE": "sve",
    "BF16": "bf16",
}
BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}
FP16_FLAGS = {"amx_fp16", "avx512_fp16", "fp16_arith"}


@cache
def describe() -> "Machine":
    """This machine. Takes about a second, and creates no CUDA context."""
    import psutil
    import torch

    capabilities = torch.cpu.get_capabilities()
    flags = {name for name, value in capabilities.items() if value is True}
    # Without oneDNN, as on macOS, torch's convolutions do not use these instructions.
    onednn = torch.backends.mkldnn.is_available()
    bf16 = onednn and bool(flags & BF16_FLAGS)
    fp16 = onednn and bool(flags & FP16_FLAGS)
    hardware = {"fp32": True, "bf16": bf16, "fp16": fp16}
    gpu_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = tuple(torch.cuda.get_device_name(number) for number in range(gpu_count))
    compiler = _find_compiler()
    return Machine(
        name=_cpu_name(capabilities),
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
    gpus = len(describe().gpus)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", recipe.ranks))  # here, under torchrun
    if recipe.device == "cuda" and recipe.strategy in SHARDED and 0 < gpus < ranks:
        sentences.append(
            f"strategy={recipe.strategy!r} with device='cuda' needs a GPU for each of its {ranks} "
            f"ranks, and there are {gpus}. Use fewer ranks, device='cpu' or strategy='ddp'."
        )
    if recipe.strategy == "async" and os.name != "posix":
        sentences.append("strategy='async' needs POSIX file locks. Use Linux or macOS.")
    if recipe.memory_limit_mib and recipe.device == "cpu" and sys.platform != "linux":
        sentences.append("memory_limit_mib needs Linux or device='cuda'. Use None.")
    return sentences


def _cpu_name(capabilities: Mapping[str, Any]) -> str:
    if sys.platform == "darwin":  # torch does not know the names of Apple's chips.
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return capabilities.get("cpu_name") or platform.processor() or platform.machine()


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

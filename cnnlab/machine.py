"""What this machine has and lacks: its cores, vector and matrix instructions, GPUs, compiler."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

from cnnlab.recipe import SHARDED, Device, Precision, Recipe

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
    bf16, fp16 = (_in_hardware(capabilities, names) for names in (BF16_FLAGS, FP16_FLAGS))
    hardware = {"fp32": True, "bf16": bf16, "fp16": fp16}
    accelerators = _accelerators()
    compiler = _find_compiler()
    return Machine(
        name=_cpu_name(capabilities),
        system=f"{platform.system()} {platform.machine()}",
        cores=cores(),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=psutil.cpu_count(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        units=tuple(name for name, flag in INSTRUCTION_SETS.items() if flag in flags),
        gpus=tuple(found.name for found in accelerators if found.device == "cuda"),
        accelerators=accelerators,
        compiler=compiler,
        hardware=hardware,
        missing=_missing(hardware, accelerators, compiler),
        versions=versions(),
    )


def accelerator() -> str:
    """The kind of GPU that torch finds: "cuda" (NVIDIA or AMD), "mps", "xpu"; "cpu" without one."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None and found.type in get_args(Device) else "cpu"


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
    here, device, needed = describe(), recipe.device, []
    if device == "cuda":
        needed.append("NVIDIA GPU")
    if recipe.compiler != "eager" and recipe.device == "cpu":
        needed.append("C++ compiler")
    missing = here.missing
    sentences = [f"{name} missing: {missing[name]}" for name in needed if name in missing]
    gpus = [found for found in here.accelerators if found.device == device]
    if device in ("mps", "xpu") and not gpus:
        sentences.append(
            f"device={device!r} is not available: torch ({here.versions['torch']}) finds none. "
            f"Use device={here.accelerator!r}."
        )
    if gpus and recipe.precision == "tf32" and "tf32" not in gpus[0].precisions:
        sentences.append(
            f"precision='tf32' needs an NVIDIA GPU from Ampere on, and this is {gpus[0].name}. "
            "Use precision='fp16'."
        )
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", recipe.ranks))  # here, under torchrun
    one_each = recipe.strategy in SHARDED or device == "xpu"  # gloo shares GPUs of CUDA only
    fewest = 2 if "LOCAL_WORLD_SIZE" in os.environ else 1  # Slurm may show each rank its own GPU
    if one_each and fewest <= len(gpus) < ranks:
        sentences.append(
            f"strategy={recipe.strategy!r} with device={device!r} needs a GPU for each of its "
            f"{ranks} ranks, and there are {len(gpus)}. Use fewer ranks, device='cpu' or "
            "strategy='ddp'."
        )
    if recipe.strategy == "async" and os.name != "posix":
        sentences.append("strategy='async' needs POSIX file locks. Use Linux or macOS.")
    if recipe.memory_limit_mib and recipe.device == "cpu" and sys.platform != "linux":
        sentences.append("memory_limit_mib needs Linux or a GPU of NVIDIA, AMD or Intel. Use None.")
    return sentences


def _in_hardware(capabilities: Mapping[str, Any], flags: set[str]) -> bool | None:
    """Whether torch uses one of these instructions; None if the system does not tell."""
    import torch

    if not torch.backends.mkldnn.is_available():
        return False  # without oneDNN, as on macOS, torch's convolutions do not use them
    if not flags & capabilities.keys():
        return None
    return any(capabilities.get(flag) for flag in flags)


def _accelerators() -> tuple["Accelerator", ...]:
    import torch

    device = accelerator()
    if device == "cpu":
        return ()
    if device == "mps":  # has no properties to ask for
        gib = torch.mps.recommended_max_memory() / 2**30
        gpu = Accelerator(
            device="mps",
            name=f"{_cpu_name({})} GPU",
            memory_gib=round(gib, 1),
            capability="",
            precisions=("fp32", "fp16"),
        )
        return (gpu,)
    found = []
    for number in range(torch.accelerator.device_count()):
        properties = torch.get_device_module(device).get_device_properties(number)
        capability, precisions = "", ("fp32", "bf16", "fp16")
        if device == "cuda" and torch.version.hip:
            capability = properties.gcnArchName
        elif device == "cuda":
            capability = f"{properties.major}.{properties.minor}"
            ampere = properties.major >= 8  # older GPUs emulate bf16 and have no TF32
            precisions = PRECISIONS if ampere else ("fp32", "fp16")
        gpu = Accelerator(
            device=device,
            name=properties.name,
            memory_gib=round(properties.total_memory / 2**30, 1),
            capability=capability,
            precisions=precisions,
        )
        found.append(gpu)
    return tuple(found)


def _cpu_name(capabilities: Mapping[str, Any]) -> str:
    if sys.platform == "darwin":  # torch does not know the names of Apple's chips.
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return capabilities.get("cpu_name") or platform.processor() or platform.machine()


def _find_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would use."""
    names = os.environ.get("CXX", "").split()[:1] or ["g++", "clang++", "cl"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _compile_obstacle() -> str | None:
    """Why torch.compile fails although there is a compiler, or None."""
    import torch

    temporary = tempfile.gettempdir()
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", temporary)
    if os.name == "posix" and " " in torch.__path__[0]:  # not quoted: pytorch pull 191010
        return (
            f"torch.compile cannot link, because the path of torch has a space: {torch.__path__[0]}"
            ". Install torch into an environment in another folder."
        )
    if os.name == "posix" and " " in temporary:
        return (
            f"torch.compile cannot work in {temporary}, because the path has a space. Set TMPDIR "
            "to another folder."
        )
    no_exec = getattr(os, "ST_NOEXEC", 0)
    if no_exec and os.path.exists(cache) and os.statvfs(cache).f_flag & no_exec:
        return (
            f"torch.compile cannot run code in {cache}, which is mounted with noexec. Set TMPDIR "
            "to another folder."
        )
    return None


def _missing(
    hardware: Mapping[str, bool | None],
    accelerators: tuple["Accelerator", ...],
    compiler: str | None,
) -> dict[str, str]:
    """{missing capability: what it would take}."""
    import torch

    missing = {}
    if not any(found.device == "cuda" for found in accelerators):
        cause = "its driver is not installed or too old for this torch"
        if not (torch.version.cuda or torch.version.hip):
            cause = f"this torch ({torch.__version__}) was built without CUDA"
        missing["NVIDIA GPU"] = (
            f"torch finds none. Either the machine has none, or {cause}. GPU lessons show recorded "
            "runs. To run them live, use Colab, or an NVIDIA GPU and a CUDA build of torch."
        )
    if len(accelerators) < 2:
        missing["second GPU"] = "runs on several GPUs need a machine with at least two."
    if not compiler:
        missing["C++ compiler"] = (
            "torch.compile generates C++ for the CPU and needs g++ or clang++. Use "
            "apt install g++, xcode-select --install, or conda install cxx-compiler."
        )
    elif obstacle := _compile_obstacle():
        missing["C++ compiler"] = obstacle
    for precision in ("bf16", "fp16"):
        if hardware[precision] is None:
            missing[f"{precision} units"] = (
                f"unknown, because the system does not tell whether this CPU computes {precision} "
                "in hardware. Compare the measured peaks of fp32 and of this format."
            )
        elif not hardware[precision]:
            missing[f"{precision} units"] = (
                f"this CPU emulates {precision}, so it is likely to be slow. Some chips with AMX, "
                "AVX-512, or ARM instructions compute it in hardware."
            )
    return missing


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A GPU."""

    device: str  # of a recipe that uses it: "cuda", "mps" or "xpu"
    name: str
    memory_gib: float  # on Apple's chips, what the system recommends as the most
    capability: str  # compute capability (NVIDIA), architecture (AMD), or ""
    precisions: tuple[str, ...]  # that it computes in hardware


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What `describe()` found."""

    name: str  # of the processor
    system: str  # operating system and architecture
    cores: int  # logical ones that this process may use
    memory_gib: float
    units: tuple[str, ...]  # vector and matrix instruction sets of the CPU
    gpus: tuple[str, ...]  # names of those with device="cuda"
    compiler: str | None  # path of the C++ compiler that torch.compile would use
    # Precision: supported by the CPU. False: emulated and slow; None: the system does not tell.
    hardware: dict[str, bool | None]
    missing: dict[str, str]  # missing capability: what it would take
    versions: dict[str, str]
    accelerators: tuple[Accelerator, ...] = ()  # all of the kind that torch uses
    physical_cores: int | None = None  # of the machine; None if unknown
    logical_cores: int | None = None

    @property
    def accelerator(self) -> str:
        """The device of its GPUs; "cpu" without one."""
        return self.accelerators[0].device if self.accelerators else "cpu"

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-safe values."""
        return asdict(self)

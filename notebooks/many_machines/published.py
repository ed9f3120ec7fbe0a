"""Published scaling of clusters, with the specs that the predictor gets for them.

Throughputs are as published. Numbers that the source does not state come from the hardware's data
sheet or are assumed, and are marked so; none of them was measured by us. The bandwidth inside a
node is that of one device's links, in one direction.
"""

from dataclasses import dataclass
from typing import Any

# Data sheets, Gbit/s of one device in one direction. P100: 4 NVLinks of 20 GB/s. V100: 6 of 25.
# A100: 12 of 25. H100: 18 of 25. K80: two GPUs share the 16 GB/s of a PCIe 3 slot.
NVLINK_P100 = {"bandwidth_gbps": 640, "latency_us": 5}  # latencies here and below: assumed
NVLINK_V100 = {"bandwidth_gbps": 1200, "latency_us": 5}
NVLINK_A100 = {"bandwidth_gbps": 2400, "latency_us": 5}
NVLINK_H100 = {"bandwidth_gbps": 3600, "latency_us": 5}
PCIE_K80 = {"bandwidth_gbps": 64, "latency_us": 10}

EDR = {"bandwidth_gbps": 100, "latency_us": 5}  # one 100 Gbit/s InfiniBand adapter
EDR_4 = {"bandwidth_gbps": 400, "latency_us": 5}
EDR_8 = {"bandwidth_gbps": 800, "latency_us": 5}  # DGX-2H, data sheet
NDR_8 = {"bandwidth_gbps": 3200, "latency_us": 5}  # DGX H100, data sheet
ETHERNET_10 = {"bandwidth_gbps": 10, "latency_us": 50}
UNUSED = EDR  # no row of the table leaves the machine

# Parameters of the models in their papers' versions for ImageNet; Transformer-XL large: computed.
PARAMETERS = {
    "BERT base": 110e6,
    "Inception-V3": 23.8e6,
    "ResNet-50": 25.6e6,
    "ResNet-101": 44.5e6,
    "ResNet-152": 60.2e6,
    "Transformer big": 210e6,
    "Transformer-XL large": 285e6,
    "Llama 3.1 8B": 8.03e9,
}

# (input channels or features, outputs, kernel area, output positions) of each layer: parameters are
# the product of the first three, and backward takes its share of the product of all four.
VGG16 = [
    (3, 64, 9, 224**2),
    (64, 64, 9, 224**2),
    (64, 128, 9, 112**2),
    (128, 128, 9, 112**2),
    (128, 256, 9, 56**2),
    (256, 256, 9, 56**2),
    (256, 256, 9, 56**2),
    (256, 512, 9, 28**2),
    (512, 512, 9, 28**2),
    (512, 512, 9, 28**2),
    (512, 512, 9, 14**2),
    (512, 512, 9, 14**2),
    (512, 512, 9, 14**2),
    (25088, 4096, 1, 1),
    (4096, 4096, 1, 1),
    (4096, 1000, 1, 1),
]
ALEXNET = [
    (3, 64, 121, 55**2),
    (64, 192, 25, 27**2),
    (192, 384, 9, 13**2),
    (384, 256, 9, 13**2),
    (256, 256, 9, 13**2),
    (9216, 4096, 1, 1),
    (4096, 4096, 1, 1),
    (4096, 1000, 1, 1),
]
LAYERS = {"VGG-16": VGG16, "AlexNet": ALEXNET}

TENSORFLOW = "TensorFlow, performance benchmarks (May 2017)"
DEEP_LEARNING_EXAMPLES = "NVIDIA/DeepLearningExamples"
DLPERF = "Oneflow-Inc/DLPerf"
HOROVOD = "horovod/horovod, docs/benchmarks"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Throughputs of one configuration; efficiencies are relative to the smallest device count."""

    name: str
    source: str
    stack: str
    spec: dict[str, Any]
    rates: dict[int, float]  # devices: images/s or tokens/s of all devices

    @property
    def measured(self) -> dict[int, float]:
        """{devices: throughput per device relative to that of the smallest device count}."""
        base = min(self.rates)
        per_device = self.rates[base] / base
        return {n: rate / n / per_device for n, rate in self.rates.items() if n != base}


def model(name: str, bytes_per_parameter: float = 4) -> dict[str, Any]:
    if name not in LAYERS:
        parameters = PARAMETERS[name]
        return {"name": name, "parameters": parameters, "bytes_per_parameter": bytes_per_parameter}
    work = [inputs * outputs * area * places for inputs, outputs, area, places in LAYERS[name]]
    layers = [
        {"parameters": inputs * outputs * area, "backward_share": share / sum(work)}
        for (inputs, outputs, area, _), share in zip(LAYERS[name], work, strict=True)
    ]
    parameters = sum(layer["parameters"] for layer in layers)
    return {
        "name": name,
        "parameters": parameters,
        "bytes_per_parameter": bytes_per_parameter,
        "layers": layers,
    }


def table(name, source, stack, rates, batch, network, node, per_node=8, bytes_per_parameter=4):
    """A table whose spec predicts all its device counts. `name` starts with the model's."""
    base = min(rates)
    model_name = name.partition(",")[0]
    spec = {
        "model": model(model_name, bytes_per_parameter),
        "device": {"images_per_s": rates[base] / base, "batch": batch},
        "node": {"devices": per_node, **node},
        "network": network,
        "devices": sorted(rates),
    }
    return Table(name=name, source=source, stack=stack, spec=spec, rates=rates)


def tensorflow_dgx1(name, batch, *rates, stack="TensorFlow 1, NCCL 1"):
    counts = dict(zip((1, 2, 4, 8), rates, strict=True))
    label = f"{name}, DGX-1 P100, batch {batch}"
    return table(label, TENSORFLOW, stack, counts, batch, UNUSED, NVLINK_P100)


def tensorflow_k80(name, batch, *rates):
    counts = dict(zip((1, 8, 16, 32, 64), rates, strict=True))
    label = f"{name}, 8 x p2.8xlarge, 10 Gbit/s, batch {batch}"
    stack = "TensorFlow 1, parameter servers"
    return table(label, TENSORFLOW, stack, counts, batch, ETHERNET_10, PCIE_K80)


def tensorflow_p2(name, batch, *rates):
    counts = dict(zip((1, 2, 4, 8), rates, strict=True))
    label = f"{name}, one p2.8xlarge, batch {batch}"
    stack = "TensorFlow 1, copies through CPU or GPU"
    return table(label, TENSORFLOW, stack, counts, batch, UNUSED, PCIE_K80)


def mxnet(place, batch, precision, node, rates, per_node=8):
    label = f"ResNet-50, {place}, {precision}"
    bytes_per_parameter = 2 if precision == "AMP" else 4  # AMP: fp16 gradients, assumed
    source = f"{DEEP_LEARNING_EXAMPLES}, MxNet RN50v1.5"
    stack = "MXNet, Horovod"
    return table(label, source, stack, rates, batch, UNUSED, node, per_node, bytes_per_parameter)


def dlperf(stack, *rates, name="ResNet-50", batch=128, precision="fp32"):
    counts = dict(zip((1, 8, 16, 32), rates, strict=True))
    bytes_per_parameter = 2 if precision == "AMP" else 4  # AMP: fp16 gradients, assumed
    label = f"{name}, 4 x 8 V100, 100 Gbit/s, batch {batch}"
    if precision == "AMP":
        label += ", AMP"
    return table(
        label,
        DLPERF,
        stack,
        counts,
        batch,
        EDR,
        NVLINK_V100,
        bytes_per_parameter=bytes_per_parameter,
    )


def single_node(name, place, stack, batch, precision, node, rates, per_node=8):
    label = f"{name}, {place}, {precision}"
    bytes_per_parameter = 2 if precision == "AMP" else 4
    source = DEEP_LEARNING_EXAMPLES
    return table(label, source, stack, rates, batch, UNUSED, node, per_node, bytes_per_parameter)


def horovod(name, batch, rate, efficiency):
    rates = {1: rate, 512: 512 * rate * efficiency}  # the rate of one P100: assumed
    network = {"bandwidth_gbps": 25, "latency_us": 20}
    label = f"{name}, 128 x 4 P100, RoCE 25 Gbit/s"
    return table(label, HOROVOD, "TensorFlow 1, Horovod", rates, batch, network, NVLINK_P100, 4)


def transformer_xl(precision, bytes_per_parameter, rates):
    # batch 4 of 384 tokens; apex O2 has fp16 gradients
    label = f"Transformer-XL large, nodes of 16 V100 (DGX-2H), {precision}"
    source = f"{DEEP_LEARNING_EXAMPLES}, Transformer-XL"
    return table(
        label, source, "PyTorch DDP", rates, 4 * 384, EDR_8, NVLINK_V100, 16, bytes_per_parameter
    )


PARAMETER_SERVER = "TensorFlow 1, variables on the CPU"
TABLES = [
    tensorflow_dgx1("Inception-V3", 64, 142, 284, 569, 1131, stack=PARAMETER_SERVER),
    tensorflow_dgx1("ResNet-50", 64, 219, 422, 852, 1734, stack=PARAMETER_SERVER),
    tensorflow_dgx1("ResNet-152", 64, 91.8, 181, 356, 716, stack=PARAMETER_SERVER),
    tensorflow_dgx1("VGG-16", 64, 154, 295, 584, 1081),
    tensorflow_dgx1("VGG-16", 32, 144, 281, 549, 820),
    tensorflow_dgx1("AlexNet", 512, 2987, 5658, 10509, 17822),
    tensorflow_p2("Inception-V3", 64, 30.8, 58.7, 117, 230),
    tensorflow_p2("ResNet-50", 64, 51.5, 98.0, 195, 384),
    tensorflow_p2("AlexNet", 512, 684, 1244, 2479, 4853),
    tensorflow_p2("VGG-16", 32, 36.3, 69.4, 141, 260),
    tensorflow_k80("Inception-V3", 64, 29.7, 229, 459, 902, 1783),
    tensorflow_k80("ResNet-50", 64, 52.4, 378, 751, 1388, 2744),
    tensorflow_k80("ResNet-152", 32, 19.4, 146, 291, 565, 981),
    mxnet("DGX A100", 256, "AMP", NVLINK_A100, {1: 2180, 2: 4332, 4: 8587, 8: 16925}),
    mxnet("DGX A100", 256, "TF32", NVLINK_A100, {1: 1022, 2: 2032, 4: 4035, 8: 8001}),
    mxnet("DGX-1 V100", 192, "AMP", NVLINK_V100, {1: 1376, 2: 2768, 4: 5357, 8: 10723}),
    mxnet("DGX-1 V100", 96, "fp32", NVLINK_V100, {1: 384, 2: 763, 4: 1513, 8: 3005}),
    mxnet("DGX-2", 256, "AMP", NVLINK_V100, {1: 1492, 8: 11368, 16: 21484}, per_node=16),
    mxnet("DGX-2", 128, "fp32", NVLINK_V100, {1: 417, 8: 3223, 16: 6338}, per_node=16),
    table(  # per device 329 without DDP; with it 310, 310, 307 and 306
        "ResNet-50, V100, 4 x 100 Gbit/s, batch 32",
        "pytorch/benchmark, distributed/ddp",
        "PyTorch DDP",
        {1: 329, 2: 620, 4: 1240, 8: 2456, 16: 4896},
        32,
        EDR_4,
        NVLINK_V100,
    ),
    dlperf("OneFlow", 384.85, 2969, 5907, 11711),
    dlperf("PyTorch DDP", 354.40, 2719, 5307, 10632),
    dlperf("TensorFlow 2.3", 321.80, 2459, 4850, 9418),
    dlperf("Paddle", 352.72, 2625, 4895, 9348),
    dlperf("TensorFlow 1, Horovod", 362.44, 2722, 5099, 9515),
    transformer_xl("fp32", 4, {16: 69_070, 32: 136_960, 64: 270_120, 128: 514_500}),
    transformer_xl("AMP", 2, {16: 154_950, 32: 307_520, 64: 605_530, 128: 1_189_700}),
    table(  # FSDP gathers the parameters twice and scatters gradients once: 1.5 all-reduces in bf16
        "Llama 3.1 8B, nodes of 8 H100, FSDP",
        "pytorch/torchtitan",
        "PyTorch FSDP2",
        {8: 8 * 5762, 128: 128 * 5605},
        2 * 8192,  # two sequences, assumed
        NDR_8,
        NVLINK_H100,
        bytes_per_parameter=3,
    ),
]

# Tables that came later. Mixed precision makes steps so short, and BERT has so many parameters,
# that the software decides; ResNet-50 and Inception-V3 on Horovod are the opposite.
BERT: dict = {"name": "BERT base"}
AMP: dict = {"precision": "AMP"}
OTHER_TABLES = [
    dlperf("OneFlow 0.2", 397.64, 3130.34, 6260.30, 12411.97),
    dlperf("MXNet, NVIDIA", 392.24, 3006.98, 5758.49, 11331.93),
    dlperf("PyTorch, NVIDIA", 367.29, 2887.65, 5716.79, 10917.09),
    dlperf("MXNet, gluon", 384.19, 2556.03, 4855.34, 9579.74),
    dlperf("PyTorch 1.6, DDP", 348.62, 2632.93, 5115.40, 10021.29),
    dlperf("OneFlow 0.2", 1472.72, 10629.32, 17920.40, 33141.02, batch=256, **AMP),
    dlperf("MXNet, NVIDIA", 1393.87, 9621.31, 16219.03, 30713.68, batch=256, **AMP),
    dlperf("PyTorch, NVIDIA", 802.9, 6154.66, 11991.94, 22551.16, batch=256, **AMP),
    dlperf("OneFlow 0.2", 152.89, 1105.55, 2015.78, 3689.80, batch=32, **BERT),
    dlperf("OneFlow 0.2, no clipping", 153.94, 1194.48, 2181.51, 4019.45, batch=32, **BERT),
    dlperf("PyTorch, NVIDIA", 119.60, 921.32, 1499.40, 2885.81, batch=32, **BERT),
    dlperf("MXNet, no clipping", 150.11, 1058.60, 1845.65, 3671.45, batch=32, **BERT),
    dlperf("OneFlow 0.2", 156.02, 1201.70, 2352.92, 4664.10, batch=96, **BERT),
    dlperf("PyTorch, NVIDIA", 121.94, 928.01, 1584.32, 3039.30, batch=48, **BERT),
    dlperf("OneFlow 0.2", 605.11, 4381.66, 8075.16, 15724.70, batch=160, **BERT, **AMP),
    dlperf("PyTorch, NVIDIA", 462.35, 3287.12, 5426.07, 10349.12, batch=96, **BERT, **AMP),
    single_node("ResNet-50", "DGX A100", "PyTorch", 256, "TF32", NVLINK_A100, {1: 938, 8: 7248}),
    single_node("ResNet-50", "DGX A100", "PyTorch", 256, "AMP", NVLINK_A100, {1: 2470, 8: 16621}),
    single_node("ResNet-50", "DGX-1", "PyTorch", 256, "fp32", NVLINK_V100, {1: 367, 8: 2855}),
    single_node("ResNet-50", "DGX-1", "PyTorch", 256, "AMP", NVLINK_V100, {1: 1200, 8: 8322}),
    single_node(
        "Transformer big",
        "DGX A100",
        "PyTorch DDP",
        10240,
        "TF32",
        NVLINK_A100,
        {1: 51057, 4: 179245, 8: 347936},
    ),
    single_node(
        "Transformer big",
        "DGX-2",
        "PyTorch DDP",
        10240,
        "fp32",
        NVLINK_V100,
        {1: 9827, 4: 35216, 8: 68929, 16: 136253},
        16,
    ),
    horovod("Inception-V3", 64, 142, 0.90),
    horovod("ResNet-101", 64, 115, 0.90),
    horovod("VGG-16", 64, 154, 0.68),
]

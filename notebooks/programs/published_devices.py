"""Published peaks of devices for the roofline of lesson 08: none of them was measured by us.

A peak holds for the number format in the name of the device. Peaks in bf16 are for matrix products.
"""

# name: (kind, peak FLOP/s, bytes/s of its memory, source)
DEVICES = {
    "A64FX, fp32": (
        "CPU",
        48 * 2.2e9 * 2 * 16 * 2,
        1024e9,
        "Fujitsu, A64FX product catalog: 48 cores, 2.2 GHz, 1,024 GB/s; counted: 2 units of 512 "
        "bits in each core, 2 FLOP for each number",
    ),
    "H100 SXM, fp32": ("GPU", 67e12, 3.35e12, "NVIDIA, H100 data sheet: 67 TFLOP/s, 3.35 TB/s"),
    "H100 SXM, bf16": (
        "GPU",
        989e12,
        3.35e12,
        "NVIDIA, H100 data sheet: 1,979 TFLOP/s with sparsity, half of it without; 3.35 TB/s",
    ),
    "TPU7x, bf16": (
        "TPU",
        2307e12,
        7380e9,
        "Google Cloud documentation, TPU7x (Ironwood): 2,307 TFLOP/s and 7,380 GB/s for each chip",
    ),
    "Stratix 10 MX, fp32": (
        "FPGA",
        3960 * 2 * 1e9,
        512e9,
        "Intel, Stratix 10 MX device overview and board data: 3,960 DSP blocks with a multiplier "
        "and an adder, up to 1 GHz, up to 512 GB/s; counted, an upper limit",
    ),
    "Trainium3, bf16": (
        "ASIC",
        671e12,
        4.9e12,
        "AWS Neuron documentation, Trainium3: 671 TFLOP/s, 4.9 TB/s",
    ),
}

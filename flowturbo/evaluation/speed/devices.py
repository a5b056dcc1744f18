"""Devices by their published figures: the data of the roofline. Estimates use these, measurements do not.

fp16 with 32-bit accumulation, dense. GeForce parts: cores × 2 operations × boost clock × 2, since their tensor cores do
twice the shaders' rate at that accumulation (NVIDIA's whitepapers on GA102, Ada and Blackwell give 71, 165 and 209
TFLOP/s for RTX 3090, 4090 and 5090, which the rule meets). Laptops: at the highest boost clock; many makers set less.
Jetson: third-generation tensor cores do 0.512 TFLOP/s each per GHz, as AGX Orin's 64 do 42.6 at 1.3 GHz.
"""

from __future__ import annotations

from dataclasses import dataclass

_DESKTOP_SOURCE = "NVIDIA's comparison page of GeForce cards: cores, boost clock, memory"
_LAPTOP_SOURCE = "NVIDIA's comparison page of GeForce laptop GPUs: cores, highest boost clock, memory"
_EFFICIENCY = {"jetson": 0.33, "geforce": 0.45, "datacentre": 0.45, "cpu": 0.7}
EFFICIENCY_NOTES = {
    "jetson": "seen on Orin with networks of this kind",
    "geforce": "assumed to be the A800's; no figure of our own",
    "datacentre": "seen on an A800 with compiled PyTorch (FlowTurbo's table)",
    "cpu": "ONNX Runtime fp32 and OpenVINO bf16 reached about that share of a matrix product on a two-core Xeon",
}


@dataclass(frozen=True)
class Device:
    """A part.

    Attributes:
        tflops: dense matrix products in `precision`, TFLOP/s.
        gbytes: memory bandwidth, GB/s.
        kind: decides the share of the peak that networks reach.
        source: origin of the figures.
    """

    name: str
    kind: str
    tflops: float
    gbytes: float
    source: str
    precision: str = "fp16"

    @property
    def efficiency(self) -> float:
        """Return the share of the peak that networks reach on such devices: a rule of thumb."""
        return _EFFICIENCY[self.kind]


def _make_orin(name: str, cores: int, ghz: float, gbytes: float, source: str) -> Device:
    return Device(name, "jetson", round(0.512 * cores * ghz, 1), gbytes, source)


def _make_geforce(name: str, cores: int, mhz: float, gbytes: float, source: str = _DESKTOP_SOURCE) -> Device:
    return Device(name, "geforce", round(cores * mhz * 4 / 1e6, 1), gbytes, source)


def _make_laptop(name: str, cores: int, mhz: float, gbytes: float) -> Device:
    return _make_geforce(f"{name} laptop", cores, mhz, gbytes, _LAPTOP_SOURCE)


def _make_cpu(name: str, cores: int, ghz: float, flops_per_cycle: int, gbytes: float) -> Device:
    source = (
        f"{cores} cores × {ghz:g} GHz × {flops_per_cycle} operations a cycle (two fused multiply-adds of full width)"
    )
    return Device(name, "cpu", round(cores * ghz * flops_per_cycle / 1e3, 3), gbytes, source, "fp32")


DEVICES = (
    _make_orin(
        "Jetson Orin Nano 8GB Super",
        32,
        1.02,
        102,
        "NVIDIA Jetson Orin Nano Super data sheet: 1020 MHz, 67 sparse int8 TOPS",
    ),
    _make_orin("Jetson Orin NX 16GB Super", 32, 1.173, 102, "NVIDIA Jetson Orin NX data sheet: 1173 MHz in MAXN SUPER"),
    _make_orin("Jetson AGX Orin 64GB", 64, 1.3, 205, "NVIDIA Jetson AGX Orin technical brief: 1.3 GHz, 204.8 GB/s"),
    Device(
        "Jetson T5000 (AGX Thor)",
        "jetson",
        258.8,
        273,
        "NVIDIA Jetson Thor data sheet: 2070 sparse fp4 TFLOPS, an eighth of it dense fp16; 273 GB/s",
    ),
    _make_geforce("RTX 3060", 3584, 1777, 360),
    _make_geforce("RTX 3070", 5888, 1725, 448),
    _make_geforce("RTX 3080", 8704, 1710, 760),
    _make_geforce("RTX 3090", 10496, 1695, 936),
    _make_geforce("RTX 4060", 3072, 2460, 272),
    _make_geforce("RTX 4070", 5888, 2475, 504),
    _make_geforce("RTX 4080", 9728, 2505, 717),
    _make_geforce("RTX 4090", 16384, 2520, 1008),
    _make_geforce("RTX 5060", 3840, 2497, 448),
    _make_geforce("RTX 5070", 6144, 2512, 672),
    _make_geforce("RTX 5080", 10752, 2617, 960),
    _make_geforce("RTX 5090", 21760, 2407, 1792),
    _make_laptop("RTX 3060", 3840, 1702, 336),
    _make_laptop("RTX 4060", 3072, 2370, 256),
    _make_laptop("RTX 4070", 4608, 2175, 256),
    _make_laptop("RTX 4080", 7424, 2280, 432),
    _make_laptop("RTX 4090", 9728, 2040, 576),
    _make_laptop("RTX 5070", 4608, 2347, 384),
    _make_laptop("RTX 5080", 7680, 2287, 896),
    _make_laptop("RTX 5090", 10496, 2160, 896),
    Device("A100 / A800 80GB", "datacentre", 312, 2039, "NVIDIA A100 data sheet (SXM)"),
    Device("H100 SXM", "datacentre", 989, 3350, "NVIDIA H100 data sheet"),
    Device("H200 SXM", "datacentre", 989, 4800, "NVIDIA H200 data sheet"),
    _make_cpu("CPU, 4 cores, AVX2", 4, 3.0, 32, 40),
    _make_cpu("CPU, 8 cores, AVX-512", 8, 3.0, 64, 80),
)

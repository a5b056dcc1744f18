"""TensorRT 10.x, 11.x and TensorRT-RTX: their modules, and how the releases differ.

Builder (export/tensorrt/worker.py) and runner (tensorrt.py) share this table, so a new release is one row here. No
module of NVIDIA's is imported before `load_api` is called.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from runtime.system.cuda_driver import Gpu
from runtime.system.errors import BackendError, EngineError
from runtime.system.hardware import TENSORRT_MODULES, is_tegra, is_tensorrt_installed
from runtime.system.json_codec import JsonObject

Flavour = Literal["tensorrt", "rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "rtx")
FLAVOUR_NAMES: dict[Flavour, str] = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
_LOG_LINES = 40


@dataclass(frozen=True)
class ReleaseTraits:
    """How one major release of one flavour differs from the others.

    Attributes:
        needs_typed_flag: strong typing is a flag of the network, always passed; 11 has no other kind.
        can_build_without_gpu: the builder compiles ahead of time and needs no driver.
        has_runtime_config: the runner may choose `IRuntimeConfig`: the JIT's cache and native CUDA graphs.
        is_portable: one engine runs on many kinds of GPU; otherwise only on the kind that built it.
    """

    needs_typed_flag: bool
    can_build_without_gpu: bool
    has_runtime_config: bool
    is_portable: bool


RELEASE_TRAITS: dict[tuple[Flavour, int], ReleaseTraits] = {
    ("tensorrt", 10): ReleaseTraits(True, False, False, False),
    ("tensorrt", 11): ReleaseTraits(False, False, False, False),
    ("rtx", 1): ReleaseTraits(True, True, True, True),
}
"""JetPack 6 has 10.3, JetPack 7.2 has 10.16; elsewhere it is 11."""


@dataclass(frozen=True)
class TensorRTApi:
    """An imported TensorRT: its module `trt`, its version and traits."""

    flavour: Flavour
    trt: Any
    version: str
    traits: ReleaseTraits

    @property
    def name(self) -> str:
        """E.g. "TensorRT-RTX 1.7.1.116"."""
        return f"{FLAVOUR_NAMES[self.flavour]} {self.version}"


def find_installed_version(flavour: Flavour) -> str | None:
    """Return the version of the installed package, without importing it; None if there is none."""
    if not is_tensorrt_installed(flavour):
        return None
    for distribution in importlib.metadata.packages_distributions().get(TENSORRT_MODULES[flavour], []):
        return importlib.metadata.version(distribution)
    return "unknown"


def format_install_hint(flavour: Flavour) -> str:
    """Return the command that installs a flavour here. On a Jetson that is not PyPI's TensorRT, which lacks its GPU."""
    if flavour == "tensorrt" and is_tegra():
        return (
            "use JetPack's own TensorRT, not PyPI's: sudo apt-get install tensorrt python3-libnvinfer, then make the"
            " virtual environment with: python3 -m venv --system-site-packages .venv (docs/jetson.md)"
        )
    return f"pip install 'flowturbo[{flavour}]'"


def format_rebuild_command(flavour: Flavour) -> str:
    """Return the command that builds engines for this machine from a directory's own ONNX files."""
    return f"flowturbo-export build-engines --from DIR --target {flavour} --rebuild"


def load_api(flavour: Flavour) -> TensorRTApi:
    """Import a flavour.

    Raises:
        BackendError: it is missing, does not load, or is a release this project does not know.
    """
    try:
        trt = importlib.import_module(TENSORRT_MODULES[flavour])
        version = str(trt.__version__)
    except Exception as error:  # a broken installation may raise anything
        given = f"{FLAVOUR_NAMES[flavour]} cannot be imported: {error}"
        raise BackendError(given, remedy=format_install_hint(flavour)) from error
    major = int(version.split(".")[0])
    traits = RELEASE_TRAITS.get((flavour, major))
    if traits is None:
        known_releases = ", ".join(f"{known_major}.x" for name, known_major in RELEASE_TRAITS if name == flavour)
        raise BackendError(
            f"{FLAVOUR_NAMES[flavour]} {version} is a release this version of flowturbo does not know",
            allowed=known_releases,
            remedy=f"install one of these: {format_install_hint(flavour)}",
        )
    return TensorRTApi(flavour, trt, version, traits)


class LogBuffer:
    """The last warnings and errors of TensorRT's log: only they say why a call returned None."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, text: str) -> None:
        self.lines = [*self.lines, text][-_LOG_LINES:]

    def drain(self) -> str:
        """Return the text so far, and clear it."""
        lines, self.lines = self.lines, []
        return "\n  ".join(dict.fromkeys(lines))


def make_logger(api: TensorRTApi, text: LogBuffer) -> Any:
    """Make a TensorRT logger that writes warnings and errors to `text`; it must outlive its users."""
    base: Any = api.trt.ILogger  # only known once a flavour is imported
    warning = base.Severity.WARNING

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= warning:
                text.add(f"[{severity.name}] {message}")

    return Logger()


@dataclass(frozen=True)
class EngineBuildInfo:
    """What an engine depends on; the manifest has it, and `check_engine_origin` compares it with this machine.

    Attributes:
        flavour, version: of the builder.
        capabilities: compute capabilities it runs on, e.g. ("8.7",); a trailing "+" means and later.
        gpu: the GPU it was built on, None if it was built without one.
        l4t: L4T release of a Jetson, None elsewhere.
    """

    flavour: Flavour
    version: str
    capabilities: tuple[str, ...]
    gpu: str | None = None
    l4t: str | None = None

    def to_json(self) -> JsonObject:
        return {**asdict(self), "capabilities": list(self.capabilities)}

    @classmethod
    def from_json(cls, data: JsonObject) -> EngineBuildInfo:
        return cls(**{**data, "capabilities": tuple(data["capabilities"])})


def check_engine_origin(build_info: EngineBuildInfo, api: TensorRTApi, gpu: Gpu, rebuild: str) -> None:
    """Compare an engine's build with this machine. `rebuild` is the command that makes one that fits.

    Raises:
        EngineError: it was built by another release or for another GPU (`--allow-foreign` skips this check).
    """
    remedy = f"{rebuild}   (or --allow-foreign to try it all the same)"
    if (build_info.flavour, build_info.version) != (api.flavour, api.version):
        raise EngineError(
            f"the engine was built with {FLAVOUR_NAMES[build_info.flavour]} {build_info.version}; here is {api.name}",
            allowed="engines of exactly this release",
            remedy=remedy,
        )
    if not is_capability_supported(build_info.capabilities, gpu.capability):
        builder = f" on {build_info.gpu}" if build_info.gpu else ""
        raise EngineError(
            f"the engine was built{builder} for compute capability {', '.join(build_info.capabilities)};"
            f" {gpu.name} has {gpu.sm}",
            remedy=remedy,
        )


def is_capability_supported(capabilities: Sequence[str], capability: tuple[int, int]) -> bool:
    """Return whether a GPU is among `capabilities`; "8.0+" includes every later one."""
    for text in capabilities:
        major, minor = (int(part) for part in text.rstrip("+").split("."))
        if capability == (major, minor) or (text.endswith("+") and capability > (major, minor)):
            return True
    return False

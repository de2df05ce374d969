"""TensorRT plans on disk: their dependencies, their manifests, and the search for the plan that fits this machine.

    BUNDLE/plans/KEY/model.plan    the serialized engine
    BUNDLE/plans/KEY/plan.json     the manifest: what it was built for, its settings, its contents and its sha256
    BUNDLE/plans/KEY/cache-*.bin   kernels that TensorRT for RTX compiled on a card, for the next load on it
    BUNDLE/plans/timing-*.cache    kernel timings on a GPU, for the next build on it

The key is the start of the sha256 of everything that a plan depends on. So another GPU, version or option gets another
plan. This module neither builds nor runs a plan, and needs no TensorRT.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from platform import machine, system
from typing import Any, Literal, get_args

from cllm_export.bundle.contract import CONTRACT_VERSION
from cllm_export.bundle.manifest import GREEDY_GRAPH, Bundle
from cllm_export.bundle.storage import sha256_of
from cllm_export.checks import from_fields, require_at_least, require_one_of
from cllm_export.errors import OptionError, PlanError
from cllm_export.tensorrt.library import LIBRARIES, LibraryName
from cllm_export.tensorrt.plan_contents import PlanContents, profile_names

log = logging.getLogger(__name__)

PLAN_SCHEMA_VERSION = 3
PLANS_DIRECTORY = "plans"
PLAN_NAME, PLAN_MANIFEST_NAME = "model.plan", "plan.json"
KEY_LENGTH = 16
BUILD_AGAIN = "build it again: cllm-export plan with the same options and --force"
"""What to do about a damaged plan, whose directory holds the place of a sound one."""

Hardware = Literal["same", "compute-capability", "ampere+"]
HARDWARE: tuple[Hardware, ...] = get_args(Hardware)
"""The GPUs that a plan runs on: the same GPU model, all of its compute capability, or all from Ampere on."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """The settings of a plan's build, with no default left open."""

    batch_size: int
    """B, the slots of the engine."""
    block_sizes: tuple[int, ...]
    """Each n that has an optimization profile, ascending."""
    prefill_chunk: int
    """Largest number of tokens of a prefill forward."""
    kv_lengths: tuple[int, ...]
    """KV lengths S that forwards run with, ascending. The last is the whole cache."""
    workspace: int | None
    """Bytes of scratch memory that the builder may give to a kernel; None for all memory of the device."""
    optimization_level: int
    """0 to 5: how long TensorRT looks for faster kernels."""
    logits: bool
    """Whether logits can be fetched. If not, sampled and constrained requests are refused."""
    weight_streaming: bool
    """Weights may stay in host memory and cross the bus in every forward."""
    strip_weights: bool
    """The plan holds no weights. They are taken from the bundle when the plan is loaded."""
    version_compatible: bool
    """The plan also runs on later TensorRT versions with the same major number. It can use only kernels that all of
    them have."""
    hardware: Hardware
    single_row_kernels: bool = False
    """n = 1 has kernels of its own, which read a second copy of every linear layer's weights."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "prefill_chunk"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("block_sizes", "kv_lengths"):
            values = getattr(self, name)
            if not values or any(type(value) is not int or value < 1 for value in values):
                raise OptionError(f"{name} must be positive integers, at least one, got {list(values)}")
            if list(values) != sorted(set(values)):
                raise OptionError(f"{name} must ascend, got {list(values)}")
        if self.workspace is not None:
            require_at_least("workspace", self.workspace, 1)
        if self.optimization_level not in range(6):
            raise OptionError(f"optimization_level must be 0 to 5, got {self.optimization_level}")
        require_one_of("hardware", self.hardware, HARDWARE)

    def command(self, bundle: Bundle, built_for: Platform | Targets, here: Platform) -> str:
        """The command that builds a plan with these settings, which runs on this machine too."""
        words = ["cllm-export", "plan", str(bundle.path), "--engine", built_for.engine]
        if isinstance(built_for, Targets):
            known = LIBRARIES[built_for.engine].targets
            targets = [each for each in known if each in (*built_for.targets, here.generation)]
            words += [word for target in targets for word in ("--for", target)]
        if bundle.manifest.graphs[GREEDY_GRAPH].fixed_shapes is None:
            words += ["--batch-size", str(self.batch_size)]
            words += [word for size in self.block_sizes for word in ("--block-size", str(size))]
            words += ["--prefill-chunk", str(self.prefill_chunk)]
            words += [word for kv_length in self.kv_lengths for word in ("--kv-length", str(kv_length))]
        if self.workspace is not None:
            words += ["--workspace", str(self.workspace)]
        words += ["--optimization-level", str(self.optimization_level)]
        words += [] if self.hardware == "same" else ["--hardware", self.hardware]
        words += [] if self.logits else ["--no-logits"]
        for name in ("weight_streaming", "strip_weights", "version_compatible", "single_row_kernels"):
            words += ["--" + name.replace("_", "-")] if getattr(self, name) else []
        return shlex.join(words)


@dataclass(frozen=True, kw_only=True)
class Platform:
    """A GPU and its software. A plan that was built on it is tied to all of them, besides its bundle and settings."""

    gpu: str
    compute_capability: str
    tensorrt: str
    driver: str
    """The newest CUDA version that the driver supports."""
    engine: LibraryName = "tensorrt"

    @property
    def generation(self) -> str:
        """The GPU's compute capability as TensorRT names it, such as sm89."""
        return f"sm{self.compute_capability.replace('.', '')}"

    def differences(self, here: Platform, settings: PlanSettings) -> list[str]:
        """What of this machine differs from the one that the plan was built on, and matters."""
        hardware, compared = settings.hardware, []
        if hardware == "same":
            compared.append(("GPU", self.gpu, here.gpu, self.gpu == here.gpu))
        same_capability = self.compute_capability == here.compute_capability
        from_ampere = hardware == "ampere+" and int(here.compute_capability.split(".")[0]) >= 8
        compared += [
            ("compute capability", self.compute_capability, here.compute_capability, same_capability or from_ampere),
            ("TensorRT", self.tensorrt, here.tensorrt, self._runs_on(here.tensorrt, settings)),
            ("driver (CUDA)", self.driver, here.driver, self.driver == here.driver),
        ]
        return _stated(compared)

    def _runs_on(self, version: str, settings: PlanSettings) -> bool:
        if not settings.version_compatible:
            return self.tensorrt == version
        mine, other = (tuple(map(int, text.split("."))) for text in (self.tensorrt, version))
        return mine[0] == other[0] and mine <= other


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The generations of cards that a plan was built for, on any machine, and the library that built it."""

    targets: tuple[str, ...]
    """Compute capabilities as TensorRT names them, such as sm89, ascending."""
    tensorrt: str
    system: str
    """Operating system and processor that the plan runs on, such as ``Linux x86_64``."""
    engine: LibraryName = "tensorrt-rtx"

    def __post_init__(self) -> None:
        if not self.targets:
            raise OptionError("a plan without a GPU needs targets, got none", fields=("targets",))

    def differences(self, here: Platform, settings: PlanSettings) -> list[str]:
        """What of this machine is not among what the plan was built for."""
        mine = here.generation
        return _stated(
            [
                ("generation", ", ".join(self.targets), mine, mine in self.targets),
                ("TensorRT for RTX", self.tensorrt, here.tensorrt, self.tensorrt == here.tensorrt),
                ("system", self.system, this_system(), self.system == this_system()),
            ]
        )


def this_system() -> str:
    """Operating system and processor of this machine."""
    return f"{system()} {machine()}"


def _stated(compared: list[tuple[str, str, str, bool]]) -> list[str]:
    return [f"{name}: built for {mine}, here is {yours}" for name, mine, yours, same in compared if not same]


@dataclass(frozen=True, kw_only=True)
class PlanManifest:
    """The content of ``plan.json``."""

    bundle_fingerprint: str
    platform: Platform | Targets
    """What the plan runs on."""
    settings: PlanSettings
    size: int
    """Bytes of the plan."""
    sha256: str
    contents: PlanContents | None
    """What the builder says is inside. None if it says nothing that can be read."""
    schema_version: int = PLAN_SCHEMA_VERSION
    contract_version: int = CONTRACT_VERSION

    @property
    def key(self) -> str:
        return plan_key(self.bundle_fingerprint, self.platform, self.settings)

    @property
    def built_by(self) -> str:
        """The library that built it, and its version."""
        return f"{LIBRARIES[self.platform.engine].title} {self.platform.tensorrt}"

    @property
    def built_for(self) -> str:
        """The GPU or the generations of cards that it runs on."""
        here = self.platform
        if isinstance(here, Targets):
            return f"{', '.join(here.targets)} on {here.system}"
        return f"{here.gpu}, {here.generation}, driver for CUDA {here.driver}"

    def command(self, bundle: Bundle, here: Platform) -> str:
        """The command that builds this plan again, for this machine too."""
        return self.settings.command(bundle, self.platform, here)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: Path) -> PlanManifest:
        """Parse a manifest. Unknown and missing keys are errors.

        Raises:
            PlanError: it is not the manifest of a plan, or it has another schema or contract version.
        """
        try:
            raw = json.loads(text)
            for name, own in (("schema_version", PLAN_SCHEMA_VERSION), ("contract_version", CONTRACT_VERSION)):
                if raw[name] != own:
                    raise PlanError(f"{source} has {name} {raw[name]!r}, this cllm-export reads {own}: build it again")
            settings = {**raw["settings"], "block_sizes": tuple(raw["settings"]["block_sizes"])}
            settings["kv_lengths"] = tuple(raw["settings"]["kv_lengths"])
            raw["settings"] = from_fields(PlanSettings, settings)
            raw["platform"] = _platform_from(raw["platform"])
            raw["contents"] = PlanContents.from_json(raw["contents"]) if raw["contents"] else None
            return from_fields(cls, raw)
        except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
            raise PlanError(f"{source} is damaged: {error}; {BUILD_AGAIN}") from None

    def differences(self, fingerprint: str, here: Platform) -> list[str]:
        """All relevant differences between this bundle and machine and those that the plan was built for."""
        same = self.bundle_fingerprint == fingerprint
        found = _stated([("bundle", self.bundle_fingerprint, fingerprint, same)])
        if self.platform.engine != here.engine:
            return [*found, f"library: built by {self.platform.engine}, here is {here.engine}"]
        return found + self.platform.differences(here, self.settings)


def _platform_from(raw: dict[str, Any]) -> Platform | Targets:
    if "targets" not in raw:
        return from_fields(Platform, raw)
    return from_fields(Targets, {**raw, "targets": tuple(raw["targets"])})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan on disk. Its file has the size that its manifest gives."""

    path: Path
    """Its directory."""
    manifest: PlanManifest

    @property
    def file(self) -> Path:
        return self.path / PLAN_NAME

    @property
    def built_at(self) -> int:
        """When its manifest was written, in nanoseconds since 1970."""
        return (self.path / PLAN_MANIFEST_NAME).stat().st_mtime_ns

    def check_file(self) -> None:
        """Compare the plan's sha256 with its manifest.

        Raises:
            PlanError: it differs.
        """
        if (actual := sha256_of(self.file)) != self.manifest.sha256:
            raise PlanError(
                f"{self.file} is corrupted: its sha256 is {actual}, its manifest says {self.manifest.sha256}; "
                + BUILD_AGAIN
            )


def plan_key(fingerprint: str, platform: Platform | Targets, settings: PlanSettings) -> str:
    """Name of a plan's directory. It is unique for a bundle, what the plan runs on, and settings."""
    depends: dict[str, Any] = {
        "bundle": fingerprint,
        "platform": asdict(platform),
        "settings": asdict(settings),
        "schema": [PLAN_SCHEMA_VERSION, CONTRACT_VERSION],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def file_name_of(text: str) -> str:
    """A text as part of a file's name: anything but letters and digits becomes a hyphen."""
    return "".join(letter if letter.isalnum() else "-" for letter in text)


def plans_of(bundle: Bundle) -> Path:
    """The directory of a bundle's plans."""
    return bundle.path / PLANS_DIRECTORY


def open_plan(path: Path) -> Plan:
    """Open the plan in a directory.

    Raises:
        PlanError: there is none, or it is damaged.
    """
    manifest_path = path / PLAN_MANIFEST_NAME
    try:
        manifest = PlanManifest.from_json(manifest_path.read_text(encoding="utf-8"), source=manifest_path)
        size = (path / PLAN_NAME).stat().st_size
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} holds no plan: {error}; build one with: cllm-export plan BUNDLE") from None
    if size != manifest.size:
        raise PlanError(f"{path / PLAN_NAME} has {size} bytes, its manifest says {manifest.size}; {BUILD_AGAIN}")
    return Plan(path=path, manifest=manifest)


def find_plan(bundle: Bundle, here: Platform) -> Plan:
    """The plan of a bundle that runs on this machine. If several do, it is the newest, and a warning says which.

    Raises:
        PlanError: no plan fits. The message lists each plan's differences and the command that rebuilds it.
    """
    plans = plans_in(bundle)
    if not plans:
        build = f"cllm-export plan {bundle.path} --engine {here.engine}"
        build += f" --for {here.generation}" if LIBRARIES[here.engine].targets else ""
        raise PlanError(f"{bundle.path} has no plan; build one with: {build}")
    reasons = [(plan, plan.manifest.differences(bundle.fingerprint, here)) for plan in plans]
    fitting = [plan for plan, differences in reasons if not differences]
    if fitting:
        return _newest(fitting, bundle)
    lines = [
        f"  {plan.path.name}: {'; '.join(differences)}; rebuild with: {plan.manifest.command(bundle, here)}"
        for plan, differences in reasons
    ]
    raise PlanError(f"no plan of {bundle.path} runs here:\n" + "\n".join(lines))


def _newest(plans: list[Plan], bundle: Bundle) -> Plan:
    """The plan that was built last. If there are others, a warning names it and them."""
    newest, *others = sorted(plans, key=lambda plan: (plan.built_at, plan.path.name), reverse=True)
    if others:
        log.warning(
            "%s has %d plans that run here: the newest is taken, %s; choose another with plan (--plan): %s",
            bundle.path,
            len(plans),
            _told(newest),
            "; ".join(map(_told, others)),
        )
    return newest


def _told(plan: Plan) -> str:
    """A plan's key, and what tells it from others that run on the same machine."""
    settings = plan.manifest.settings
    sizes = ", ".join(map(str, settings.block_sizes))
    return f"{plan.path.name} (n = {sizes}, {settings.batch_size} slot{'s' * (settings.batch_size != 1)})"


def named_plan(bundle: Bundle, key: str) -> Plan:
    """The plan of a bundle with this key, whatever it runs on.

    Raises:
        OptionError: the bundle has plans, and none of this key. The message names them.
        PlanError: the bundle has no plan, or this one is damaged.
    """
    directories = {path.name: path for path in _plan_directories(bundle)}
    if not directories:
        raise PlanError(f"{bundle.path} has no plan, so none of key {key!r}; build one with: cllm-export plan BUNDLE")
    require_one_of("plan", key, tuple(directories))
    return open_plan(directories[key])


def require_fit(plan: Plan, bundle: Bundle, here: Platform) -> None:
    """Check that a plan is this bundle's and runs on this machine.

    Raises:
        PlanError: it does not. The message lists the differences and the command that rebuilds the plan.
    """
    if differences := plan.manifest.differences(bundle.fingerprint, here):
        raise PlanError(
            f"{plan.path} does not run here: {'; '.join(differences)}; "
            f"rebuild it with: {plan.manifest.command(bundle, here)}"
        )


def describe_plans(bundle: Bundle) -> list[dict[str, Any]]:
    """Each plan of a bundle, JSON-ready: what built it, for what, and what is inside. A damaged one has an error."""
    return [_describe_plan(path, bundle) for path in _plan_directories(bundle)]


def _describe_plan(path: Path, bundle: Bundle) -> dict[str, Any]:
    try:
        manifest = open_plan(path).manifest
    except PlanError as error:
        return {"key": path.name, "error": str(error)}
    contents = asdict(manifest.contents) if manifest.contents else None
    if contents:
        names = profile_names(manifest.settings.block_sizes, len(contents["profiles"]))
        contents["profiles"] = [{"name": name, **each} for name, each in zip(names, contents["profiles"], strict=True)]
    return {
        "key": path.name,
        "error": None,
        "built_by": manifest.built_by,
        "built_for": manifest.built_for,
        "is_of_this_bundle": manifest.bundle_fingerprint == bundle.fingerprint,
        "size": manifest.size,
        "settings": asdict(manifest.settings),
        "contents": contents,
    }


def plans_in(bundle: Bundle) -> list[Plan]:
    """Every plan of a bundle that can be read, whatever it runs on: an old one must not keep a new one from running.

    Raises:
        PlanError: there are plans, and none of them can be read.
    """
    plans: list[Plan] = []
    unreadable: list[PlanError] = []
    for path in _plan_directories(bundle):
        try:
            plans.append(open_plan(path))
        except PlanError as error:
            unreadable.append(error)
    if unreadable and not plans:
        raise unreadable[0]
    return plans


def _plan_directories(bundle: Bundle) -> Iterator[Path]:
    directory = plans_of(bundle)
    if directory.is_dir():
        yield from sorted(path.parent for path in directory.glob(f"[!.]*/{PLAN_MANIFEST_NAME}"))

"""Compile the native engine into wheels for x86-64 Linux where a compiler is there; elsewhere the wheel stays pure and
the engine is compiled at its first use, or not at all."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src", "loci", "lm", "engine", "native")


class NativeEngineHook(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable":
            return
        # By its path: the package itself needs what is not installed while a wheel is built.
        spec = importlib.util.spec_from_file_location("native_build", Path(self.root) / NATIVE / "build.py")
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        if build.why_not_here():
            return
        self._folder = tempfile.TemporaryDirectory(prefix="loci-wheel-")
        target = Path(self._folder.name) / build.file_name()
        try:
            build.compile_into(target)
        except build.CannotBuild as error:
            self.app.display_warning(f"the native engine is not in this wheel: {error}")
            return
        build_data["force_include"][str(target)] = str(Path("loci", *NATIVE.parts[2:], target.name))
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        folder = getattr(self, "_folder", None)
        if folder is not None:
            folder.cleanup()

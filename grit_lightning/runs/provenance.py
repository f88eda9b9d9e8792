"""What a run was made with: versions, commit, seed, device, and the memory it took."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    "grit-lightning",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "datasets",
    "torchmetrics",
    "bitsandbytes",
)


def versions() -> dict[str, str | None]:
    """Return the version of Python and of each package that shapes a run; None for one that is not installed.

    Of torch it is the version that names the build too (`2.14.1+cu130`), which its package metadata leave out.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package.replace("-", "_")] = None
    return found | {"torch": str(torch.__version__)}


def git_state(folder: Path | None = None) -> tuple[str | None, bool | None]:
    """Return the commit of the repository around `folder`, and whether tracked files differ from it.

    Args:
        folder: Where to look; the working directory if None.

    Returns:
        (None, None) outside a repository, in one without a commit, or without git.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _git(folder: Path | None, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or git refuses its owner
        return None
    return result.stdout.strip()


def global_seed() -> int | None:
    """Return the seed that `lightning.seed_everything` was last given, None if it was not called."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return None if seed is None else int(seed)


def device_name(device: torch.device) -> str:
    """Return what a person would call the device: the GPU's product name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_rss_bytes() -> int | None:
    """Return the most host memory this process has held since its start, in bytes; None where it is not counted."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the most memory held where the model is trained, in bytes: tensors on a GPU, the process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()

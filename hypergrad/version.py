"""Which version this is: that of the installed distribution, which pyproject.toml states."""

from importlib import metadata

try:
    __version__ = metadata.version("hypergrad-jax")
except metadata.PackageNotFoundError:  # sources on a path, not installed
    __version__ = "0+unknown"

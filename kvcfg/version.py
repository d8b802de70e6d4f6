"""The version of kvcfg, as installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kvcfg")
except PackageNotFoundError:
    # A checkout on the path that was never installed.
    __version__ = "0+checkout"

"""One config to every engine, with what each cannot say, will change, or counts otherwise. Torch-free."""

from kvcfg.exporters.engines import ENGINES, EngineVersion, export, export_all, find_version, versions
from kvcfg.exporters.exported import Conversion, Export, Loss, SilentChange

__all__ = [
    "ENGINES",
    "Conversion",
    "EngineVersion",
    "Export",
    "Loss",
    "SilentChange",
    "export",
    "export_all",
    "find_version",
    "versions",
]

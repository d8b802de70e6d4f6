"""An engine's command line or file as a config of kvcfg, with what was left out. Torch-free."""

from kvcfg.importers.imported import Imported
from kvcfg.importers.reading import read_config

__all__ = ["Imported", "read_config"]

"""Makes `kvcfg_schema` known to every Hydra application of the environment.

Hydra imports all of `hydra_plugins` when it starts; this import is all the plug-in does. Groups stay out of an
application until it asks for them with `hydra.searchpath: [pkg://kvcfg.conf]`.
"""

from kvcfg.config.structured import register

register()

"""In MAX's environment: what its own models make of the sections of a recipe, as JSON; an unknown key is an error."""

from __future__ import annotations

import json
import sys
from typing import Any

import yaml
from max.pipelines.kv_cache.config import KVCacheConfig
from max.pipelines.lib.config.model_config import MAXModelConfig
from max.pipelines.lib.pipeline_runtime_config import PipelineRuntimeConfig
from max.pipelines.speculative.config import SpeculativeConfig


def known(model: Any, section: dict[str, Any]) -> None:
    unknown = section.keys() - model.model_fields.keys()
    assert not unknown, f"{model.__name__} has no {unknown}"


with open(sys.argv[1], encoding="utf-8") as file:
    recipe = yaml.safe_load(file)
assert recipe.keys() <= {"model", "draft_model", "speculative", "runtime"}
known(MAXModelConfig, recipe["model"])
known(PipelineRuntimeConfig, recipe.get("runtime", {}))
cache = KVCacheConfig(**recipe["model"].pop("kv_cache"))
drafts = SpeculativeConfig(**recipe.get("speculative", {}))
print(json.dumps({"cache": cache.model_dump(mode="json"), "drafts": drafts.model_dump(mode="json"), **recipe["model"]}))

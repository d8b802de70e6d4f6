"""In vLLM's environment: what its own parser makes of a file, as JSON; with `run`, load the model and generate."""

from __future__ import annotations

import json
import sys
from dataclasses import fields

import vllm  # first, as its command line does
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main(path: str, run: bool) -> None:
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(["--config", path])
    if not run:  # the parser alone: EngineArgs looks for the model
        print(json.dumps(vars(parsed), default=lambda value: getattr(value, "__dict__", str(value))))
        return
    arguments = EngineArgs.from_cli_args(parsed)
    found = {field.name: getattr(arguments, field.name) for field in fields(EngineArgs)}
    defaults = EngineArgs(model=arguments.model)
    given = {name: value for name, value in found.items() if value != getattr(defaults, name)}
    engine = vllm.LLM(**{"model": arguments.model} | given, enforce_eager=True, disable_log_stats=True)
    [answer] = engine.generate(["The capital of France is"], vllm.SamplingParams(max_tokens=8, temperature=0))
    cache = engine.llm_engine.vllm_config.cache_config
    ran = {"text": answer.outputs[0].text, "block_size": cache.block_size, "blocks": cache.num_gpu_blocks}
    print(json.dumps(ran | {"dtype": cache.cache_dtype, "prefixes": cache.enable_prefix_caching}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] == ["run"])

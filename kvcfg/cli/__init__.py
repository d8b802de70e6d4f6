"""`kvcfg VERB overrides…`: one command line for every verb.

    kvcfg plan model=llama-3.1-8b devices=h100x8          one run
    kvcfg eval cache=fp8,int8 -m                          every combination
    kvcfg plan --cfg job                                  Hydra's own options work too

The whole grid is composed and checked before anything runs: what is wrong comes in one report on stderr, exit
code 2. What a run itself finds (a gate, no memory, a package that is missing) is one line, exit code 1. Stdout
carries the result alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kvcfg.cli.arguments import HELP, Arguments, read_arguments
from kvcfg.errors import ConfigError, KvcfgError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 1 a run failed, 2 nothing was run."""
    try:
        code = _run(read_arguments(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return _say(error, 2)
    except KvcfgError as error:
        return _say(error, 1)
    except BrokenPipeError:  # whoever read stdout, like `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _say("interrupted", 130)


def _run(arguments: Arguments) -> int:
    if arguments.verb is None:
        print(HELP)
        return 0
    if arguments.hydra_options:
        from kvcfg.cli.hydra_app import run_app

        return run_app(arguments)
    from kvcfg.cli.verbs import RUNS
    from kvcfg.composition.composer import Composer
    from kvcfg.composition.grids import expand
    from kvcfg.composition.points import compose_point

    composer = Composer(arguments.verb, arguments.config_dir)
    overrides = arguments.overrides
    points = expand(composer, overrides) if arguments.is_sweep else [compose_point(composer, overrides)]
    if any(point.error for point in points):
        from kvcfg.cli.report import report

        return _say(report(points), 2)
    return RUNS[arguments.verb](arguments, points)


def _say(message: object, code: int) -> int:
    lines = [f"kvcfg: {line}" if not line.startswith(" ") else line for line in str(message).splitlines()]
    print("\n".join(lines), file=sys.stderr)
    return code

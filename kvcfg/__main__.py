"""`python -m kvcfg VERB …`, the same as `kvcfg VERB …`."""

import sys

from kvcfg.cli import main

sys.exit(main())

"""``python -m sharedllm_ext``: the command line."""

import sys

from sharedllm_ext.cli import main

sys.exit(main())

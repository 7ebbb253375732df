"""``python -m lora_kernels``: the same as the ``lora-kernels`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

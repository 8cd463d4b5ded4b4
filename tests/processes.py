"""The `gemcut` command in a process of its own."""

import os
import sys

COMMAND = [sys.executable, "-P", "-c", "import sys; from gemcut.engine.cli import main\n"]
COMMAND[-1] += "sys.exit(main())"
# unbuffered, Python would write at once what the command forgets to flush; and users have no
# interpreter on
UNWANTED = {"PYTHONUNBUFFERED", "TRITON_INTERPRET"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in UNWANTED}

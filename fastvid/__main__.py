"""`python -m fastvid`, also under torchrun."""
import atexit
import os
import sys

from fastvid.cli import main

if __name__ == "__main__":
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # else the process could abort on its way out, over a thread of gloo that is still there
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

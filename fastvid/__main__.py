"""`python -m fastvid` is `fastvid`."""
import sys

from fastvid.cli import main

sys.exit(main())

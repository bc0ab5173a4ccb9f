"""C{python -m relaymux} is the C{relaymux} command."""

import sys

from relaymux.cli import main

sys.exit(main())

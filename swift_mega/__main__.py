"""`python -m swift_mega VERB …` is `swift-mega VERB …`."""

import sys

from swift_mega.cli import main

sys.exit(main())

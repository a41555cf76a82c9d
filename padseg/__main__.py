"""`python -m padseg`."""

from padseg.cli import main

raise SystemExit(main())

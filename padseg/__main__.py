"""`python -m padseg`."""

from padseg.commands import main

raise SystemExit(main())

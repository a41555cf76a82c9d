"""How fast parts of padseg are: bin/bench."""

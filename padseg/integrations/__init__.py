"""Adapters for tools that call padseg: one module for each, which imports the tool's library only when it is used."""

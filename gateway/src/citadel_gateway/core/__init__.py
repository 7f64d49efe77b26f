"""Decisions as plain objects: no sockets, no framework, the clock passed in."""

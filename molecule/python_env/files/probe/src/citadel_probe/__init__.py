"""Says who it is."""

NAME = "probe"

"""The `citadel-gateway` command."""

"""The data plane: one event loop that accepts, decides and relays."""

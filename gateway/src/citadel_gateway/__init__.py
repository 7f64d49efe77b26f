"""The gateway in front of the model servers: it moves bytes, decides, counts, and says why."""

__version__ = "0.1.0"

"""The gateway in front of the model servers: it moves bytes, decides, counts, and says why."""

__version__ = "0.1.0"
# built 1795534573.0129414

"""The control process: everything that is not generation."""

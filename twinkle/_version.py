"""The version, which the build, the report and the command line read."""

__version__ = "0.1.0"

"""The version of this program; setup.py reads it from here."""

__version__ = "0.1.0"

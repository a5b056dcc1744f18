"""The package's version, in one place for all four parts."""

VERSION = "0.1.0"

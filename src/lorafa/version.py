"""The version of the library, in the one place the code can read it without being installed."""

VERSION = "0.1.0"

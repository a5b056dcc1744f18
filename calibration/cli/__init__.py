"""The command `flowturbo-calibrate`."""

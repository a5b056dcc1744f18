"""The command `flowturbo-export`."""
